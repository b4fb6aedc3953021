//! Instruction sets: what each has to provide, and the choice among them.

#[cfg(target_arch = "aarch64")]
use super::aarch64::Neon;
use super::generic::Generic;
#[cfg(target_arch = "x86_64")]
use super::x86_64::{Avx2, Avx512};
use half::bf16;

/// The inner loops of one instruction set. A value of an implementing type is the proof that the processor has it.
///
/// Operands are what the multiply-add takes: bf16 bits where the processor multiplies those, else f32.
///
/// # Safety
/// The functions write all of the memory that they are given for results.
pub(crate) trait Isa: Copy + Send + Sync + 'static {
    /// Element of an operand.
    type Operand: Operand;
    /// Neighbours in K that one lane of the multiply-add takes together.
    const DEPTH: usize;
    /// Rows of activations of the largest [`tile`](Self::tile).
    const ROWS: usize;
    /// Output features of a [`tile`](Self::tile): a whole number of vectors.
    const FEATURES: usize;
    /// What the operand runs of [`Strip`] are padded to.
    const CHUNK: usize;

    /// Runs a job compiled for this instruction set: portable loops become its vector instructions.
    fn vectorize<J: Job>(self, job: J) -> J::Output;

    /// Dot products of E4M3 rows with M rows of activations.
    fn dot_e4m3<const M: usize>(self, strip: &Strip<'_, u8, Self::Operand>, out: &mut [f32]);

    /// Dot products of BF16 rows with M rows of activations.
    fn dot_bf16<const M: usize>(self, strip: &Strip<'_, bf16, Self::Operand>, out: &mut [f32]);

    /// Decodes a block of E4M3 codes into a panel.
    fn pack_e4m3(self, block: &Block<'_, u8>, panel: &mut [Self::Operand]);

    /// Rearranges a block of BF16 weights into a panel.
    fn pack_bf16(self, block: &Block<'_, bf16>, panel: &mut [Self::Operand]);

    /// `sums[r][f] = Σ a[.][r] · panel[.][f]` for `rows ≤ ROWS` rows of activations and all features of a panel; with
    /// `add`, that is added to the sums instead.
    ///
    /// `a` is `[groups][rows][DEPTH]`, `panel` `[groups][FEATURES][DEPTH]`, `sums` `[ROWS][FEATURES]`, of which the
    /// first `rows` are written.
    fn tile(
        self,
        rows: usize,
        a: &[Self::Operand],
        panel: &[Self::Operand],
        add: bool,
        sums: &mut [f32],
    );

    /// As [`tile`](Self::tile) with f32 operands (`DEPTH` 1), never adding.
    fn tile_f32(self, rows: usize, a: &[f32], panel: &[f32], sums: &mut [f32]);

    /// Asks for the cache line of an address, which need not be valid.
    fn prefetch<T>(self, address: *const T);

    /// Floating-point operations of `rounds` rounds of the multiply-add of [`tile`](Self::tile) on registers alone.
    fn multiply(self, rounds: usize) -> u64;
}

/// A loop written in portable Rust. Implementations mark `run` `#[inline(always)]`, so that it is compiled anew for
/// each instruction set.
pub(crate) trait Job {
    /// What it gives.
    type Output;
    /// Runs it.
    fn run(self) -> Self::Output;
}

/// Rows of a weight, or a stretch of K of each, to be multiplied with M rows of activations.
#[derive(Clone, Copy)]
pub(crate) struct Strip<'a, W, X> {
    /// From the first row's first element to the last row's last.
    pub(crate) weights: &'a [W],
    /// Elements from one row to the next.
    pub(crate) pitch: usize,
    /// Elements of each row, at most `pitch`.
    pub(crate) k: usize,
    /// M rows of `stride` operands: the runs of K one after the other, each padded with zeros to whole `CHUNK`s.
    pub(crate) x: &'a [X],
    /// Operands in a row of `x`.
    pub(crate) stride: usize,
    /// Lengths of the runs of K on which no scale changes.
    pub(crate) runs: &'a [usize],
    /// `[rows][runs][M]`: what the dot product over a run is multiplied by.
    pub(crate) scales: &'a [f32],
}

impl<W, X> Strip<'_, W, X> {
    /// Number of weight rows; panics unless everything has the length that `m` activation rows and `chunk` ask for, and
    /// `out` is `[rows][m]`.
    pub(crate) fn rows(&self, m: usize, chunk: usize, out: &[f32]) -> usize {
        let rows = self.weights.len().div_ceil(self.pitch);
        let padded: usize = self
            .runs
            .iter()
            .map(|run| run.next_multiple_of(chunk))
            .sum();
        assert!(rows > 0 && self.weights.len() == (rows - 1) * self.pitch + self.k);
        assert!(self.k <= self.pitch);
        assert_eq!(self.runs.iter().sum::<usize>(), self.k);
        assert!(self.stride >= padded && self.x.len() >= (m - 1) * self.stride + padded);
        assert_eq!(self.scales.len(), rows * self.runs.len() * m);
        assert_eq!(out.len(), rows * m);
        rows
    }
}

/// A block of a weight `[n, k]` that becomes a panel: `[ceil(len / DEPTH)][FEATURES][DEPTH]` operands, zeros where the
/// block has no weights.
#[derive(Clone, Copy)]
pub(crate) struct Block<'a, W> {
    /// From the block's first element on.
    pub(crate) weights: &'a [W],
    /// Elements from one row of the weight to the next.
    pub(crate) stride: usize,
    /// Output features, 1 to `FEATURES`.
    pub(crate) features: usize,
    /// Elements of each row that belong to the block, at least 1.
    pub(crate) len: usize,
}

