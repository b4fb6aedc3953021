//! Linears whose weights the checkpoint leaves dense.

use candle_core::{DType, Result, Tensor};
use candle_fp8::dense_mm;
use candle_nn::{Linear, Module};

/// A linear with a dense weight: `y = x · weightᵀ + bias`.
///
/// On the CPU a BF16 weight stays BF16, two bytes a parameter, whatever dtype `x` has: it is read as it lies, through
/// [`dense_mm`], and `y` has the dtype of `x`. Any other weight is multiplied by Candle, which wants `x` and `bias` in
/// the weight's dtype. Gradients pass to `x`, weight and bias on both ways.
///
/// ```
/// use candle_compressed_tensors::CtDenseLinear;
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::Module;
///
/// # fn main() -> candle_core::Result<()> {
/// let weight = Tensor::new(&[[1f32, 2.], [3., 4.]], &Device::Cpu)?.to_dtype(DType::BF16)?;
/// let linear = CtDenseLinear::new(weight, None)?;
/// let y = linear.forward(&Tensor::new(&[[10f32, 100.]], &Device::Cpu)?)?;
/// assert_eq!(y.to_vec2::<f32>()?, [[210., 430.]]);
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct CtDenseLinear {
    /// `[out, in]`.
    weight: Tensor,
    /// `[out]`.
    bias: Option<Tensor>,
}

impl CtDenseLinear {
    /// A linear of a weight `[out, in]` and a bias `[out]`.
    ///
    /// # Errors
    /// The weight is not a matrix, or the shape of the bias does not fit it.
    pub fn new(weight: Tensor, bias: Option<Tensor>) -> Result<Self> {
        let (out, _) = weight.dims2()?;
        if let Some(bias) = &bias
            && bias.dims() != [out]
        {
            candle_core::bail!(
                "CtDenseLinear: expected a bias of shape [{out}], found {:?}",
                bias.dims()
            );
        }
        Ok(Self { weight, bias })
    }

    /// The weight `[out, in]`.
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// The bias `[out]`.
    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }
}

impl Module for CtDenseLinear {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let served = self.weight.dtype() == DType::BF16
            && self.weight.device().is_cpu()
            && self.weight.is_contiguous();
        match served {
            // Differentiable, as Candle's product is: a dense linear is one to train through.
            true => dense_mm(x, &self.weight, self.bias.as_ref()),
            false => Linear::new(self.weight.clone(), self.bias.clone()).forward(x),
        }
    }
}
