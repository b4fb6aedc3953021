use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{DeviceLocation, Tensor};
use candle_nn::Module;
use half::bf16;

use super::*;
use crate::{SaveOptions, State, save};

const OUT: usize = 6;
/// No multiple of what kernels read at once.
const IN: usize = 20;

/// An attention with keys and values in FP8 and a quantized cache, and an output projection that is dense.
fn checkpoint(name: &str) -> Checkpoint {
    let dir = scratch(name);
    let config = r#"{"quantization_config": {"quant_method": "compressed-tensors", "format": "float-quantized",
        "ignore": ["attn.o_proj"], "config_groups": {"group_0": {"targets": ["Linear"], "weights":
        {"num_bits": 8, "type": "float", "strategy": "channel"}}}, "kv_cache_scheme":
        {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": false, "symmetric": true}}}"#;
    std::fs::write(dir.join("config.json"), config).unwrap();
    let mut tensors = HashMap::new();
    for projection in ["k_proj", "v_proj"] {
        let values = Tensor::arange(0f32, (OUT * IN) as f32, &Device::Cpu).unwrap();
        let codes = (values / 7.).unwrap().to_dtype(DType::F8E4M3).unwrap();
        let codes = codes.reshape((OUT, IN)).unwrap();
        let scale: Vec<bf16> = (1..=OUT).map(|i| bf16::from_f32(i as f32 / 8.)).collect();
        let scale = Tensor::from_vec(scale, (OUT, 1), &Device::Cpu).unwrap();
        tensors.insert(format!("attn.{projection}.weight"), codes);
        tensors.insert(format!("attn.{projection}.weight_scale"), scale);
    }
    for scale in ["k_scale", "v_scale"] {
        let scale_of_all = Tensor::new(&[0.5f32], &Device::Cpu).unwrap();
        tensors.insert(format!("attn.{scale}"), scale_of_all);
    }
    let dense = Tensor::ones((OUT, IN), DType::BF16, &Device::Cpu).unwrap();
    tensors.insert("attn.o_proj.weight".into(), dense);
    candle_core::safetensors::save(&tensors, dir.join("model.safetensors")).unwrap();
    Checkpoint::open(dir).unwrap()
}

/// An empty folder of this process.
fn scratch(name: &str) -> PathBuf {
    let id = std::process::id();
    let dir = std::env::temp_dir().join(format!("candle-compressed-tensors-{id}-{name}"));
    let _ = std::fs::remove_dir_all(&dir);
    std::fs::create_dir_all(&dir).unwrap();
    dir
}

fn remove(dirs: &[&Path]) {
    for dir in dirs {
        std::fs::remove_dir_all(dir).unwrap();
    }
}

/// Every linear of the checkpoint.
fn linears(quantizer: &QuantizerCompressedTensors, dtype: DType) -> Vec<(&'static str, CtLinear)> {
    let vb = quantizer.var_builder(dtype, &Device::Cpu).unwrap();
    let names = ["attn.k_proj", "attn.v_proj", "attn.o_proj"];
    let linear = |name| quantizer.linear_no_bias(IN, OUT, vb.pp(name)).unwrap();
    names.map(|name| (name, linear(name))).into()
}

#[test]
fn a_device_without_kernels_gets_dense_linears_and_one_warning() {
    let checkpoint = checkpoint("no-kernels");
    let none = |_: &Device| false;
    let quantizer =
        QuantizerCompressedTensors::with_kernels(&checkpoint, LoadOptions::default(), none)
            .unwrap();
    let options = LoadOptions {
        dequantize: true,
        ..LoadOptions::default()
    };
    let dequantizer = QuantizerCompressedTensors::with_kernels(&checkpoint, options, none).unwrap();

    assert_eq!(quantizer.device_warning(), None);
    let x = Tensor::randn(0f32, 1., (3, IN), &Device::Cpu).unwrap();
    let mut state = State::new();
    for ((name, found), (_, expected)) in linears(&quantizer, DType::F32)
        .iter()
        .zip(linears(&dequantizer, DType::F32))
    {
        assert!(!found.is_fp8(), "{name}");
        let rows = |linear: &CtLinear| linear.forward(&x).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(rows(found), rows(&expected), "{name}");
        state.linear(name, found);
    }
    let vb = quantizer.var_builder(DType::F32, &Device::Cpu).unwrap();
    assert!(!vb.contains_tensor("attn.k_scale"));
    // Who asks for dense weights gets what was asked for.
    assert_eq!(dequantizer.device_warning(), None);

    let warning = quantizer.device_warning().unwrap();
    let fp8_bytes = (2 * OUT * IN) as u64;
    let expected = Warning::NoFp8Kernels {
        device: DeviceLocation::Cpu,
        fp8_bytes,
        dense_bytes: 4 * fp8_bytes,
        kv_cache: true,
    };
    assert_eq!(*warning, expected);

    // The stored codes are what these values were made of, so they are what is saved.
    let dir = scratch("no-kernels-saved");
    save(&quantizer, &state, &dir, &SaveOptions::default()).unwrap();
    let saved = Checkpoint::open(&dir).unwrap();
    assert!(saved.names().eq(checkpoint.names()));
    for name in checkpoint.names() {
        let (before, after) = (checkpoint.view(name).unwrap(), saved.view(name).unwrap());
        assert_eq!(before.dtype(), after.dtype(), "{name}");
        assert_eq!(before.data(), after.data(), "{name}");
    }
    remove(&[checkpoint.dir(), &dir]);
}

#[test]
fn a_device_with_kernels_gets_fp8_linears() {
    let checkpoint = checkpoint("kernels");
    let quantizer = QuantizerCompressedTensors::new(&checkpoint, LoadOptions::default()).unwrap();
    for (name, linear) in linears(&quantizer, DType::BF16) {
        assert_eq!(linear.is_fp8(), name != "attn.o_proj", "{name}");
    }
    let vb = quantizer.var_builder(DType::BF16, &Device::Cpu).unwrap();
    assert!(vb.contains_tensor("attn.k_scale"));
    assert_eq!(quantizer.device_warning(), None);
    remove(&[checkpoint.dir()]);
}

#[test]
fn the_warning_says_what_it_costs() {
    let warning = |device, kv_cache| {
        let warning = Warning::NoFp8Kernels {
            device,
            fp8_bytes: 3 << 20,
            dense_bytes: 6 << 20,
            kv_cache,
        };
        warning.to_string()
    };
    assert_eq!(
        warning(DeviceLocation::Cuda { gpu_id: 1 }, false),
        "CUDA device 1 has no FP8 kernels (they need compute capability 8.9, and the feature `cuda` of candle-fp8): \
         linears are dequantized, and 3.0 MiB of FP8 weights take 6.0 MiB"
    );
    assert_eq!(
        warning(DeviceLocation::Metal { gpu_id: 0 }, true),
        "Metal device 0 has no FP8 kernels (they need Apple silicon, and the feature `metal` of candle-fp8): linears \
         are dequantized, and 3.0 MiB of FP8 weights take 6.0 MiB; the KV cache is not quantized"
    );
}
