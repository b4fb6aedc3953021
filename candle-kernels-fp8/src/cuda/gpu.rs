//! What a device can do.

use cudarc::driver::CudaStream;
use cudarc::driver::sys::CUdevice_attribute_enum as Attribute;

use super::error::Error;

/// The properties of a device that the choice of a kernel depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gpu {
    /// Major and minor version of the compute capability.
    pub capability: (i32, i32),
    /// Streaming multiprocessors.
    pub processors: u32,
}

impl Gpu {
    /// The device of a stream.
    ///
    /// # Errors
    /// If its compute capability is below 8.9, so that it has no FP8 units, or the driver refuses to answer.
    pub fn of(stream: &CudaStream) -> Result<Self, Error> {
        let attribute = |attribute| stream.context().attribute(attribute);
        let major = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        if (major, minor) < (8, 9) {
            return Err(Error::TooOld { major, minor });
        }
        let processors = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        Ok(Self {
            capability: (major, minor),
            processors: processors as u32,
        })
    }

    /// Whether it has the instructions of Hopper that no other architecture has (`sm_90a`).
    pub fn is_hopper(self) -> bool {
        self.capability == (9, 0)
    }

    /// Whether it can launch a kernel while the one before still runs.
    pub fn launches_dependents(self) -> bool {
        self.capability >= (9, 0)
    }
}
