//! Devices: which there are, what they can do, and how work gets there.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use opencl3::command_queue::CommandQueue;
use opencl3::context::Context;
use opencl3::device::{
    CL_DEVICE_SVM_COARSE_GRAIN_BUFFER, CL_DEVICE_SVM_FINE_GRAIN_BUFFER,
    CL_DEVICE_SVM_FINE_GRAIN_SYSTEM, CL_DEVICE_TYPE_ALL, CL_DEVICE_TYPE_CPU, CL_DEVICE_TYPE_GPU,
    Device,
};
use opencl3::error_codes::{self, ClError};
use opencl3::platform::get_platforms;
use opencl3::types::cl_device_svm_capabilities;

use crate::program::Programs;
use crate::{Error, Kernels, Memory, Transfers};

/// What a device is and can do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct XpuInfo {
    /// Its name, and the runtime's.
    pub name: String,
    /// Whether it is a GPU. Runtimes for processors show theirs as a device too.
    pub is_gpu: bool,
    /// Bytes of memory, or of it what [`XpuOptions::memory_bytes`] allows.
    pub memory_bytes: u64,
    /// The most bytes that the device gives at once.
    pub allocation_bytes: u64,
    /// The kernels that it can run, from the plainest to the fastest.
    pub kernels: Vec<Kernels>,
    /// The ways in which it can get at tensors, from the slowest to the fastest.
    pub memories: Vec<Memory>,
    /// Work-items of a work-group, at most.
    pub(crate) work_group: usize,
    /// Lanes of a subgroup that the device offers.
    pub(crate) lanes: Vec<usize>,
    /// Whether its matrix units are emulated.
    pub(crate) emulated: bool,
}

/// How a device is used, where it is not to choose itself.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct XpuOptions {
    /// The kernels of products. `None`: the fastest that the device can run. A processor that has subgroups can run
    /// those for matrix units too, which it emulates: slowly, and with the same results.
    pub kernels: Option<Kernels>,
    /// How tensors get there. `None`: the fastest way that the device can.
    pub memory: Option<Memory>,
    /// Lanes of a subgroup. `None`: as many as the kernels ask for. Matrix units have a number of their own, emulated ones
    /// either of 8 and 16.
    pub lanes: Option<usize>,
    /// Bytes of its memory that may be used, at most. `None`: all of it.
    pub memory_bytes: Option<u64>,
}

/// A device that runs FP8 linears, through OpenCL. Cloning is cheap, and gives the same device.
#[derive(Clone)]
pub struct XpuDevice {
    pub(crate) inner: Arc<Inner>,
}

pub(crate) struct Inner {
    pub(crate) info: XpuInfo,
    pub(crate) kernels: Kernels,
    pub(crate) memory: Memory,
    pub(crate) lanes: usize,
    pub(crate) device: Device,
    // Programs first: what is made of a context is released before it.
    programs: Mutex<Programs>,
    pub(crate) queue: CommandQueue,
    pub(crate) context: Context,
    pub(crate) used_bytes: AtomicU64,
    pub(crate) transfers: Mutex<Transfers>,
    lost: AtomicBool,
}

impl fmt::Debug for XpuDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "XpuDevice({})", self.inner.info.name)
    }
}

impl PartialEq for XpuDevice {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.inner, &other.inner)
    }
}

impl Eq for XpuDevice {}

impl XpuDevice {
    /// All devices that OpenCL shows, GPUs first; in the order in which [`XpuDevice::new`] counts them.
    ///
    /// # Errors
    /// If no OpenCL library is installed.
    pub fn list() -> Result<Vec<XpuInfo>, Error> {
        Ok(found()?.into_iter().map(|(info, _)| info).collect())
    }

    /// Device `index` of [`XpuDevice::list`], used in the fastest way.
    ///
    /// # Errors
    /// If there is no OpenCL library, no such device, or it gives no context or queue.
    pub fn new(index: usize) -> Result<Self, Error> {
        Self::with_options(index, XpuOptions::default())
    }

