//! Generates text with a Qwen2, Qwen3 or Qwen3-MoE checkpoint whose linears stay in FP8.
//!
//! Without arguments it runs a small mixture of experts of this repository, offline:
//!
//! ```text
//! cargo run --release --example qwen-fp8
//! cargo run --release --example qwen-fp8 -- --model-id RedHatAI/Qwen3-8B-FP8-dynamic --prompt "Why is the sky blue?"
//! ```

use std::process::ExitCode;

use candle_fp8_examples::{STORIES_QWEN3_MOE, generate::Example};
use candle_fp8_transformers::Architecture;

/// Keeps freed memory. The system's gives large pieces back, and every page of the next prompt is made anew.
#[cfg(feature = "mimalloc")]
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let example = Example {
        name: "qwen-fp8",
        about: "Generates text with a Qwen2, Qwen3 or Qwen3-MoE checkpoint whose linears stay in FP8",
        embedded: STORIES_QWEN3_MOE,
        prompt: "Tell me a story about Lily and a lost ball.",
        model_id: "RedHatAI/Qwen3-8B-FP8-dynamic",
        architectures: &[
            Architecture::Qwen2,
            Architecture::Qwen3,
            Architecture::Qwen3Moe,
        ],
        other: "llama-fp8",
    };
    example.main()
}