impl<W> Block<'_, W> {
    /// Asks for all of the block.
    #[inline(always)]
    pub(crate) fn prefetch<I: Isa>(&self, isa: I) {
        for feature in 0..self.features {
            let row = self.weights.as_ptr().wrapping_add(feature * self.stride);
            // Rows need not start where a line does: the last one is asked for apart.
            for at in (0..self.len).step_by(64 / size_of::<W>()) {
                isa.prefetch(row.wrapping_add(at));
            }
            isa.prefetch(row.wrapping_add(self.len - 1));
        }
    }

    /// Panics unless the block lies in its weight and fills the panel.
    pub(crate) fn check<O>(&self, features: usize, depth: usize, panel: &[O]) {
        assert!((1..=features).contains(&self.features) && self.len > 0);
        assert!(self.weights.len() >= (self.features - 1) * self.stride + self.len);
        assert_eq!(panel.len(), self.len.next_multiple_of(depth) * features);
    }
}

/// An element of an operand.
pub(crate) trait Operand: Copy + Default + Send + Sync + 'static {
    /// How many rows of operands it takes to hold a row of values exactly: their sum is the row.
    fn planes(values: &[f32]) -> usize;
    /// Plane `plane` of a row of values.
    fn split(values: &[f32], plane: usize, operands: &mut [Self]);
    /// A row of E4M3 codes; always one plane.
    fn decode(codes: &[u8], operands: &mut [Self]);
}

impl Operand for f32 {
    #[inline(always)]
    fn planes(_: &[f32]) -> usize {
        1
    }

    #[inline(always)]
    fn split(values: &[f32], _: usize, operands: &mut [f32]) {
        operands.copy_from_slice(values);
    }

    #[inline(always)]
    fn decode(codes: &[u8], operands: &mut [f32]) {
        for (operand, &code) in operands.iter_mut().zip(codes) {
            *operand = crate::e4m3::widen(code);
        }
    }
}

/// bf16 bits. A value of 24 significant bits is the sum of three bf16, each with the next eight of them.
impl Operand for u16 {
    #[inline(always)]
    fn planes(values: &[f32]) -> usize {
        let bits = values.iter().fold(0, |bits, value| bits | value.to_bits());
        // What f16 and bf16 values leave empty is empty here.
        match bits {
            bits if bits & 0xffff == 0 => 1,
            bits if bits & 0xff == 0 => 2,
            _ => 3,
        }
    }

    #[inline(always)]
    fn split(values: &[f32], plane: usize, operands: &mut [u16]) {
        let top = |value: f32| f32::from_bits(value.to_bits() & 0xffff_0000);
        for (operand, &value) in operands.iter_mut().zip(values) {
            let special = !value.is_finite();
            let mut rest = value;
            for _ in 0..plane {
                rest -= top(rest);
            }
            // Infinity and NaN are in the first plane as a whole; a NaN's bits may all be in the part that is cut off.
            let quiet = if value.is_nan() { 0x40 } else { 0 };
            let rest = if special && plane > 0 { 0.0 } else { rest };
            let quiet = if plane > 0 { 0 } else { quiet };
            *operand = (rest.to_bits() >> 16) as u16 | quiet;
        }
    }

    #[inline(always)]
    fn decode(codes: &[u8], operands: &mut [u16]) {
        for (operand, &code) in operands.iter_mut().zip(codes) {
            *operand = (crate::e4m3::widen(code).to_bits() >> 16) as u16;
        }
    }
}

/// An instruction set that this processor has.
#[derive(Debug, Clone, Copy)]
pub enum InstructionSet {
    /// Portable Rust: whatever the compiler's target has.
    Generic(Generic),
    /// x86-64 with AVX2, FMA and F16C.
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
    /// x86-64 with AVX-512 F, BW, VL, VBMI and BF16.
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512),
    /// 64-bit ARM with NEON.
    #[cfg(target_arch = "aarch64")]
    Neon(Neon),
}

impl InstructionSet {
    /// The fastest one.
    pub fn best() -> Self {
        let known = Self::known();
        let best = known.into_iter().rev().find_map(|(_, set)| set);
        best.unwrap_or(Self::Generic(Generic))
    }

    /// All that this build knows, the fastest last, each with its name; `None` where the processor lacks it.
    pub fn known() -> Vec<(&'static str, Option<Self>)> {
        vec![
            ("generic", Some(Self::Generic(Generic))),
            #[cfg(target_arch = "x86_64")]
            ("avx2", Avx2::new().map(Self::Avx2)),
            #[cfg(target_arch = "x86_64")]
            ("avx512", Avx512::new().map(Self::Avx512)),
            #[cfg(target_arch = "aarch64")]
            ("neon", Neon::new().map(Self::Neon)),
        ]
    }

    /// Its name: `generic`, `avx2`, `avx512` or `neon`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Generic(_) => "generic",
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(_) => "avx2",
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(_) => "avx512",
            #[cfg(target_arch = "aarch64")]
            Self::Neon(_) => "neon",
        }
    }
}

/// Calls a generic function with the value that proves the instruction set: `on!(set, isa => kernel(isa, args))`.
macro_rules! on {
    ($set:expr, $isa:ident => $call:expr) => {
        match $set {
            $crate::cpu::isa::InstructionSet::Generic($isa) => $call,
            #[cfg(target_arch = "x86_64")]
            $crate::cpu::isa::InstructionSet::Avx2($isa) => $call,
            #[cfg(target_arch = "x86_64")]
            $crate::cpu::isa::InstructionSet::Avx512($isa) => $call,
            #[cfg(target_arch = "aarch64")]
            $crate::cpu::isa::InstructionSet::Neon($isa) => $call,
        }
    };
}
pub(crate) use on;
