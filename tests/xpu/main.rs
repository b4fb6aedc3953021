//! Models whose FP8 linears run on every OpenCL device that there is: the reference's greedy text, and what is refused.
#![cfg(feature = "xpu")]

// Each test binary uses its part of the shared module.
#[allow(dead_code, unreachable_pub)]
#[path = "../support/mod.rs"]
mod support;

use std::io::Write;
use std::ops::ControlFlow;

use candle_compressed_tensors::xpu::{Error, Memory, XpuDevice, XpuOptions};
use candle_compressed_tensors::{Checkpoint, LoadOptions, QuantizerCompressedTensors};
use candle_fp8_transformers::{CausalLm, GenerationConfig, TextGeneration};
use support::{Mode, Reference, dir, model};

/// Every device, and with memory of its own, too.
fn devices() -> Vec<XpuDevice> {
    let infos = match XpuDevice::list() {
        Ok(infos) => infos,
        Err(Error::NoOpenCl) => Vec::new(),
        Err(error) => panic!("{error}"),
    };
    if infos.is_empty() {
        // Past what captures the output of tests. If it cannot be said, the tests are as good.
        let _ = writeln!(std::io::stderr(), "SKIPPED: no OpenCL device");
    }
    let ways = [None, Some(Memory::Copied)];
    let all = (0..infos.len()).flat_map(|index| ways.map(|memory| (index, memory)));
    all.map(|(index, memory)| {
        let options = XpuOptions {
            memory,
            ..XpuOptions::default()
        };
        XpuDevice::with_options(index, options).expect("a device that is there")
    })
    .collect()
}

fn load(name: &str, mode: Mode, device: &XpuDevice) -> CausalLm {
    let checkpoint = Checkpoint::open(dir(name)).unwrap();
    let options = LoadOptions {
        xpu: Some(device.clone()),
        ..mode.options()
    };
    let quantizer = QuantizerCompressedTensors::new(&checkpoint, options).unwrap();
    model(&checkpoint, &quantizer)
}

#[test]
fn greedy_text_is_the_reference_s() {
    for device in devices() {
        for (name, mode) in [
            ("stories-llama-fp8-dynamic", Mode::AsCheckpoint),
            ("stories-llama-fp8-dynamic", Mode::Full),
            ("stories-llama-fp8-static", Mode::AsCheckpoint),
            ("stories-qwen3-moe-fp8-dynamic", Mode::AsCheckpoint),
        ] {
            let reference = Reference::open(name);
            let model = load(name, mode, &device);
            let expected = reference.ids(&format!("greedy.{}", mode.name()));
            let mut config = GenerationConfig::new(model.config());
            config.sample_len = expected.len();
            let loaded = device.transfers();
            let mut generation = TextGeneration::new(&model, config, 512).unwrap();
            let prompt = reference.ids("greedy.prompt");
            let found = generation
                .generate(&prompt, |_| ControlFlow::Continue(()))
                .unwrap()
                .tokens;
            assert_eq!(found, expected, "{name} {} on {device:?}", mode.name());
            // It was the device that computed.
            assert!(
                device.transfers().downloads > loaded.downloads,
                "{name} on {device:?}"
            );
        }
    }
}

#[test]
fn dequantized_linears_are_refused() {
    for device in devices() {
        let checkpoint = Checkpoint::open(dir("stories-llama-fp8-dynamic")).unwrap();
        let options = LoadOptions {
            xpu: Some(device),
            dequantize: true,
            ..LoadOptions::default()
        };
        let refused = QuantizerCompressedTensors::new(&checkpoint, options)
            .err()
            .expect("refused");
        assert!(
            refused.to_string().contains("take one of the two"),
            "{refused}"
        );
    }
}
