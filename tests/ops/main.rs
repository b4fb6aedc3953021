//! The FP8 ops against the oracle: exact where exactness is possible, else within a derived bound.

#[path = "../oracle/mod.rs"]
mod oracle;

mod autograd;
mod cases;
mod cat_rows;
mod codes;
mod dequantize;
mod devices;
#[cfg(feature = "cuda")]
mod launched_tokens;
#[cfg(feature = "cuda")]
mod launches;
mod produced;
mod properties;
mod quantize;
mod quantize_weight;
mod refusals;
mod scaled_mm;
mod shapes;
mod token;
