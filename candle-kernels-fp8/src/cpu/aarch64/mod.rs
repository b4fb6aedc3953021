//! Inner loops for 64-bit ARM.

mod neon;

pub use neon::Neon;
