//! The ops on every OpenCL device that there is, with all of its kernels and kinds of memory: codes and everything
//! elementwise bit by bit against the CPU, products against the oracle.

#[path = "../../../../tests/oracle/mod.rs"]
mod oracle;

mod devices;
mod failures;
mod mlp;
mod quantize;
mod scaled_mm;
