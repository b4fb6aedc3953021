//! Llama, Qwen and Mixtral models over FP8 linears, and text generation.
//!
//! [`ModelConfig`] reads a `config.json`, [`CausalLm`] builds the model from any
//! [`LinearSource`](candle_compressed_tensors::LinearSource) and `VarBuilder`, [`KvCache`] holds its keys
//! and values, [`TextGeneration`] samples from it. For a checkpoint, both come from the quantizer:
//!
//! ```no_run
//! use candle_compressed_tensors::{Checkpoint, LoadOptions, QuantizerCompressedTensors};
//! use candle_core::{DType, Device};
//! use candle_fp8_transformers::{CausalLm, GenerationConfig, ModelConfig, TextGeneration};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let checkpoint = Checkpoint::open("path/to/model")?;
//! let quantizer = QuantizerCompressedTensors::new(&checkpoint, LoadOptions::default())?;
//! let vb = quantizer.var_builder(DType::BF16, &Device::Cpu)?;
//! let config = ModelConfig::from_json(checkpoint.config())?;
//! let model = CausalLm::load(&config, &quantizer, vb)?;
//!
//! let mut generation = TextGeneration::new(&model, GenerationConfig::new(&config), 1024)?;
//! for token in generation.stream(&[1, 450, 7483])? {
//!     println!("{}", token?);
//! }
//! # Ok(())
//! # }
//! ```
//!
//! A source of one's own is one function. Here it makes up FP8 weights, and a `VarMap` the rest:
//!
//! ```
//! use candle_compressed_tensors::{CtFp8Linear, CtLinear, LinearSource};
//! use candle_core::{DType, Device, Tensor};
//! use candle_fp8::{Quantization, Rounding, ScaleLayout, quantize_weight, weight_scale};
//! use candle_fp8_transformers::{CausalLm, GenerationConfig, ModelConfig, TextGeneration};
//! use candle_nn::{VarBuilder, VarMap};
//!
//! struct MadeUp;
//!
//! impl LinearSource for MadeUp {
//!     fn linear_b(
//!         &self,
//!         in_dim: usize,
//!         out_dim: usize,
//!         _bias: bool,
//!         vb: VarBuilder,
//!     ) -> candle_core::Result<CtLinear> {
//!         let layout = ScaleLayout::Channel;
//!         let weight = Tensor::randn(0f32, 0.1, (out_dim, in_dim), vb.device())?;
//!         let scale = weight_scale(&weight, layout, DType::F32)?;
//!         let codes = quantize_weight(&weight, &scale, layout, Rounding::Once)?;
//!         let activations = Some(Quantization::PerToken);
//!         Ok(CtLinear::Fp8(CtFp8Linear::new(codes, scale, layout, None, activations)?))
//!     }
//! }
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let config = ModelConfig::from_json(&serde_json::json!({
//!     "architectures": ["LlamaForCausalLM"],
//!     "vocab_size": 100, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
//!     "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
//!     "rms_norm_eps": 1e-5, "tie_word_embeddings": false,
//! }))?;
//! let vars = VarMap::new();
//! let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
//! let model = CausalLm::load(&config, &MadeUp, vb)?;
//! assert!(model.linears().all(|(_, linear)| linear.is_fp8()));
//!
//! // Logits by hand …
//! let mut cache = model.new_cache(1, 32)?;
//! let prompt = Tensor::new(&[[5u32, 6, 7]], &Device::Cpu)?;
//! let logits = model.forward(&prompt, &mut cache)?;
//! assert_eq!(logits.dims(), [1, 100]);
//!
//! // … or a text: greedy, eight tokens.
//! let settings = GenerationConfig { sample_len: 8, ..GenerationConfig::new(&config) };
//! let mut generation = TextGeneration::new(&model, settings, 32)?;
//! let mut stream = generation.stream(&[5, 6, 7])?;
//! let tokens = stream.by_ref().collect::<Result<Vec<u32>, _>>()?;
//! assert_eq!(tokens.len(), 8);
//! println!("{:.0} tokens/s", stream.timings().generated_tokens_per_second());
//! # Ok(())
//! # }
//! ```
//!
//! # Models
//! Llama 1 to 3.x, Mistral, Qwen2 and 2.5, Qwen3, Qwen3-MoE, Mixtral, and the language models of
//! multimodal checkpoints whose `text_config` is one of these. RoPE types `default`, `linear`, `llama3`
//! and `yarn`; sliding windows; tied embeddings; biases; batches of sequences of equal length.
//! Everything else in a `config.json` that would change the result is refused by name.
//!
//! Stock candle-transformers models get their config structs from [`stock`].
//!
//! # Precision
//! F32, BF16 and F16. Norms and softmax are computed in f32, where transformers rounds. On the CPU,
//! attention and experts in half precision run in f32 between their inputs and outputs.

mod attention;
mod config;
mod error;
mod generation;
mod greedy;
mod input;
mod kv_cache;
mod layer;
mod linalg;
mod mlp;
mod model;
mod moe;
mod norm;
mod profile;
mod rope;
#[cfg(feature = "cuda")]
mod step;
pub mod stock;

pub use config::{Architecture, ModelConfig, MoeConfig, RopeConfig, RopeScaling};
pub use error::{Error, Result};
pub use generation::{
    FinishReason, Generated, GenerationConfig, TextGeneration, Timings, TokenStream,
};
pub use greedy::Greedy;
pub use kv_cache::KvCache;
pub use model::CausalLm;
pub use profile::{Part, Profile};
pub use rope::RotaryEmbedding;