    /// Device `index` of [`XpuDevice::list`], used as `options` say.
    ///
    /// # Errors
    /// As [`XpuDevice::new`], and if the device cannot do what an option says.
    pub fn with_options(index: usize, options: XpuOptions) -> Result<Self, Error> {
        let mut devices = found()?;
        if index >= devices.len() {
            let found = devices.into_iter().map(|(info, _)| info.name).collect();
            return Err(Error::NoDevice { index, found });
        }
        let (mut info, device) = devices.swap_remove(index);
        info.memory_bytes = info
            .memory_bytes
            .min(options.memory_bytes.unwrap_or(u64::MAX));
        let refused = |tensor, expected, found| Error::Tensor {
            op: "XpuDevice::with_options",
            tensor,
            expected,
            found,
        };
        // Emulated matrix units are there for tests.
        let best = info
            .kernels
            .iter()
            .rfind(|&&kernels| kernels != Kernels::Matrix || !info.emulated);
        let kernels = options.kernels.or(best.copied()).unwrap_or(Kernels::Plain);
        if !info.kernels.contains(&kernels) {
            let (expected, found) = (format!("one of {:?}", info.kernels), format!("{kernels:?}"));
            return Err(refused("options.kernels", expected, found));
        }
        let memory = options
            .memory
            .or(info.memories.last().copied())
            .unwrap_or(Memory::Copied);
        if !info.memories.contains(&memory) {
            let (expected, found) = (format!("one of {:?}", info.memories), format!("{memory:?}"));
            return Err(refused("options.memory", expected, found));
        }
        let lanes = options.lanes.unwrap_or_else(|| lanes(&info, kernels));
        let served = info.lanes_for(kernels);
        if kernels != Kernels::Plain && !served.contains(&lanes) {
            let expected = format!("one of {served:?} for kernels {kernels:?}");
            return Err(refused("options.lanes", expected, lanes.to_string()));
        }
        let failed = |call| {
            move |error: ClError| Error::Call {
                device: String::new(),
                call,
                code: error.0,
            }
        };
        let named = |error| match error {
            Error::Call { call, code, .. } => Error::Call {
                device: info.name.clone(),
                call,
                code,
            },
            other => other,
        };
        let context = Context::from_device(&device)
            .map_err(failed("clCreateContext"))
            .map_err(named)?;
        let queue = queue(&context)
            .map_err(failed("clCreateCommandQueue"))
            .map_err(named)?;
        let inner = Inner {
            kernels,
            memory,
            lanes,
            device,
            programs: Mutex::new(Programs::default()),
            queue,
            context,
            used_bytes: AtomicU64::new(0),
            transfers: Mutex::new(Transfers::default()),
            lost: AtomicBool::new(false),
            info,
        };
        Ok(Self {
            inner: Arc::new(inner),
        })
    }

    /// What the device is and can do.
    pub fn info(&self) -> &XpuInfo {
        &self.inner.info
    }

    /// The kernels in use.
    pub fn kernels(&self) -> Kernels {
        self.inner.kernels
    }

    /// How tensors get to the device.
    pub fn memory(&self) -> Memory {
        self.inner.memory
    }

    /// What was moved between host and device, since the device was made.
    pub fn transfers(&self) -> Transfers {
        *lock(&self.inner.transfers)
    }

    /// Bytes that weights and activations take on the device now.
    pub fn used_bytes(&self) -> u64 {
        self.inner.used_bytes.load(Ordering::Relaxed)
    }

    pub(crate) fn programs(&self) -> MutexGuard<'_, Programs> {
        lock(&self.inner.programs)
    }

    /// Waits until nothing is under way; `false` if that cannot be said. On a device that was lost nothing is.
    pub(crate) fn finished(&self) -> bool {
        match self.inner.queue.finish() {
            Ok(()) => true,
            Err(ClError(code)) => is_loss(code),
        }
    }

    /// As [`check`](Self::check), where a lack of resources is one of memory.
    pub(crate) fn check_alloc<T>(
        &self,
        call: &'static str,
        result: Result<T, ClError>,
    ) -> Result<T, Error> {
        let lack = |ClError(code)| match code {
            error_codes::CL_OUT_OF_RESOURCES => error_codes::CL_MEM_OBJECT_ALLOCATION_FAILURE,
            code => code,
        };
        self.check(call, result.map_err(|error| ClError(lack(error))))
    }

    /// Turns OpenCL's answer into ours. Once the device was lost, every call says so.
    pub(crate) fn check<T>(
        &self,
        call: &'static str,
        result: Result<T, ClError>,
    ) -> Result<T, Error> {
        let device = || self.inner.info.name.clone();
        match result {
            Ok(value) if !self.inner.lost.load(Ordering::Relaxed) => Ok(value),
            Ok(_) => Err(Error::Lost {
                device: device(),
                call,
                code: 0,
            }),
            Err(ClError(code)) if is_loss(code) => {
                self.inner.lost.store(true, Ordering::Relaxed);
                Err(Error::Lost {
                    device: device(),
                    call,
                    code,
                })
            }
            Err(ClError(code)) => Err(Error::Call {
                device: device(),
                call,
                code,
            }),
        }
    }
}

