//! What the machine itself can do, measured beside the model: the ceilings of its numbers.

use candle_kernels_fp8::cpu::{InstructionSet, probe};
use serde::Serialize;

/// Bytes that a streaming read goes through: more than any cache holds.
pub(crate) const READ_BYTES: u64 = 512 << 20;
/// Bytes that are read between two steps of a run: more than most caches hold.
pub(crate) const PAUSE_BYTES: u64 = 128 << 20;
/// The best of so many reads counts.
const READS: usize = 8;
/// For so long registers are multiplied.
const MULTIPLY_SECONDS: f64 = 0.25;

/// A processor's ceilings, in plain loops on the threads that the model uses.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(crate) struct Machine {
    /// Of the pool.
    pub(crate) threads: usize,
    /// The one that the kernels chose.
    pub(crate) instruction_set: &'static str,
    /// A streaming read, in 10⁹ bytes a second.
    pub(crate) read_gb_s: f64,
    /// The matmuls' multiply-add on registers, in 10⁹ floating-point operations a second.
    pub(crate) multiply_gflop_s: f64,
}

/// Reads between the steps of a run: a machine that others share is not as fast in one second as in the next.
#[derive(Debug)]
pub(crate) struct Reader {
    buffer: Vec<u64>,
    bytes: f64,
    seconds: f64,
}

impl Reader {
    /// Has read nothing yet.
    pub(crate) fn new() -> Self {
        Self {
            buffer: vec![1; PAUSE_BYTES as usize / 8],
            bytes: 0.,
            seconds: 0.,
        }
    }

    /// Goes through [`PAUSE_BYTES`].
    pub(crate) fn read(&mut self) {
        let bytes = PAUSE_BYTES as f64;
        self.seconds += bytes / probe::read_bandwidth(&self.buffer);
        self.bytes += bytes;
    }

    /// What was read, in 10⁹ bytes a second.
    pub(crate) fn gb_s(&self) -> f64 {
        self.bytes / self.seconds / 1e9
    }
}

impl Machine {
    /// Takes about a second, and [`READ_BYTES`] meanwhile.
    pub(crate) fn measure() -> Self {
        let buffer = vec![1u64; READ_BYTES as usize / 8];
        let reads = (0..READS).map(|_| probe::read_bandwidth(&buffer));
        Self {
            threads: rayon::current_num_threads(),
            instruction_set: InstructionSet::best().name(),
            read_gb_s: reads.fold(0., f64::max) / 1e9,
            multiply_gflop_s: probe::multiply_rate(MULTIPLY_SECONDS) / 1e9,
        }
    }

    /// The larger of two measurements: a machine that others share was slower in one of them, never faster than it is.
    pub(crate) fn larger(self, other: Self) -> Self {
        Self {
            read_gb_s: self.read_gb_s.max(other.read_gb_s),
            multiply_gflop_s: self.multiply_gflop_s.max(other.multiply_gflop_s),
            ..self
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_two_measurements_each_number_is_the_larger() {
        let machine = |read_gb_s, multiply_gflop_s| Machine {
            threads: 2,
            instruction_set: "generic",
            read_gb_s,
            multiply_gflop_s,
        };
        let larger = machine(20., 300.).larger(machine(30., 200.));
        assert_eq!(larger, machine(30., 300.));
    }
}
