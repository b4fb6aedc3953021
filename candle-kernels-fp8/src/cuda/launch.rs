//! Launching a kernel.

use cudarc::driver::{CudaStream, sys};
use std::ffi::c_void;
use std::mem::zeroed;
use std::ptr::null_mut;

use super::error::{Error, check};
use super::library::Kernel;

/// How a kernel starts.
#[derive(Debug, Clone, Copy)]
pub(super) struct Launch {
    /// Blocks, along x, y and z.
    pub(super) grid: [u32; 3],
    /// Threads of a block.
    pub(super) threads: u32,
    /// Bytes of dynamic shared memory of a block.
    pub(super) shared: u32,
    /// Neighbouring blocks, along x, that are scheduled together.
    pub(super) cluster: u32,
    /// Whether the kernel may start while the one before it is still running.
    pub(super) dependent: bool,
}

impl Launch {
    /// Launches with arguments that `args` points to, in the kernel's order. Launches nothing if the grid is empty.
    ///
    /// # Safety
    /// The arguments are of the kernel's types, what they point to is valid as the kernel uses it, and stays so until the
    /// stream has passed the launch.
    pub(super) unsafe fn run(
        &self,
        stream: &CudaStream,
        kernel: &Kernel,
        args: &mut [*mut c_void],
    ) -> Result<(), Error> {
        if self.grid.contains(&0) {
            return Ok(());
        }
        stream.context().bind_to_thread()?;
        let function = kernel.function(stream, self.shared)?;
        let mut attributes = Vec::with_capacity(2);
        if self.cluster > 1 {
            // SAFETY: zeros are a valid value of this plain C struct.
            let mut attribute: sys::CUlaunchAttribute = unsafe { zeroed() };
            attribute.id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
            attribute.value.clusterDim.x = self.cluster;
            attribute.value.clusterDim.y = 1;
            attribute.value.clusterDim.z = 1;
            attributes.push(attribute);
        }
        if self.dependent {
            // SAFETY: as above.
            let mut attribute: sys::CUlaunchAttribute = unsafe { zeroed() };
            attribute.id =
                sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
            attribute.value.programmaticStreamSerializationAllowed = 1;
            attributes.push(attribute);
        }
        let config = sys::CUlaunchConfig {
            gridDimX: self.grid[0],
            gridDimY: self.grid[1],
            gridDimZ: self.grid[2],
            blockDimX: self.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: self.shared,
            hStream: stream.cu_stream(),
            attrs: attributes.as_mut_ptr(),
            numAttrs: attributes.len() as u32,
        };
        // SAFETY: the configuration lives through the call; the caller vouches for the arguments.
        check(unsafe { sys::cuLaunchKernelEx(&config, function, args.as_mut_ptr(), null_mut()) })
    }
}

/// The addresses of a kernel's arguments, as [`Launch::run`] takes them.
macro_rules! args {
    ($($arg:expr),+ $(,)?) => {
        &mut [$(std::ptr::from_ref($arg).cast_mut().cast::<std::ffi::c_void>()),+]
    };
}
pub(super) use args;
