//! Keys and values through E4M3.

#[cfg(feature = "cuda")]
mod cuda;
#[cfg(feature = "metal")]
mod metal;

use candle_core::backend::BackendStorage;
use candle_core::{
    CpuStorage, CudaStorage, CustomOp2, DType, Layout, MetalStorage, Result, Shape, Tensor,
};
use candle_kernels_fp8::cpu;

use crate::error::{self, Error};
use crate::storage;

const OP: &str = "fake_quantize";

/// Rounds `x` through E4M3 and back: what a `kv_cache_scheme` does to keys and values as they are appended.
///
/// `x`: BF16, F16 or F32, any strides; for keys and values `[B, H, L, D]`. `scale`: F32 `[1]`, or one that broadcasts
/// to `x`, such as `[H, 1, 1]`. Gives `decode(encode(x / scale)) · scale`, computed in f32, in `x`'s shape and dtype.
///
/// # Errors
/// If a dtype is another, `scale` does not broadcast to `x`, or the tensors are on a
/// [device](crate#devices) without kernels. In a backward pass.
pub fn fake_quantize(x: &Tensor, scale: &Tensor) -> Result<Tensor> {
    error::float(OP, "x", x.dtype())?;
    error::dtype(OP, "scale", scale.dtype(), &[DType::F32], "F32")?;
    error::device(OP, "scale", scale, x.device())?;
    let scale = if scale.elem_count() == 1 {
        scale.reshape(())?
    } else {
        scale.clone()
    };
    let scale = scale.broadcast_as(x.shape()).map_err(|_| Error::Shape {
        op: OP,
        tensor: "scale",
        expected: format!("[1] or a shape that broadcasts to {:?}", x.dims()),
        found: scale.shape().clone(),
    })?;
    x.apply_op2(&scale, FakeQuantize)
}

struct FakeQuantize;

impl CustomOp2 for FakeQuantize {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        scale: &CpuStorage,
        scale_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let mut values = storage::values(x, x_layout)?.into_owned();
        let scale = scale.as_slice::<f32>()?;
        let scales = storage::offsets(scale_layout).map(|i| scale[i]);
        for (value, scale) in values.iter_mut().zip(scales) {
            *value = cpu::fake_quantize(*value, scale);
        }
        Ok((
            storage::from_values(values, x.dtype())?,
            x_layout.shape().clone(),
        ))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        x_layout: &Layout,
        scale: &CudaStorage,
        scale_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let y = cuda::fake_quantize((x, x_layout), (scale, scale_layout))?;
        Ok((y, x_layout.shape().clone()))
    }

    #[cfg(not(feature = "cuda"))]
    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        Err(Error::NoCuda { op: OP }.into())
    }

    #[cfg(feature = "metal")]
    fn metal_fwd(
        &self,
        x: &MetalStorage,
        x_layout: &Layout,
        scale: &MetalStorage,
        scale_layout: &Layout,
    ) -> Result<(MetalStorage, Shape)> {
        let y = metal::fake_quantize((x, x_layout), (scale, scale_layout))?;
        Ok((y, x_layout.shape().clone()))
    }

    #[cfg(not(feature = "metal"))]
    fn metal_fwd(
        &self,
        _: &MetalStorage,
        _: &Layout,
        _: &MetalStorage,
        _: &Layout,
    ) -> Result<(MetalStorage, Shape)> {
        Err(Error::NoMetal { op: OP }.into())
    }

    fn bwd(
        &self,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        Err(Error::NotTrainable { op: OP }.into())
    }
}
