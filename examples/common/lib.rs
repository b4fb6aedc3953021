//! What the examples share: the flags that name a model, loading it with a progress bar, and printing.
//!
//! An example flattens [`ModelArgs`] into its own flags and asks it for a [`Loaded`] model:
//!
//! ```no_run
//! use candle_fp8_examples::{ModelArgs, cli};
//! use clap::Parser;
//!
//! /// Prints the size of a model.
//! #[derive(Parser)]
//! struct Args {
//!     #[command(flatten)]
//!     model: ModelArgs,
//! }
//!
//! fn main() -> std::process::ExitCode {
//!     cli::run(|| {
//!         let loaded = Args::parse().model.load(candle_fp8_examples::STORIES_LLAMA)?;
//!         println!("{} bytes", loaded.model.weight_bytes());
//!         Ok(())
//!     })
//! }
//! ```

pub mod chat;
pub mod cli;
mod device;
pub mod generate;
mod host_memory;
mod model;
mod strftime;
pub mod table;
pub mod tokens;
pub mod units;

pub use device::{DeviceArgs, device};
pub use model::{
    LinearCount, LoadArgs, Loaded, ModelArgs, STORIES_LLAMA, STORIES_QWEN3_MOE, SourceArgs,
    Transfers,
};
pub use table::Table;

/// The README's program is compiled and run with the documentation tests.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
pub struct Readme;
