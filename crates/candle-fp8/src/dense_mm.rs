//! Activations times a dense weight: the linears that a checkpoint leaves in BF16.

use candle_core::backend::BackendStorage;
use candle_core::{
    CpuStorage, CudaStorage, CustomOp2, DType, Layout, MetalStorage, Result, Shape, Tensor,
};
use candle_kernels_fp8::cpu::{self, InstructionSet};

use crate::error::{self, Error};
use crate::storage;

const OP: &str = "dense_mm";

/// `x · weightᵀ`, and a bias added.
///
/// - `x`: BF16, F16 or F32 `[.., K]`, any strides;
/// - `weight`: BF16 `[N, K]`, contiguous;
/// - `bias`: BF16, F16 or F32 `[N]`.
///
/// Gives `[.., N]` in the dtype of `x`. Products are added in f32, and neither side is rounded before; the weight is
/// not widened in memory. Gradients pass to all three.
///
/// # Errors
/// If a dtype, shape or device is not as said above, or the tensors are not on the CPU: other devices multiply BF16
/// themselves.
pub fn dense_mm(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    error::float(OP, "x", x.dtype())?;
    error::dtype(OP, "weight", weight.dtype(), &[DType::BF16], "BF16")?;
    let (n, k) = error::weight_dims(OP, "weight", weight)?;
    error::device(OP, "x", x, weight.device())?;
    error::contiguous(OP, weight)?;
    let (m, x_k) = error::rows(OP, "x", x)?;
    if x_k != k {
        return Err(Error::Shape {
            op: OP,
            tensor: "x",
            expected: format!("[.., {k}] for a weight [{n}, {k}]"),
            found: x.shape().clone(),
        }
        .into());
    }
    if let Some(bias) = bias {
        error::float(OP, "bias", bias.dtype())?;
        error::shape(OP, "bias", bias, &[n], "one for each output feature")?;
        error::device(OP, "bias", bias, weight.device())?;
    }
    let mut shape = x.dims().to_vec();
    shape[x.rank() - 1] = n;
    let op = DenseMm {
        m,
        n,
        k,
        shape: shape.into(),
    };
    let y = x.apply_op2(weight, op)?;
    match bias {
        Some(bias) => y.broadcast_add(&bias.to_dtype(y.dtype())?),
        None => Ok(y),
    }
}

struct DenseMm {
    m: usize,
    n: usize,
    k: usize,
    shape: Shape,
}

impl CustomOp2 for DenseMm {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let dtype = x.dtype();
        let x = storage::values(x, x_layout)?;
        let weight = storage::bf16(weight, weight_layout)?;
        let sizes = (self.m, self.n, self.k);
        let mut out = Vec::new();
        cpu::dense_mm(InstructionSet::best(), sizes, &x, &weight, None, &mut out);
        Ok((storage::from_values(out, dtype)?, self.shape.clone()))
    }

    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        Err(Error::OnlyCpu { op: OP }.into())
    }

    fn metal_fwd(
        &self,
        _: &MetalStorage,
        _: &Layout,
        _: &MetalStorage,
        _: &Layout,
    ) -> Result<(MetalStorage, Shape)> {
        Err(Error::OnlyCpu { op: OP }.into())
    }

    /// `∂x = ∂y · weight`, `∂weight = ∂yᵀ · x`.
    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let grad = grad.reshape((self.m, self.n))?.to_dtype(DType::F32)?;
        let wide = weight.to_dtype(DType::F32)?;
        let grad_x = grad.matmul(&wide)?.reshape(x.shape())?;
        let rows = x.reshape((self.m, self.k))?.to_dtype(DType::F32)?;
        let grad_weight = grad.t()?.matmul(&rows)?;
        Ok((
            Some(grad_x.to_dtype(x.dtype())?),
            Some(grad_weight.to_dtype(weight.dtype())?),
        ))
    }
}
