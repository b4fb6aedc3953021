//! The Metal kernels without the hardware.
//!
//! The sources that a device would compile are compiled here as C++, behind a small header that stands for the shading
//! language (`emulator/`), and run on the host: each thread of a group in turn, in a shuffled order, changing places
//! where threads wait for each other. Every kernel goes over the case table and every remainder of what it tiles by,
//! launched by the code that launches it on a device.
//!
//! What passes here is shown to compute the right numbers, to write all that it should and nothing else (memory is full
//! of NaN before, with pages around that nothing may touch), not to depend on the order of threads between barriers,
//! not to need subnormal floats, and to keep pointers in their address spaces (of which clang knows). What is not
//! shown: that Apple's compiler takes the sources, that the matrix units add as exactly as f32 does, that tensors reach
//! the kernels as intended, and how fast anything is.
//!
//! All of this needs Linux and a C++ compiler with half precision, such as GCC 12, and the address spaces clang 14.
//! Without them a test says SKIPPED, and passes.

use std::io::Write as _;

mod address_spaces;
mod cast;
mod dequantize;
mod emulator;
mod ops;
mod quantize;
mod rms_norm;
mod rows;
mod scaled_mm;
mod silu_mul;
mod values;

/// Says what is not tested. Past what captures the output of tests; if it cannot be said, the tests are as good.
fn skip(why: &str) {
    let _ = writeln!(std::io::stderr(), "SKIPPED: {why}");
}

#[path = "../../../tests/oracle/mod.rs"]
mod oracle;
