//! Activations to E4M3, and through it.

use candle_core::backend::BackendStorage;
use candle_core::{
    CpuStorage, CudaStorage, CustomOp2, DType, Layout, MetalStorage, Result, Shape, Tensor,
};
use candle_kernels_fp8::cpu;

use crate::error::{self, Error};
use crate::storage;

/// Quantizes each row of `x` with a scale of its own.
///
/// `x`: BF16, F16 or F32 `[.., K]`, any strides. Gives the codes, F8E4M3 `[.., K]`, and the scales, F32 `[.., 1]`.
/// See the [arithmetic](crate#arithmetic). A row with a NaN becomes NaN as a whole. No gradient passes.
///
/// # Errors
/// If `x` has no rows (rank 0 or K = 0), another dtype, or is not on the CPU.
pub fn quantize_per_token(x: &Tensor) -> Result<(Tensor, Tensor)> {
    const OP: &str = "quantize_per_token";
    let (_, k) = error::rows(OP, "x", x)?;
    quantize_rows(OP, x, k)
}

/// Quantizes groups of `group` neighbours in each row of `x` with a scale of their own; the last group may be short.
///
/// `x`: BF16, F16 or F32 `[.., K]`, any strides. Gives the codes, F8E4M3 `[.., K]`, and the scales, F32
/// `[.., ceil(K / group)]`. A group with a NaN becomes NaN as a whole. No gradient passes.
///
/// # Errors
/// If `group` is 0, `x` has no rows (rank 0 or K = 0), another dtype, or is not on the CPU.
pub fn quantize_per_group(x: &Tensor, group: usize) -> Result<(Tensor, Tensor)> {
    const OP: &str = "quantize_per_group";
    error::group(OP, group)?;
    quantize_rows(OP, x, group)
}

fn quantize_rows(op: &'static str, x: &Tensor, group: usize) -> Result<(Tensor, Tensor)> {
    let (m, k) = error::rows(op, "x", x)?;
    error::float(op, "x", x.dtype())?;
    let groups = k.div_ceil(group);
    let mut scales_shape = x.dims().to_vec();
    scales_shape[x.rank() - 1] = groups;
    storage::on_cpu(op, x, |x_storage, layout| {
        let values = storage::values(x_storage, layout)?;
        let (mut codes, mut scales) = (vec![0u8; m * k], vec![0f32; m * groups]);
        cpu::quantize_groups(&values, k, group, &mut codes, &mut scales);
        Ok((
            storage::tensor(storage::from_codes(codes), x.dims()),
            storage::tensor(CpuStorage::F32(scales), scales_shape),
        ))
    })
}

/// Quantizes `x` with one scale.
///
/// `x`: BF16, F16 or F32 of any shape and strides. Gives the codes, F8E4M3 of that shape, and the scale, F32 `[1]`.
/// If `x` holds a NaN, all of it becomes NaN. No gradient passes.
///
/// # Errors
/// If `x` has another dtype or is not on the CPU.
pub fn quantize_per_tensor(x: &Tensor) -> Result<(Tensor, Tensor)> {
    const OP: &str = "quantize_per_tensor";
    error::float(OP, "x", x.dtype())?;
    storage::on_cpu(OP, x, |x_storage, layout| {
        let values = storage::values(x_storage, layout)?;
        let mut codes = vec![0u8; values.len()];
        let scale = cpu::quantize_tensor(&values, &mut codes);
        Ok((
            storage::tensor(storage::from_codes(codes), x.dims()),
            storage::tensor(CpuStorage::F32(vec![scale]), 1),
        ))
    })
}

/// Quantizes `x` with a scale that is given, such as a checkpoint's `input_scale`.
///
/// `x`: BF16, F16 or F32 of any shape and strides. Gives the codes, F8E4M3 of that shape: `x / scale` in f32, clamped
/// to ±448. No gradient passes.
///
/// # Errors
/// If `scale` is not positive and finite, or `x` has another dtype or is not on the CPU.
pub fn quantize_static(x: &Tensor, scale: f32) -> Result<Tensor> {
    const OP: &str = "quantize_static";
    error::float(OP, "x", x.dtype())?;
    error::scale(OP, "scale", scale)?;
    storage::on_cpu(OP, x, |x_storage, layout| {
        let values = storage::values(x_storage, layout)?;
        let mut codes = vec![0u8; values.len()];
        cpu::quantize_static(&values, scale, &mut codes);
        Ok(storage::tensor(storage::from_codes(codes), x.dims()))
    })
}

/// Rounds `x` through E4M3 and back: what a `kv_cache_scheme` does to keys and values as they are appended.
///
/// `x`: BF16, F16 or F32, any strides; for keys and values `[B, H, L, D]`. `scale`: F32 `[1]`, or one that broadcasts
/// to `x`, such as `[H, 1, 1]`. Gives `decode(encode(x / scale)) · scale`, computed in f32, in `x`'s shape and dtype.
///
/// # Errors
/// If a dtype is another, `scale` does not broadcast to `x`, or the tensors are not on the CPU. In a backward pass.
pub fn fake_quantize(x: &Tensor, scale: &Tensor) -> Result<Tensor> {
    const OP: &str = FakeQuantize::NAME;
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

impl FakeQuantize {
    const NAME: &str = "fake_quantize";
}

impl CustomOp2 for FakeQuantize {
    fn name(&self) -> &'static str {
        Self::NAME
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

    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        Err(Error::NotBuilt {
            op: Self::NAME,
            device: "CUDA",
        }
        .into())
    }

    fn metal_fwd(
        &self,
        _: &MetalStorage,
        _: &Layout,
        _: &MetalStorage,
        _: &Layout,
    ) -> Result<(MetalStorage, Shape)> {
        Err(Error::NotBuilt {
            op: Self::NAME,
            device: "Metal",
        }
        .into())
    }

    fn bwd(
        &self,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        Err(Error::NotTrainable { op: Self::NAME }.into())
    }
}
