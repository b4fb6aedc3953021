//! A GPU for tests, and memory of it with guards around.
#![allow(dead_code)] // Each test binary uses its own part.

use candle_kernels_fp8::cuda::{Address, Gpu};
use cudarc::driver::{CudaContext, CudaSlice, CudaStream, DevicePtr, sys};
use std::io::Write;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A stream of the first GPU. There is one at a time, so that a failure of one test is not mixed with another's work.
pub(crate) struct Device {
    pub(crate) stream: Arc<CudaStream>,
    pub(crate) gpu: Gpu,
    _only: MutexGuard<'static, ()>,
}

/// Says something past what captures the output of tests.
pub(crate) fn say(text: &str) {
    // If it cannot be said, the tests are as good.
    let _ = writeln!(std::io::stderr(), "{text}");
}

fn devices() -> i32 {
    let mut count = 0;
    // SAFETY: the count lives through the call. What the calls return is not looked at: where nothing but a stub of the
    // driver is installed, they return nothing, and leave the count alone.
    unsafe {
        let _ = sys::cuInit(0);
        let _ = sys::cuDeviceGetCount(&mut count);
    }
    count
}

impl Device {
    /// None, which it says, without a GPU.
    pub(crate) fn get() -> Option<Self> {
        static ONLY: Mutex<()> = Mutex::new(());
        let only = ONLY.lock().unwrap_or_else(PoisonError::into_inner);
        if devices() < 1 {
            say("SKIPPED: no CUDA device");
            return None;
        }
        let context = CudaContext::new(0).expect("a device has a context");
        let stream = context.new_stream().expect("a context has streams");
        let gpu = Gpu::of(&stream).expect("the GPU is of compute capability 8.9 or newer");
        Some(Self {
            stream,
            gpu,
            _only: only,
        })
    }

    /// Memory that holds `bytes`, between guards. It starts at a multiple of 16, and of nothing more.
    pub(crate) fn upload(&self, bytes: &[u8]) -> Guarded {
        let mut all = vec![GUARD; BEFORE + bytes.len() + AFTER];
        all[BEFORE..][..bytes.len()].copy_from_slice(bytes);
        let slice = self.stream.clone_htod(&all).expect("the GPU has memory");
        let (start, _) = slice.device_ptr(&self.stream);
        let address = start + BEFORE as u64;
        Guarded {
            slice,
            len: bytes.len(),
            address,
        }
    }

    /// What memory holds, once all work on the stream is done; an error if anything was written around it.
    pub(crate) fn download(&self, memory: &Guarded) -> Result<Vec<u8>, String> {
        let mut all = self
            .stream
            .clone_dtoh(&memory.slice)
            .map_err(|error| format!("{error}"))?;
        self.stream
            .synchronize()
            .map_err(|error| format!("{error}"))?;
        let outside = |at: &usize| *at < BEFORE || *at >= BEFORE + memory.len;
        if let Some(at) = (0..all.len()).find(|at| outside(at) && all[*at] != GUARD) {
            let at = at as i64 - BEFORE as i64;
            return Err(format!(
                "byte {at} of {} was written: it is outside",
                memory.len
            ));
        }
        all.truncate(BEFORE + memory.len);
        Ok(all.split_off(BEFORE))
    }
}

/// All bytes of the guards: NaN as a code and as a float of any type.
const GUARD: u8 = 0xff;
const BEFORE: usize = 4096 + 16;
const AFTER: usize = 4096;

/// Memory of the device, with guards around.
pub(crate) struct Guarded {
    slice: CudaSlice<u8>,
    len: usize,
    pub(crate) address: Address,
}
