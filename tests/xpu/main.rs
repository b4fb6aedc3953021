//! Models whose FP8 linears run on every OpenCL device that there is: the reference's greedy text, and what is refused.
#![cfg(feature = "xpu")]

// Each test binary uses its part of the shared module.
#[allow(dead_code, unreachable_pub)]
#[path = "../support/mod.rs"]
mod support;

use std::io::Write;
use std::ops::ControlFlow;

use candle_compressed_tensors::xpu::{Error, Memory, XpuDevice, XpuOptions};
use candle_compressed_tensors::{
    Checkpoint, CtFp8Linear, CtLinear, LoadOptions, QuantizerCompressedTensors, SaveOptions,
    forward_shared, merge_linears, save, shared_products, shared_quantization,
};
use candle_core::{DType, Device, Tensor};
use candle_fp8::{Quantization, ScaleLayout};
use candle_fp8_transformers::{CausalLm, GenerationConfig, ModelConfig, TextGeneration};
use candle_nn::Module;
use support::{Mode, Reference, dir, loadable, model, raw_tensors, scratch};

/// Every device, and as one with memory of its own, and as one that shares it with the host in turns, too: processors do
/// without either, GPUs do not.
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
    let mut ways = Vec::new();
    for (index, info) in infos.iter().enumerate() {
        // In one piece, as other tests write as well.
        let line = format!("TESTED: models on {}\n", info.name);
        let _ = std::io::stderr().write_all(line.as_bytes());
        let memories = [Memory::Copied, Memory::Mapped].map(Some);
        let can = |memory: &Option<Memory>| memory.is_none_or(|way| info.memories.contains(&way));
        ways.extend(
            (memories.into_iter().chain([None]))
                .filter(can)
                .map(|memory| (index, memory)),
        );
    }
    let ways = ways.into_iter();
    ways.map(|(index, memory)| {
        let options = XpuOptions {
            memory,
            ..XpuOptions::default()
        };
        XpuDevice::with_options(index, options).expect("a device that is there")
    })
    .collect()
}

fn quantizer(name: &str, mode: Mode, device: &XpuDevice) -> QuantizerCompressedTensors {
    let checkpoint = Checkpoint::open(dir(name)).unwrap();
    let options = LoadOptions {
        xpu: Some(device.clone()),
        ..mode.options()
    };
    QuantizerCompressedTensors::new(&checkpoint, options).unwrap()
}

