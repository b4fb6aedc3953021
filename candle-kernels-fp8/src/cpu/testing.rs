//! What the tests of portable kernels share.

use super::element::Element;
use super::isa::InstructionSet;

/// Numbers that look random and are the same every time.
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// Uniform in `-range..range`.
    pub(super) fn float(&mut self, range: f32) -> f32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        let unit = (self.0 >> 40) as f32 / (1u64 << 24) as f32;
        (2.0 * unit - 1.0) * range
    }

    pub(super) fn values<T: Element>(&mut self, n: usize, range: f32) -> Vec<T> {
        (0..n).map(|_| T::from_f32(self.float(range))).collect()
    }
}

/// What a kernel gives on each instruction set; says which ones this processor lacks.
pub(super) fn for_all_sets<R>(mut run: impl FnMut(InstructionSet) -> R) -> Vec<R> {
    let mut results = Vec::new();
    for (name, set) in InstructionSet::known() {
        match set {
            Some(set) => results.push(run(set)),
            None => println!("skipped: this processor has no {name}"),
        }
    }
    results
}

/// Panics unless all results have the same bits; one NaN is as good as another.
pub(super) fn same_bits<T: Element>(results: &[Vec<T>]) {
    for other in &results[1..] {
        assert_eq!(results[0].len(), other.len());
        for (i, (a, b)) in results[0].iter().zip(other).enumerate() {
            let (a, b) = (a.to_f32(), b.to_f32());
            let same = a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan();
            assert!(same, "element {i}: {a:e} and {b:e}");
        }
    }
}
