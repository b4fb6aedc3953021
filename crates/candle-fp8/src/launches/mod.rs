//! Kernel launches that are the same each time: run one after the other, or as a CUDA graph.

mod ends;
mod ops;

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{CudaGraph, CudaStream, sys};
use candle_core::{CudaDevice, DType, Device, Result, Tensor, bail};
use candle_kernels_fp8::cuda::{self as kernels, Address, Gpu};

use crate::cuda::{KernelResult, On, first, on_cuda};
use crate::{Quantization, Quantized};

pub use ends::LaunchArgmax;
pub use ops::{CacheHeads, LaunchRope};

const OP: &str = "launches";

/// A fixed sequence of kernel launches on one GPU, such as a decode step of a model.
///
/// Everything that the kernels read and write is in tensors that live as long as this: what changes from one run to the
/// next, as the input and the position, is written into them before. A run allocates nothing, and from the second on it
/// is one launch of a captured graph. On Hopper and newer, each kernel but the first starts while the one before it
/// ends (a dependent launch). The first waits for all that the stream has been given before: there are no dependent
/// launches from one graph to the next.
///
/// The first run launches the kernels one by one, which loads them, and captures them for those that follow while the
/// GPU is busy with it. Kernels and arguments are the same, and so are results, to the bit.
///
/// Launches go to the device's stream, in order with other work of the thread. Candle's device has a stream for each
/// thread: who hands this to another thread waits for the device first, as for tensors.
#[derive(Debug)]
pub struct Launches {
    device: CudaDevice,
    gpu: Gpu,
    list: Vec<Launch>,
    /// What the launches' addresses are of.
    memory: Vec<Tensor>,
    graph: Option<Graph>,
}

#[derive(Debug, Clone, Copy)]
enum Launch {
    RmsNorm(kernels::RmsNorm),
    SiluMul(kernels::SiluMul),
    Quantize(kernels::Quantize),
    ScaledMm(kernels::ScaledMm),
    RopeAppend(kernels::RopeAppend),
    Attention(kernels::Attention),
    Embed(kernels::Embed),
    DenseMm(kernels::DenseMm),
    Argmax(kernels::Argmax),
}

struct Graph(CudaGraph);

// SAFETY: the driver's graphs may be used by any thread, by one at a time. Only `Launches::run` uses this one, and has
// a unique reference to it.
unsafe impl Send for Graph {}
// SAFETY: as above: nothing uses it through a shared reference.
unsafe impl Sync for Graph {}

impl std::fmt::Debug for Graph {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Graph")
    }
}

/// Memory for activations `[M, K]` that one launch leaves for the next.
#[derive(Debug, Clone)]
pub enum LaunchActivations {
    /// BF16, F16 or F32 `[M, K]`.
    Values(Tensor),
    /// Codes and scales, and how they are made.
    Quantized(Quantized, Quantization),
}

impl Launches {
    /// None yet, on a device.
    ///
    /// # Errors
    /// If it is no GPU that has [kernels](crate#devices).
    pub fn new(device: &Device) -> Result<Self> {
        let Device::Cuda(cuda) = device else {
            bail!("{OP}: expected a GPU, found {:?}", device.location());
        };
        let on = On::new(OP, cuda);
        let mut gpu = None;
        on.launched(Gpu::of(on.stream()).map(|found| gpu = Some(found)))?;
        let Some(gpu) = gpu else {
            bail!("{OP}: the device was not looked at");
        };
        Ok(Self {
            device: cuda.clone(),
            gpu,
            list: Vec::new(),
            memory: Vec::new(),
            graph: None,
        })
    }

    /// Memory for values `[M, K]`, of zeros.
    ///
    /// # Errors
    /// If the device has none left.
    pub fn values(&self, m: usize, k: usize, dtype: DType) -> Result<Tensor> {
        Tensor::zeros((m, k), dtype, &Device::Cuda(self.device.clone()))
    }

    /// Memory for activations `[M, K]` that are quantized, or not. `None` if no launch makes such: with
    /// [`Quantization::PerTensor`], or if K is no multiple of 16.
    ///
    /// # Errors
    /// If the device has no memory left.
    pub fn activations(
        &self,
        m: usize,
        k: usize,
        dtype: DType,
        quantization: Option<Quantization>,
    ) -> Result<Option<LaunchActivations>> {
        if quantization == Some(Quantization::PerTensor) || !k.is_multiple_of(16) {
            return Ok(None);
        }
        let Some(quantization) = quantization else {
            return Ok(Some(LaunchActivations::Values(self.values(m, k, dtype)?)));
        };
        crate::error::quantization(OP, "input_scale", quantization)?;
        let device = Device::Cuda(self.device.clone());
        let shape = quantization.scales_shape(&[m, k]);
        let scales = match quantization {
            Quantization::Static(scale) => Tensor::full(scale, shape, &device)?,
            _ => Tensor::zeros(shape, DType::F32, &device)?,
        };
        let codes = Quantized {
            codes: Tensor::zeros((m, k), DType::F8E4M3, &device)?,
            scales,
            group: quantization.group(),
            dtype,
        };
        Ok(Some(LaunchActivations::Quantized(codes, quantization)))
    }

