//! Types of activations and results.

/// A float type, as device code numbers them (`kernels/e4m3.h`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Float {
    /// bfloat16.
    Bf16 = 0,
    /// IEEE half precision.
    F16 = 1,
    /// IEEE single precision.
    F32 = 2,
}

impl Float {
    /// Bytes of a value.
    pub fn size(self) -> usize {
        match self {
            Self::Bf16 | Self::F16 => 2,
            Self::F32 => 4,
        }
    }
}

/// One of three names, by type.
macro_rules! by_float {
    ($float:expr, $before:literal, $after:literal) => {
        match $float {
            $crate::metal::Float::Bf16 => concat!($before, "bf16", $after),
            $crate::metal::Float::F16 => concat!($before, "f16", $after),
            $crate::metal::Float::F32 => concat!($before, "f32", $after),
        }
    };
}
pub(super) use by_float;
