//! What can go wrong on the way to a kernel.

use cudarc::driver::{DriverError, sys};

/// A kernel that could not be launched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Error {
    /// The driver refused.
    Driver(DriverError),
    /// The GPU has no FP8 units: its compute capability is below 8.9.
    TooOld {
        /// Major version of the compute capability.
        major: i32,
        /// Minor version of the compute capability.
        minor: i32,
    },
}

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Driver(error) => write!(f, "CUDA driver: {error}"),
            Self::TooOld { major, minor } => write!(
                f,
                "a GPU of compute capability {major}.{minor} has no FP8 units (8.9 or newer is needed)"
            ),
        }
    }
}

impl std::error::Error for Error {}

impl From<DriverError> for Error {
    fn from(error: DriverError) -> Self {
        Self::Driver(error)
    }
}

/// A driver call's result.
pub(super) fn check(result: sys::CUresult) -> Result<(), Error> {
    Ok(result.result()?)
}
