//! Types of values as kernels know them.

use candle_core::DType;

/// A type of activations, biases and results. The numbers are those in `kernels/common.h`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u32)]
pub(crate) enum Element {
    Bf16 = 0,
    F16 = 1,
    F32 = 2,
    E4m3 = 3,
}

impl Element {
    /// Of a float that activations can have.
    pub(crate) fn float(dtype: DType) -> Option<Self> {
        match dtype {
            DType::BF16 => Some(Self::Bf16),
            DType::F16 => Some(Self::F16),
            DType::F32 => Some(Self::F32),
            _ => None,
        }
    }

    pub(crate) fn dtype(self) -> DType {
        match self {
            Self::Bf16 => DType::BF16,
            Self::F16 => DType::F16,
            Self::F32 => DType::F32,
            Self::E4m3 => DType::F8E4M3,
        }
    }
}