    /// Runs the launches, after all that the stream has been given before.
    ///
    /// # Errors
    /// If the driver refuses a launch, or the capture of all of them.
    pub fn run(&mut self) -> Result<()> {
        match &self.graph {
            Some(graph) => graph.0.launch().w(),
            None => {
                self.run_one_by_one()?;
                self.graph = Some(self.capture()?);
                Ok(())
            }
        }
    }

    /// Another list that starts with these launches, on the same memory. It has a graph of its own.
    pub fn fork(&self) -> Self {
        Self {
            device: self.device.clone(),
            gpu: self.gpu,
            list: self.list.clone(),
            memory: self.memory.clone(),
            graph: None,
        }
    }

    /// As [`run`](Self::run), without a graph.
    ///
    /// # Errors
    /// If the driver refuses a launch.
    pub fn run_one_by_one(&self) -> Result<()> {
        let on = On::new(OP, &self.device);
        on.launched(self.launch(on.stream()))
    }

    /// Launches in the list.
    pub fn len(&self) -> usize {
        self.list.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    fn launch(&self, stream: &CudaStream) -> KernelResult {
        // SAFETY: each launch was checked when it was added; its memory is kept here; no other launch is dependent on
        // what it reads before it waits: weights, tables and angles are written by nothing in the list, and positions by
        // `argmax`, after which nothing reads them: it ends the list, as `push` sees to.
        self.list.iter().try_for_each(|launch| unsafe {
            match launch {
                Launch::RmsNorm(args) => kernels::rms_norm(stream, args),
                Launch::SiluMul(args) => kernels::silu_mul(stream, args),
                Launch::Quantize(args) => kernels::quantize(stream, args),
                Launch::ScaledMm(args) => kernels::scaled_mm(stream, args),
                Launch::RopeAppend(args) => kernels::rope_append(stream, args),
                Launch::Attention(args) => kernels::attention(stream, args),
                Launch::Embed(args) => kernels::embed(stream, args),
                Launch::DenseMm(args) => kernels::dense_mm(stream, args),
                Launch::Argmax(args) => kernels::argmax(stream, args),
            }
        })
    }

    fn capture(&self) -> Result<Graph> {
        let on = On::new(OP, &self.device);
        let stream = self.device.cuda_stream();
        // Relaxed: what other threads ask of the driver meanwhile is no part of this stream.
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        stream.begin_capture(mode).w()?;
        let launched = self.launch(&stream);
        // Ended in any case: a stream that goes on capturing would be of no use.
        let graph = stream.end_capture(sys::CUgraphInstantiate_flags(0)).w();
        on.launched(launched)?;
        match graph? {
            Some(graph) => Ok(Graph(graph)),
            None => bail!("{OP}: the capture gave no graph"),
        }
    }

    /// Adds a launch. A graph that there is has not got it.
    fn push(&mut self, launch: Launch) -> Result<()> {
        if let Some(Launch::Argmax(_)) = self.list.last() {
            bail!("{OP}: nothing follows the choice of tokens, which moves positions on");
        }
        self.graph = None;
        self.list.push(launch);
        Ok(())
    }

    /// Whether the next launch may overlap the one before it. The first waits for what was done before the run.
    fn dependent(&self) -> bool {
        !self.list.is_empty() && self.gpu.launches_dependents()
    }

    /// The address of the first element of a tensor, which is kept from now on, and elements between rows: `[M, K]`,
    /// rows dense.
    fn rows(&mut self, tensor: &Tensor) -> Result<(Address, usize)> {
        let (_, k) = tensor.dims2()?;
        let stride = tensor.stride();
        if stride[1] != 1 || stride[0] < k {
            bail!("{OP}: rows are expected to be dense and apart, found strides {stride:?}");
        }
        Ok((self.address(tensor)?, stride[0]))
    }

    /// As [`rows`](Self::rows), of a tensor without gaps.
    fn dense(&mut self, tensor: &Tensor) -> Result<Address> {
        if !tensor.is_contiguous() {
            bail!(
                "{OP}: a contiguous tensor is expected, found {:?}",
                tensor.layout()
            );
        }
        self.address(tensor)
    }

    fn address(&mut self, tensor: &Tensor) -> Result<Address> {
        if !tensor
            .device()
            .same_device(&Device::Cuda(self.device.clone()))
        {
            bail!(
                "{OP}: a tensor on {:?} among those of a GPU",
                tensor.device().location()
            );
        }
        let address = {
            let (storage, layout) = tensor.storage_and_layout();
            let stream = self.device.cuda_stream();
            first((on_cuda(&storage)?, layout), &stream)?.address
        };
        self.memory.push(tensor.clone());
        Ok(address)
    }
}
