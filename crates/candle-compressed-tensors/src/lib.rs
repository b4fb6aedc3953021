//! Loads compressed-tensors FP8 checkpoints into Candle and writes them back.
//!
//! A weight's way: [`Checkpoint`] maps the files, [`Plan`] says what every tensor is (or refuses the checkpoint),
//! [`QuantizerCompressedTensors`] hands out linears and a `VarBuilder`, and [`CtFp8Linear`] keeps the E4M3 codes and calls
//! one op of `candle-fp8`, as [`CtDenseLinear`] does with weights that the checkpoint leaves in BF16.
//!
//! ```
//! use candle_compressed_tensors::{Checkpoint, LoadOptions, QuantizerCompressedTensors};
//! use candle_core::{DType, Device, Tensor};
//! use candle_nn::Module;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let dir = std::env::temp_dir().join(format!("candle-compressed-tensors-doc-{}", std::process::id()));
//! # std::fs::create_dir_all(&dir)?;
//! # std::fs::write(dir.join("config.json"), r#"{"quantization_config": {"quant_method": "compressed-tensors",
//! #     "format": "naive-quantized", "config_groups": {"group_0": {"targets": ["Linear"], "weights":
//! #     {"num_bits": 8, "type": "float", "strategy": "channel"}}}}}"#)?;
//! # let codes = Tensor::new(&[[1f32; 4]; 2], &Device::Cpu)?.to_dtype(DType::F8E4M3)?;
//! # let scale = Tensor::new(&[[0.5f32], [1.0]], &Device::Cpu)?;
//! # let tensors = std::collections::HashMap::from([("proj.weight", codes), ("proj.weight_scale", scale)]);
//! # candle_core::safetensors::save(&tensors, dir.join("model.safetensors"))?;
//! let checkpoint = Checkpoint::open(&dir)?;
//! let quantizer = QuantizerCompressedTensors::new(&checkpoint, LoadOptions::default())?;
//! let vb = quantizer.var_builder(DType::F32, &Device::Cpu)?;
//!
//! // A linear of the checkpoint, its weight one byte a parameter …
//! let linear = quantizer.linear_no_bias(4, 2, vb.pp("proj"))?;
//! assert!(linear.is_fp8());
//! let y = linear.forward(&Tensor::ones((1, 4), DType::F32, &Device::Cpu)?)?;
//! assert_eq!(y.to_vec2::<f32>()?, [[2.0, 4.0]]);
//!
//! // … and the same weight for a stock model, dequantized.
//! let weight = vb.pp("proj").get((2, 4), "weight")?;
//! assert_eq!(weight.to_vec2::<f32>()?, [[0.5; 4], [1.0; 4]]);
//! # std::fs::remove_dir_all(&dir)?;
//! # Ok(())
//! # }
//! ```

mod backend;
mod checkpoint;
pub mod convert;
mod dense;
mod error;
mod header;
#[cfg(feature = "hub")]
pub mod hub;
mod kv_scales;
mod linear;
mod options;
mod plan;
mod quantizer;
mod save;
mod scales;
mod state;
mod warning;

#[cfg(feature = "xpu")]
pub use candle_fp8_xpu as xpu;
pub use checkpoint::{Checkpoint, TensorInfo};
pub use convert::WeightConverter;
pub use error::Error;
pub use linear::{
    CtDenseLinear, CtFp8Linear, CtLinear, LinearSource, forward_gated_mlp, forward_quantized,
    forward_shared, merge_linears, shared_products, shared_quantization,
};
pub use options::{Activations, LoadOptions};
pub use plan::{Fp8Module, Plan};
pub use quantizer::QuantizerCompressedTensors;
pub use save::{SaveOptions, save};
pub use state::{State, StateTensor};
pub use warning::Warning;
