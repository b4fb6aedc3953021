//! The devices that ops are tested on.

use candle_core::{Device, Result};

/// Runs a test on the CPU; and on a GPU, where the ops are built for one and there is one.
pub(crate) fn everywhere(test: impl Fn(&Device) -> Result<()>) -> Result<()> {
    for device in [Some(Device::Cpu), gpu()].into_iter().flatten() {
        // Seen where the test fails.
        println!("on {:?}", device.location());
        test(&device)?;
    }
    Ok(())
}

/// A GPU whose kernels are built.
#[cfg(not(any(feature = "cuda", feature = "metal")))]
pub(crate) fn gpu() -> Option<Device> {
    None
}

/// A GPU whose kernels are built.
#[cfg(all(feature = "metal", not(feature = "cuda")))]
pub(crate) fn gpu() -> Option<Device> {
    let device = Device::new_metal(0).ok();
    let device = device.filter(candle_fp8::fp8_kernels);
    if device.is_none() {
        // Past what captures the output of tests.
        let mut stderr = std::io::stderr();
        // If it cannot be said, the tests are as good.
        let _ = std::io::Write::write_all(&mut stderr, b"SKIPPED: no GPU of Apple silicon\n");
    }
    device
}

/// A GPU whose kernels are built.
#[cfg(feature = "cuda")]
pub(crate) fn gpu() -> Option<Device> {
    use candle_core::cuda_backend::cudarc::driver::sys;
    use std::io::Write;
    use std::sync::OnceLock;

    static GPU: OnceLock<Option<Device>> = OnceLock::new();
    let find = || {
        let mut count = 0;
        // SAFETY: the count lives through the call. What the calls return is not looked at: where nothing but a stub of
        // the driver is installed, they return nothing, and leave the count alone.
        unsafe {
            let _ = sys::cuInit(0);
            let _ = sys::cuDeviceGetCount(&mut count);
        }
        let device = (count > 0).then(|| Device::new_cuda(0).expect("a GPU can be used"));
        let device = device.filter(candle_fp8::fp8_kernels);
        if device.is_none() {
            // Past what captures the output of tests. If it cannot be said, the tests are as good.
            let _ = writeln!(std::io::stderr(), "SKIPPED: no CUDA device with FP8 units");
        }
        device
    };
    GPU.get_or_init(find).clone()
}
