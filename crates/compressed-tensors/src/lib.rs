//! The compressed-tensors checkpoint format: config.json to one quantization scheme per module name.
//!
//! This crate reads the quantization config of checkpoints that llm-compressor and its relatives write, and answers
//! one question: how is the module of this name quantized? It knows JSON and regexes; it opens no files and knows no
//! tensors. FP8 is what its schemes are [resolved](QuantizationConfig::resolve) to; all else is refused with the
//! module, the group and the reason.
//!
//! ```
//! use compressed_tensors::{ActivationStrategy, QuantizationConfig, WeightStrategy};
//!
//! let config = serde_json::json!({
//!     "model_type": "llama",
//!     "quantization_config": {
//!         "quant_method": "compressed-tensors",
//!         "format": "float-quantized",
//!         "config_groups": {
//!             "group_0": {
//!                 "targets": ["Linear"],
//!                 "weights": { "num_bits": 8, "type": "float", "strategy": "channel" },
//!                 "input_activations": { "num_bits": 8, "type": "float", "strategy": "token", "dynamic": true },
//!             }
//!         },
//!         "ignore": ["lm_head"],
//!     }
//! });
//! let quantization = QuantizationConfig::from_model_config(&config)?.expect("the model is quantized");
//!
//! let scheme = quantization.resolve("model.layers.0.mlp.down_proj", "Linear")?.expect("the module is targeted");
//! assert_eq!(scheme.weight, WeightStrategy::Channel);
//! assert_eq!(scheme.activations, ActivationStrategy::DynamicToken);
//!
//! assert!(quantization.resolve("lm_head", "Linear")?.is_none());
//! # Ok::<(), compressed_tensors::Error>(())
//! ```
//!
//! # Matching
//!
//! A target is a module's exact name, a class name (`Linear`; `Module` is every class), or `re:` and a pattern with the
//! semantics of Python's `re.match`: anchored at the name's start, not at its end. `ignore` follows the same rules and
//! wins. Among targets the exact name wins over patterns, patterns over classes.

mod args;
mod config;
mod error;
mod fp8;
mod json;
mod legacy;
mod locate;
mod pattern;
mod scheme;
mod sparsity;
mod targets;

pub use args::{ActivationOrdering, Dynamic, QuantizationArgs, QuantizationType, Strategy};
pub use config::{QuantMethod, QuantizationConfig};
pub use error::Error;
pub use fp8::{ActivationStrategy, Fp8Scheme, KvCacheStrategy, WeightStrategy};
pub use scheme::Scheme;
