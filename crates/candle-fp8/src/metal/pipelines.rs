//! Kernels, compiled once for each device. Candle's own cache takes Candle's sources alone.

use candle_core::MetalDevice;
use candle_kernels_fp8::metal::{LANES, Library};
use candle_metal_kernels::MetalKernelError;
use candle_metal_kernels::metal::{self, ComputePipeline};
use objc2_metal::{MTLCompileOptions, MTLComputePipelineState};
use std::collections::HashMap;
use std::sync::{Mutex, OnceLock};

/// What was compiled; a GPU goes by its number in the registry.
#[derive(Default)]
struct Compiled {
    libraries: HashMap<(u64, Library), metal::Library>,
    pipelines: HashMap<(u64, &'static str), ComputePipeline>,
}

/// A kernel, ready to be launched on a device.
pub(super) fn pipeline(
    device: &MetalDevice,
    library: Library,
    kernel: &'static str,
) -> Result<ComputePipeline, MetalKernelError> {
    static COMPILED: OnceLock<Mutex<Compiled>> = OnceLock::new();
    // Others wait for what is compiled, so that nothing is compiled twice.
    let mut compiled = COMPILED.get_or_init(Mutex::default).lock()?;
    let Compiled {
        libraries,
        pipelines,
    } = &mut *compiled;
    let device = device.metal_device();
    let gpu = device.registry_id();
    if let Some(pipeline) = pipelines.get(&(gpu, kernel)) {
        return Ok(pipeline.clone());
    }
    let library = match libraries.get(&(gpu, library)) {
        Some(library) => library.clone(),
        None => {
            let made = compile(device, library)?;
            libraries.insert((gpu, library), made.clone());
            made
        }
    };
    let function = library.get_function(kernel, None)?;
    let pipeline = device.new_compute_pipeline_state_with_function(&function)?;
    let lanes = pipeline.as_ref().threadExecutionWidth();
    if lanes != LANES {
        let text = format!("{kernel}: SIMD groups of {lanes} threads, not {LANES}");
        return Err(MetalKernelError::FailedToCreatePipeline(text));
    }
    pipelines.insert((gpu, kernel), pipeline.clone());
    Ok(pipeline)
}

fn compile(device: &metal::Device, library: Library) -> Result<metal::Library, MetalKernelError> {
    let options = MTLCompileOptions::new();
    // Its successor needs macOS 15, and both are one setting there.
    #[allow(deprecated)]
    options.setFastMathEnabled(false);
    device.new_library_with_source(library.source(), Some(&options))
}
