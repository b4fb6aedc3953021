//! Numbers as quantized models hold them: on zeros or uniform codes a GPU draws other power, and runs at another clock.

use candle_kernels_fp8::e4m3;
use half::bf16;

pub(crate) struct Random {
    state: u64,
    codes: Vec<u8>,
}

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        let mut random = Self {
            state: seed,
            codes: Vec::new(),
        };
        // Normal values whose largest, of some thousands, meets 448.
        random.codes = (0..1 << 16)
            .map(|_| e4m3::encode(random.normal() * (448.0 / 4.0)))
            .collect();
        random
    }

    pub(crate) fn bits(&mut self) -> u32 {
        self.state = self
            .state
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (self.state >> 32) as u32
    }

    /// From 0 to 1.
    pub(crate) fn unit(&mut self) -> f32 {
        self.bits() as f32 / 2f32.powi(32)
    }

    pub(crate) fn normal(&mut self) -> f32 {
        (0..12).map(|_| self.unit()).sum::<f32>() - 6.0
    }

    pub(crate) fn codes(&mut self, count: usize) -> Vec<u8> {
        (0..count)
            .map(|_| {
                let bits = self.bits() as usize;
                self.codes[bits >> 16]
            })
            .collect()
    }

    /// Normal values.
    pub(crate) fn values(&mut self, count: usize) -> Vec<bf16> {
        let some: Vec<bf16> = (0..1 << 16)
            .map(|_| bf16::from_f32(self.normal()))
            .collect();
        (0..count)
            .map(|_| some[self.bits() as usize >> 16])
            .collect()
    }

    pub(crate) fn scales(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| 0.01 + 0.01 * self.unit()).collect()
    }
}
