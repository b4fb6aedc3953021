//! Names of kernels, by the type of their values.

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
