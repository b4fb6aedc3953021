//! What can go wrong on a device.

use std::fmt;

use opencl3::error_codes::{CL_MEM_OBJECT_ALLOCATION_FAILURE, CL_OUT_OF_HOST_MEMORY};

/// An error of the device, or of what it was asked to do.
#[derive(Debug, Clone)]
pub enum Error {
    /// No OpenCL library is installed.
    NoOpenCl,
    /// No device of this number.
    NoDevice {
        /// What was asked for.
        index: usize,
        /// Names of those that there are.
        found: Vec<String>,
    },
    /// A kernel does not compile on the device.
    Build {
        /// The device.
        device: String,
        /// The program and its options.
        program: String,
        /// What the device's compiler says.
        log: String,
    },
    /// The device has too little memory.
    Memory {
        /// The device.
        device: String,
        /// Bytes that were asked for.
        bytes: u64,
        /// Bytes in use by this program.
        used: u64,
        /// Bytes that the device has.
        total: u64,
        /// The most bytes that the device gives at once.
        at_once: u64,
    },
    /// The device does not answer any more: it was reset or removed, or its driver failed. Nothing on it can be used
    /// again.
    Lost {
        /// The device.
        device: String,
        /// The call that failed.
        call: &'static str,
        /// OpenCL's code.
        code: i32,
    },
    /// A call of OpenCL failed.
    Call {
        /// The device.
        device: String,
        /// The call.
        call: &'static str,
        /// OpenCL's code.
        code: i32,
    },
    /// A tensor is not as an op asks for.
    Tensor {
        /// The op.
        op: &'static str,
        /// The tensor.
        tensor: &'static str,
        /// What it should be.
        expected: String,
        /// What it is.
        found: String,
    },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoOpenCl => f.write_str(
                "no OpenCL library (libOpenCL.so.1, OpenCL.dll) is installed; it comes with the GPU's driver, on \
                 Debian and Ubuntu in the packages intel-opencl-icd and ocl-icd-libopencl1",
            ),
            Self::NoDevice { index, found } if found.is_empty() => write!(
                f,
                "no XPU device {index}: OpenCL shows no device at all; is the GPU's driver installed (on Debian \
                 and Ubuntu the package intel-opencl-icd), and may this user open /dev/dri/renderD*?"
            ),
            Self::NoDevice { index, found } => {
                write!(f, "no XPU device {index}; there are")?;
                for (index, name) in found.iter().enumerate() {
                    write!(f, "{} {index}: {name}", if index == 0 { "" } else { "," })?;
                }
                Ok(())
            }
            Self::Build {
                device,
                program,
                log,
            } => write!(f, "{device}: {program} does not compile:\n{log}"),
            Self::Memory {
                device,
                bytes,
                used,
                total,
                at_once,
            } => write!(
                f,
                "{device}: too little memory for another {bytes} bytes; {used} of {total} bytes are in use, and the \
                 device gives {at_once} at once"
            ),
            Self::Lost { device, call, code } => write!(
                f,
                "{device}: the device was lost ({call}: OpenCL error {code}); it was reset or removed, or its driver \
                 failed. What was on it has to be loaded again, by a new XpuDevice"
            ),
            Self::Call { device, call, code } => {
                let meaning = match *code {
                    CL_MEM_OBJECT_ALLOCATION_FAILURE => ": too little memory on the device",
                    CL_OUT_OF_HOST_MEMORY => ": too little memory on the host",
                    _ => "",
                };
                write!(f, "{device}: {call} failed with OpenCL error {code}{meaning}")
            }
            Self::Tensor {
                op,
                tensor,
                expected,
                found,
            } => write!(f, "{op}: {tensor} is {found}, expected {expected}"),
        }
    }
}

impl std::error::Error for Error {}

impl From<Error> for candle_core::Error {
    fn from(error: Error) -> Self {
        candle_core::Error::wrap(error)
    }
}
