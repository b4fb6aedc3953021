//! Generates text with a Llama, Mistral or Mixtral checkpoint whose linears stay in FP8.
//!
//! Without arguments it runs a small model of this repository, offline:
//!
//! ```text
//! cargo run --release --example llama-fp8
//! cargo run --release --example llama-fp8 -- --model-id RedHatAI/Meta-Llama-3.1-8B-Instruct-FP8-dynamic --prompt "Why is the sky blue?"
//! ```

use std::process::ExitCode;

use candle_fp8_examples::{STORIES_LLAMA, generate::Example};
use candle_fp8_transformers::Architecture;

/// Keeps freed memory. The system's gives large pieces back, and every page of the next prompt is made anew.
#[cfg(feature = "mimalloc")]
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let example = Example {
        name: "llama-fp8",
        about: "Generates text with a Llama, Mistral or Mixtral checkpoint whose linears stay in FP8",
        embedded: STORIES_LLAMA,
        prompt: "Once upon a time",
        model_id: "RedHatAI/Meta-Llama-3.1-8B-Instruct-FP8-dynamic",
        architectures: &[
            Architecture::Llama,
            Architecture::Mistral,
            Architecture::Mixtral,
        ],
        other: "qwen-fp8",
    };
    example.main()
}