fn load(name: &str, mode: Mode, device: &XpuDevice) -> CausalLm {
    let quantizer = quantizer(name, mode, device);
    model(quantizer.checkpoint(), &quantizer)
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
            let now = device.transfers();
            let results = now.downloads + now.results_in_place;
            let before = loaded.downloads + loaded.results_in_place;
            assert!(results > before, "{name} on {device:?}");
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

/// Codes are on the device and nowhere else, and come back from there.
#[test]
fn what_was_loaded_is_saved_byte_for_byte() {
    for device in devices() {
        for fixture in loadable() {
            let used = device.used_bytes();
            let quantizer = quantizer(&fixture.name, Mode::AsCheckpoint, &device);
            let model = model(quantizer.checkpoint(), &quantizer);
            let mut codes = 0;
            for (name, linear) in model.linears() {
                if let CtLinear::Fp8(linear) = linear {
                    assert!(linear.packed_weight().is_none(), "{name}");
                    codes += linear.xpu_weight().expect("on the device").bytes() as u64;
                }
            }
            assert!(
                codes > 0 || quantizer.plan().modules().is_empty(),
                "{}",
                fixture.name
            );
            // Where the device reads tensors themselves they are no memory of its own.
            if device.memory() != Memory::Tensors {
                let more = device.used_bytes() - used;
                assert!(
                    (codes..codes * 2).contains(&more),
                    "{more} for {codes} bytes of codes"
                );
            }
            let to = scratch(&format!("xpu-{}", fixture.name));
            save(&quantizer, &model.state(), &to, &SaveOptions::default()).unwrap();
            let (expected, saved) = (raw_tensors(&dir(&fixture.name)), raw_tensors(&to));
            assert_eq!(expected.len(), saved.len(), "{}", fixture.name);
            for (name, tensor) in &expected {
                assert!(saved[name] == *tensor, "{}: {name} differs", fixture.name);
            }
            drop(model);
            assert_eq!(device.used_bytes(), used, "what is dropped is free again");
        }
    }
}

#[test]
fn a_model_that_does_not_fit_says_which_weight() {
    let infos = XpuDevice::list().unwrap_or_default();
    for index in 0..infos.len() {
        let options = XpuOptions {
            memory: Some(Memory::Copied),
            memory_bytes: Some(500_000),
            ..XpuOptions::default()
        };
        let device = XpuDevice::with_options(index, options).unwrap();
        let quantizer = quantizer("stories-llama-fp8-dynamic", Mode::AsCheckpoint, &device);
        let checkpoint = quantizer.checkpoint();
        let config = ModelConfig::from_json(checkpoint.config()).unwrap();
        let vb = quantizer.var_builder(DType::F32, &Device::Cpu).unwrap();
        let error = CausalLm::load(&config, &quantizer, vb).unwrap_err();
        let error = format!("{error:#}");
        for part in [
            "model.layers.",
            "_proj: the weight",
            "too little memory",
            "of 500000 bytes",
        ] {
            assert!(error.contains(part), "{part} is missing in {error}");
        }
        assert_eq!(device.used_bytes(), 0);
    }
}

/// Of each layer: the input of query, key and value there and three results back; one of each for the output
/// projection, and for all of the MLP.
#[test]
fn a_token_is_copied_eight_times_a_layer() {
    for device in devices() {
        let model = load("stories-llama-fp8-dynamic", Mode::AsCheckpoint, &device);
        let mut cache = model.new_cache(1, 8).unwrap();
        let mut step = || {
            let before = device.transfers();
            let ids = Tensor::new(&[[7u32]], &Device::Cpu).unwrap();
            model.forward(&ids, &mut cache).unwrap();
            let after = device.transfers();
            [
                after.uploads - before.uploads,
                after.downloads - before.downloads,
                after.results_in_place - before.results_in_place,
            ]
        };
        let layers = model.config().num_hidden_layers as u64;
        let expected = match device.memory() {
            Memory::Copied | Memory::Mapped | Memory::Shared => [3 * layers, 5 * layers, 0],
            Memory::Tensors => [0, 0, 5 * layers],
        };
        for _ in 0..2 {
            assert_eq!(step(), expected, "on {device:?}");
        }
    }
}

fn linear(out: usize, seed: u8) -> CtFp8Linear {
    let codes = (0..out * 32).map(|i| float8::F8E4M3::from_bits((i as u8 % 97) ^ seed));
    let codes = Tensor::from_iter(codes, &Device::Cpu).unwrap();
    let scale = Tensor::full(0.01f32, (out, 1), &Device::Cpu).unwrap();
    let quantization = Some(Quantization::PerToken);
    let codes = codes.reshape((out, 32)).unwrap();
    CtFp8Linear::new(codes, scale, ScaleLayout::Channel, None, quantization).unwrap()
}

/// What other devices do with linears of one input is not done with these, nor with some here and some there.
#[test]
fn linears_of_one_input_stay_what_they_are() {
    let x = Tensor::randn(0f32, 1., (3, 32), &Device::Cpu).unwrap();
    let values = |tensor: &Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    for device in devices() {
        let there = |linear: CtFp8Linear| CtLinear::Fp8(linear.to_xpu(&device).unwrap());
        let [a, b] = merge_linears([there(linear(16, 1)), there(linear(8, 2))]).unwrap();
        let here = CtLinear::Fp8(linear(8, 2));
        assert_eq!(shared_quantization(&[&a, &b]), None);
        assert_eq!(shared_quantization(&[&here]), Some(Quantization::PerToken));
        assert!(shared_products(&[&a, &b]).is_none());
        let together = forward_shared(&[&a, &b], &x).unwrap();
        for (linear, y) in [&a, &b].into_iter().zip(&together) {
            assert_eq!(values(&linear.forward(&x).unwrap()), values(y));
        }
        assert!(shared_products(&[&a, &here]).is_none());
        let apart = forward_shared(&[&a, &here], &x).unwrap_err().to_string();
        assert!(apart.contains("on different devices"), "{apart}");
        assert_eq!(b.weight().unwrap().dtype(), DType::F8E4M3);
    }
}