/// Whether an error says that the device does not work any more. Drivers report a reset in the next call, whichever
/// it is, mostly as a lack of resources.
fn is_loss(code: i32) -> bool {
    matches!(
        code,
        error_codes::CL_DEVICE_NOT_AVAILABLE
            | error_codes::CL_OUT_OF_RESOURCES
            | error_codes::CL_EXEC_STATUS_ERROR_FOR_EVENTS_IN_WAIT_LIST
            | error_codes::CL_INVALID_COMMAND_QUEUE
            | error_codes::CL_INVALID_CONTEXT
    )
}

/// A panic elsewhere leaves nothing half done.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[allow(deprecated)] // The newer call asks for OpenCL 2.0, and offers nothing that is needed.
fn queue(context: &Context) -> Result<CommandQueue, ClError> {
    CommandQueue::create_default(context, 0)
}

fn found() -> Result<Vec<(XpuInfo, Device)>, Error> {
    // PoCL shows no device to a thread that asks while another one is the first to ask.
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _held = lock(&ONE_AT_A_TIME);
    let platforms = match get_platforms() {
        Ok(platforms) => platforms,
        Err(ClError(code)) if code == NO_PLATFORM => Vec::new(),
        // Whatever else keeps the library from loading or answering.
        Err(_) => return Err(Error::NoOpenCl),
    };
    let mut devices = Vec::new();
    for platform in platforms {
        // A platform without devices says so by an error.
        let ids = platform.get_devices(CL_DEVICE_TYPE_ALL).unwrap_or_default();
        let runtime = platform.name().unwrap_or_default();
        for device in ids.into_iter().map(Device::new) {
            if let Ok(info) = info(&device, &runtime) {
                devices.push((info, device));
            }
        }
    }
    devices.sort_by_key(|(info, _)| !info.is_gpu);
    Ok(devices)
}

/// What a loader answers that finds no runtime.
const NO_PLATFORM: i32 = -1001;
/// Lanes of subgroups that kernels for matrix units are written for.
const MATRIX_LANES: [usize; 2] = [8, 16];
/// Sizes of subgroups, as an array of `size_t`.
const SUB_GROUP_SIZES: u32 = 0x4108;

fn info(device: &Device, runtime: &str) -> Result<XpuInfo, ClError> {
    let kind = device.dev_type()?;
    let extensions = device.extensions()?;
    let has = |name: &str| {
        extensions
            .split_whitespace()
            .any(|extension| extension == name)
    };
    let lanes: Vec<usize> =
        match has("cl_intel_subgroups") && has("cl_intel_required_subgroup_size") {
            true => (device.get_data(SUB_GROUP_SIZES)?)
                .chunks_exact(size_of::<usize>())
                .map(|bytes| {
                    bytes
                        .iter()
                        .rev()
                        .fold(0, |size, &byte| size << 8 | usize::from(byte))
                })
                .collect(),
            false => Vec::new(),
        };
    let units = has("cl_intel_subgroup_matrix_multiply_accumulate");
    let emulated = !units && kind & CL_DEVICE_TYPE_CPU != 0;
    let mut kernels = vec![Kernels::Plain];
    if !lanes.is_empty() {
        kernels.push(Kernels::Subgroups);
        if (units || emulated) && lanes.iter().any(|lanes| MATRIX_LANES.contains(lanes)) {
            kernels.push(Kernels::Matrix);
        }
    }
    let sharing = device.svm_mem_capability();
    let unified = device.host_unified_memory()?;
    Ok(XpuInfo {
        name: format!("{} ({})", device.name()?.trim(), runtime.trim()),
        is_gpu: kind & CL_DEVICE_TYPE_GPU != 0,
        memory_bytes: device.global_mem_size()?,
        allocation_bytes: device.max_mem_alloc_size()?,
        kernels,
        memories: memories(unified, sharing),
        work_group: device.max_work_group_size()?,
        lanes,
        emulated,
    })
}

