//! Memory of a long generation on a GPU. A program of its own, as other tests would take memory meanwhile.
#![cfg(feature = "cuda")]

// It runs on a GPU only.
#[allow(dead_code)]
#[path = "ops/devices.rs"]
mod devices;
#[path = "gpu/made_up.rs"]
mod made_up;

use std::ops::ControlFlow;

use candle_core::backend::BackendDevice;
use candle_core::{DType, Device, Result};
use candle_fp8::{Quantization, ScaleLayout};
use candle_fp8_transformers::{GenerationConfig, TextGeneration};

/// Bytes in use: on the device by anyone, on the host by this process.
fn used(device: &Device) -> Result<(usize, usize)> {
    let Device::Cuda(cuda) = device else {
        candle_core::bail!("not a GPU");
    };
    cuda.synchronize()?;
    let (free, total) = cuda
        .cuda_stream()
        .context()
        .mem_get_info()
        .map_err(candle_core::Error::wrap)?;
    let pages = std::fs::read_to_string("/proc/self/statm")?;
    let resident = pages
        .split(' ')
        .nth(1)
        .and_then(|pages| pages.parse::<usize>().ok());
    Ok((total - free, resident.expect("a number of pages") * 4096))
}

#[test]
fn ten_thousand_tokens_take_no_more_than_a_few() -> Result<()> {
    const TOKENS: usize = 10_000;
    let Some(device) = devices::gpu() else {
        return Ok(());
    };
    let scheme = (ScaleLayout::Channel, Some(Quantization::PerToken));
    let [(model_type, changes), ..] = made_up::configs();
    let model = made_up::model(model_type, &changes, scheme, DType::BF16, &device);
    let mut config = GenerationConfig::new(model.config());
    config.sample_len = TOKENS;
    config.eos_token_ids.clear();
    let mut generation = TextGeneration::new(&model, config, TOKENS + 16).expect("a cache");
    let (mut tokens, mut early) = (0, None);
    let generated = generation.generate(&[1, 2, 3, 4], |_| {
        tokens += 1;
        if tokens == 500 {
            early = Some(used(&device));
        }
        ControlFlow::Continue(())
    });
    assert_eq!(generated.expect("a text").tokens.len(), TOKENS);
    let (device_early, host_early) = early.expect("500 tokens")?;
    let (device_late, host_late) = used(&device)?;
    println!("device {device_early} → {device_late}, host {host_early} → {host_late}");
    // A pool of the driver's may have grown by a block, the host's heap by some pages.
    assert!(
        device_late <= device_early + (4 << 20),
        "the device's memory grows"
    );
    assert!(
        host_late <= host_early + (16 << 20),
        "the host's memory grows"
    );
    Ok(())
}
