//! The CPU kernels alone: `cargo bench`, or `cargo bench -- scaled_mm` for some of them.
//!
//! Criterion prints bytes a second where memory is the limit, and elements a second where arithmetic is: an element is a
//! floating-point operation of a product, or a value that a function makes. Every kernel's result is compared with the
//! oracle before it is timed.

#[path = "../../tests/oracle/mod.rs"]
mod oracle;

mod matmul;
mod naive;
mod token;

use std::time::Duration;

use criterion::Criterion;

fn main() {
    // Short: what is looked for are differences of several percent.
    let mut criterion = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(800))
        .configure_from_args();
    matmul::scaled_mm(&mut criterion);
    matmul::dense_mm(&mut criterion);
    matmul::quantize(&mut criterion);
    token::attention(&mut criterion);
    token::rms_norm(&mut criterion);
    token::silu_mul(&mut criterion);
    criterion.final_summary();
}