/// The ways to get at tensors of a device that has its memory from the host or not, and what it says of sharing.
fn memories(unified: bool, sharing: cl_device_svm_capabilities) -> Vec<Memory> {
    let can = |kind| unified && sharing & kind != 0;
    let mut memories = vec![Memory::Copied];
    if can(CL_DEVICE_SVM_COARSE_GRAIN_BUFFER) {
        memories.push(Memory::Mapped);
    }
    if can(CL_DEVICE_SVM_FINE_GRAIN_BUFFER) {
        memories.push(Memory::Shared);
        if can(CL_DEVICE_SVM_FINE_GRAIN_SYSTEM) {
            memories.push(Memory::Tensors);
        }
    }
    memories
}

impl XpuInfo {
    /// The fewest lanes of a subgroup that fill the device's arithmetic units.
    pub(crate) fn smallest_lanes(&self) -> Option<usize> {
        self.lanes.iter().copied().filter(|&lanes| lanes >= 8).min()
    }

    /// Those of the device's subgroups that kernels can run on. Matrix units have a number of their own.
    fn lanes_for(&self, kernels: Kernels) -> Vec<usize> {
        let serves = |lanes: &usize| match kernels {
            Kernels::Plain | Kernels::Subgroups => true,
            Kernels::Matrix if self.emulated => MATRIX_LANES.contains(lanes),
            Kernels::Matrix => Some(*lanes) == self.smallest_lanes(),
        };
        self.lanes.iter().copied().filter(serves).collect()
    }
}

/// Matrix units work with the smallest subgroups of their device; elsewhere 16 lanes read a whole line of memory.
fn lanes(info: &XpuInfo, kernels: Kernels) -> usize {
    let smallest = info.smallest_lanes().unwrap_or(16);
    match kernels {
        Kernels::Matrix if !info.emulated => smallest,
        _ if info.lanes.contains(&16) => 16,
        _ => smallest,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The first device that there is.
    fn first() -> Option<XpuDevice> {
        match XpuDevice::new(0) {
            Ok(device) => Some(device),
            Err(Error::NoOpenCl | Error::NoDevice { .. }) => None,
            Err(error) => panic!("{error}"),
        }
    }

    #[test]
    fn a_reset_is_told_from_a_refusal() {
        assert!(is_loss(error_codes::CL_DEVICE_NOT_AVAILABLE));
        assert!(is_loss(error_codes::CL_OUT_OF_RESOURCES));
        assert!(!is_loss(error_codes::CL_MEM_OBJECT_ALLOCATION_FAILURE));
        assert!(!is_loss(error_codes::CL_INVALID_KERNEL_ARGS));
    }

    /// Of processors; of Intel's GPUs that share the host's memory, and of those with their own; of none.
    #[test]
    fn what_a_device_says_of_sharing_is_used() {
        use Memory::{Copied, Mapped, Shared, Tensors};
        let (coarse, fine, system) = (
            CL_DEVICE_SVM_COARSE_GRAIN_BUFFER,
            CL_DEVICE_SVM_FINE_GRAIN_BUFFER,
            CL_DEVICE_SVM_FINE_GRAIN_SYSTEM,
        );
        let all = coarse | fine | system;
        assert_eq!(memories(true, all), [Copied, Mapped, Shared, Tensors]);
        assert_eq!(memories(true, coarse | fine), [Copied, Mapped, Shared]);
        assert_eq!(memories(true, coarse), [Copied, Mapped]);
        assert_eq!(memories(false, coarse), [Copied]);
        assert_eq!(memories(true, 0), [Copied]);
    }

    #[test]
    fn a_lost_device_says_so_from_then_on() {
        let Some(device) = first() else { return };
        let x =
            candle_core::Tensor::ones((2, 5), candle_core::DType::F32, &candle_core::Device::Cpu)
                .unwrap();
        crate::quantize_per_token(&device, &x).unwrap();
        // What a driver answers once it has reset the device.
        let answer = Err::<(), _>(ClError(error_codes::CL_OUT_OF_RESOURCES));
        let lost = device.check("clFinish", answer).unwrap_err();
        assert!(
            matches!(
                &lost,
                Error::Lost {
                    call: "clFinish",
                    ..
                }
            ),
            "{lost}"
        );
        for _ in 0..2 {
            let later = crate::quantize_per_token(&device, &x)
                .unwrap_err()
                .to_string();
            assert!(later.contains("the device was lost"), "{later}");
        }
        // Another one is as good as new.
        crate::quantize_per_token(&first().unwrap(), &x).unwrap();
    }
}
