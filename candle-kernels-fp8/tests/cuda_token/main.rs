//! Everything on the GPU that is not a matrix product: against the same functions on the CPU, which must give the same
//! bits where the arithmetic is defined to the bit, and against the oracle.
#![cfg(feature = "cuda")]

mod argmax;
mod attention;
mod cast;
mod chain;
mod decode;
mod dense_mm;
mod dequantize;
mod embed;
mod pack;
mod quantize;
mod rms_norm;
mod rope_append;
mod rows;
mod silu_mul;
#[path = "../support_cuda/mod.rs"]
mod support_cuda;

#[path = "../../../tests/oracle/mod.rs"]
mod oracle;

/// Numbers of elements: every remainder of what a thread, a warp and a tile handle at once, and the sizes of models.
fn lengths() -> Vec<usize> {
    let large = [1000, 4096, 4100, 14336, 16384, 20000];
    (1..=40).chain(120..=136).chain(large).collect()
}

/// Numbers of rows for a length: many where it is one of a few.
fn row_counts(k: usize) -> Vec<usize> {
    match k {
        8 | 40 | 128 | 1000 | 4096 => vec![1, 2, 3, 17, 300],
        14336 | 20000 => vec![1, 3, 60],
        _ => vec![1, 2, 3, 17],
    }
}
