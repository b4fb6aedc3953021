//! The compiled kernels, as the driver knows them.

use cudarc::driver::{CudaStream, sys};
use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::ptr::null_mut;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{OnceLock, RwLock};

use super::error::{Error, check};

/// The version of the compiler of the kernels: 12040 is 12.4.
const NVCC: u32 = include!(concat!(env!("OUT_DIR"), "/cuda_version"));

// Where cudarc finds no nvcc, it takes the newest CUDA that it knows, of which the libraries may lack functions.
const _: () = assert!(
    sys::CUDA_VERSION <= NVCC,
    "cudarc was built for a newer CUDA than nvcc's: put nvcc on the PATH and run `cargo clean -p cudarc`"
);

/// A fat binary, aligned as the driver reads it.
#[repr(C, align(64))]
struct Binary<T: ?Sized>(T);

macro_rules! modules {
    ($($(#[$doc:meta])* $module:ident = $file:literal),+ $(,)?) => {
        /// A source file in `kernels/`.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub(super) enum Module { $($(#[$doc])* $module),+ }

        impl Module {
            fn binary(self) -> *const c_void {
                match self {
                    $(Self::$module => {
                        static BINARY: &Binary<[u8]> =
                            &Binary(*include_bytes!(concat!(env!("OUT_DIR"), "/", $file, ".fatbin")));
                        BINARY.0.as_ptr().cast()
                    })+
                }
            }

            fn loaded(self) -> &'static Loaded {
                match self {
                    $(Self::$module => {
                        static LOADED: OnceLock<Loaded> = OnceLock::new();
                        LOADED.get_or_init(|| Loaded::new(self))
                    })+
                }
            }
        }
    };
}

modules! {
    Argmax = "argmax",
    AttentionAny = "attention_any",
    AttentionFewRows = "attention_few_rows",
    AttentionManyRows = "attention_many_rows",
    Cast = "cast",
    DenseMm = "dense_mm",
    Dequantize = "dequantize",
    Embed = "embed",
    FakeQuantize = "fake_quantize",
    Pack = "pack",
    Pad = "pad",
    Quantize = "quantize",
    RmsNorm = "rms_norm",
    RopeAppend = "rope_append",
    SiluMul = "silu_mul",
    ScaledMmAny = "scaled_mm_any",
    ScaledMmMma = "scaled_mm_mma",
    ScaledMmSkinny = "scaled_mm_skinny",
    Probe = "probe",
    Sm90Attention = "sm90_attention",
    Sm90ScaledMmLarge = "sm90_scaled_mm_large",
    Sm90ScaledMmSkinny = "sm90_scaled_mm_skinny",
    Sm90ScaledMmSmall = "sm90_scaled_mm_small",
    Sm90ScaledMmValues = "sm90_scaled_mm_values",
    Sm90ScaledMmValuesSmall = "sm90_scaled_mm_values_small",
}

/// A module's code. As with code that a linker brings in, there is one for the whole process: it belongs to no context,
/// and the driver loads it into each context that uses it.
struct Loaded {
    library: Result<sys::CUlibrary, Error>,
    kernels: RwLock<HashMap<&'static str, &'static Kernel>>,
}

// SAFETY: the driver's handles of libraries may be used by any thread.
unsafe impl Send for Loaded {}
// SAFETY: as above.
unsafe impl Sync for Loaded {}

/// A kernel that can be launched on any device.
pub(super) struct Kernel {
    handle: sys::CUkernel,
    /// A bit for each of the first 64 devices on which the limit of its dynamic shared memory was raised.
    raised: AtomicU64,
}

// SAFETY: the driver's handles of kernels may be used by any thread.
unsafe impl Send for Kernel {}
// SAFETY: as above.
unsafe impl Sync for Kernel {}

impl Loaded {
    fn new(module: Module) -> Self {
        let mut library = null_mut();
        // SAFETY: the binary is a whole fat binary that lives as long as the process; no options are given.
        let result = unsafe {
            sys::cuLibraryLoadData(
                &mut library,
                module.binary(),
                null_mut(),
                null_mut(),
                0,
                null_mut(),
                null_mut(),
                0,
            )
        };
        Self {
            library: check(result).map(|()| library),
            kernels: RwLock::default(),
        }
    }
}

impl Module {
    /// A kernel by its name in the source file.
    pub(super) fn kernel(self, name: &'static str) -> Result<&'static Kernel, Error> {
        let loaded = self.loaded();
        if let Some(kernel) = loaded.kernels.read().expect("no panic inside").get(name) {
            return Ok(kernel);
        }
        let library = loaded.library?;
        let symbol = CString::new(name).expect("names hold no zero");
        let mut handle = null_mut();
        // SAFETY: the library is loaded and never unloaded; the name ends with a zero.
        check(unsafe { sys::cuLibraryGetKernel(&mut handle, library, symbol.as_ptr()) })?;
        // As long as the process, like the library; there are as many as names in the sources.
        let kernel: &'static Kernel = Box::leak(Box::new(Kernel {
            handle,
            raised: AtomicU64::new(0),
        }));
        let mut kernels = loaded.kernels.write().expect("no panic inside");
        Ok(kernels.entry(name).or_insert(kernel))
    }
}

/// Dynamic shared memory that a block gets without asking.
const FREE_SHARED: u32 = 48 * 1024;

impl Kernel {
    /// As a launch takes it; allows blocks so much dynamic shared memory.
    pub(super) fn function(
        &self,
        stream: &CudaStream,
        shared: u32,
    ) -> Result<sys::CUfunction, Error> {
        let device = stream.context().cu_device();
        let bit = 1u64.checked_shl(device as u32).unwrap_or(0);
        if shared > FREE_SHARED && self.raised.load(Ordering::Relaxed) & bit == 0 {
            let attribute =
                sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            let most = stream.context().attribute(
                sys::CUdevice_attribute_enum::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN,
            )?;
            let fixed = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES;
            let mut taken = 0;
            // SAFETY: the kernel's library is loaded, and the device exists, since a stream of it does.
            check(unsafe { sys::cuKernelGetAttribute(&mut taken, fixed, self.handle, device) })?;
            // All that any launch may ask for: 227 KiB on Hopper, 99 KiB on Ada, less what the kernel declares.
            // SAFETY: as above.
            check(unsafe {
                sys::cuKernelSetAttribute(attribute, most - taken, self.handle, device)
            })?;
            self.raised.fetch_or(bit, Ordering::Relaxed);
        }
        Ok(self.handle.cast())
    }
}
