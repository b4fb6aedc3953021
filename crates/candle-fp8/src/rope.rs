//! Rotary position embedding.

use candle_core::{D, DType, Result, Tensor};
use candle_kernels_fp8::cpu::{self, InstructionSet};

use crate::error;
use crate::kernel::{self, Float, memory, on_float};

const OP: &str = "rope";
const EXPECTED: &str = "[B, L, H, D], D even, none of them 0";

/// Rotates each pair `(x[i], x[i + D/2])` of a head by the angle of its position, in f32, and rounds once.
///
/// `x`: BF16, F16 or F32 `[B, L, H, D]`, D even, any strides; `cos` and `sin`: `[L, D/2]` in the dtype of `x`. Gives
/// `[B, L, H, D]` in that dtype.
///
/// # Errors
/// If a dtype, shape or device is not as said above.
pub fn rope(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    error::float(OP, "x", x.dtype())?;
    let (_, len, heads, dim) = match error::dims4(OP, "x", x, EXPECTED)? {
        dims if dims.3.is_multiple_of(2) => dims,
        _ => return Err(error::dims(OP, "x", x, EXPECTED).into()),
    };
    for (name, angles) in [("cos", cos), ("sin", sin)] {
        error::shape(OP, name, angles, &[len, dim / 2], "one for each pair of x")?;
        error::dtype(OP, name, angles.dtype(), &[x.dtype()], "the dtype of x")?;
        error::device(OP, name, angles, x.device())?;
    }
    if !kernel::serves(&[x, cos, sin]) {
        return composed(x, cos, sin);
    }
    let [x, cos, sin] = [x.contiguous()?, cos.contiguous()?, sin.contiguous()?];
    fn run<T: Float>(sizes: (usize, usize, usize), [x, cos, sin]: [&Tensor; 3]) -> Result<Tensor> {
        let [x_memory, cos, sin] = [x, cos, sin].map(memory);
        let values = x_memory.values::<T>()?;
        let mut out = Vec::new();
        let set = InstructionSet::best();
        cpu::rope(set, sizes, values, cos.values()?, sin.values()?, &mut out);
        Ok(kernel::tensor(out, x))
    }
    on_float!(OP, x.dtype(), T => run::<T>((len, heads, dim), [&x, &cos, &sin]))
}

fn composed(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let half = cos.dim(1)?;
    let wide = x.to_dtype(DType::F32)?;
    let (low, high) = (
        wide.narrow(D::Minus1, 0, half)?,
        wide.narrow(D::Minus1, half, half)?,
    );
    // [L, 1, D / 2]: the same for all heads.
    let angles = |angles: &Tensor| angles.to_dtype(DType::F32)?.unsqueeze(1);
    let (cos, sin) = (angles(cos)?, angles(sin)?);
    let turned = [
        (low.broadcast_mul(&cos)? - high.broadcast_mul(&sin)?)?,
        (high.broadcast_mul(&cos)? + low.broadcast_mul(&sin)?)?,
    ];
    Tensor::cat(&turned, D::Minus1)?.to_dtype(x.dtype())
}
