//! The case table that the kernels of every instruction set and the ops of every device run, and the data of a case.

use super::{Float, Layout, Mode, Product, scaled_mm};

/// One `scaled_mm`.
#[derive(Debug, Clone)]
pub(crate) struct Case {
    /// Dimensions of the activations before K.
    pub(crate) lead: Vec<usize>,
    pub(crate) n: usize,
    pub(crate) k: usize,
    pub(crate) layout: Layout,
    pub(crate) mode: Mode,
    /// Of activations and result.
    pub(crate) float: Float,
    pub(crate) bias: bool,
    pub(crate) seed: u64,
}

/// The activations' dimensions before K, N, K, ... as in [`Case`].
type Row<'a> = (&'a [usize], usize, usize, Layout, Mode, Float, bool);

/// Sizes are odd, not square, and cross what kernels like to tile by: 4, 16, 128, 1024. Blocks are at least 3 × 2, the
/// last ones short.
pub(crate) fn table() -> Vec<Case> {
    use Float::{Bf16, F16, F32};
    use Layout::{Block, Channel, Tensor};
    use Mode::{Full, Group, Static, Token};
    #[rustfmt::skip]
    let rows: &[Row] = &[
        // lead,    N,   K,    weight scales,     activations,      dtype, bias
        (&[1],      33,  70,   Channel,           Token,            F32,  false),
        (&[1],      64,  128,  Channel,           Token,            Bf16, true),
        (&[5],      33,  70,   Channel,           Token,            F32,  true),
        (&[17],     130, 2100, Channel,           Token,            Bf16, false),
        (&[2, 3],   40,  96,   Channel,           Token,            F16,  true),
        (&[],       40,  96,   Channel,           Token,            F32,  false),
        (&[2, 1, 4], 7,  19,   Channel,           Token,            F32,  false),
        (&[3],      1,   1,    Channel,           Token,            F32,  true),
        (&[6],      50,  77,   Tensor,            Static(0.0078125), Bf16, false),
        (&[6],      50,  77,   Tensor,            Static(0.011),    F32,  true),
        (&[1],      50,  77,   Tensor,            Static(0.011),    F32,  true),
        (&[6],      50,  77,   Channel,           Static(0.0031),   F16,  false),
        (&[6],      50,  77,   Tensor,            Token,            F32,  false),
        (&[6],      50,  77,   Tensor,            Mode::Tensor,     F32,  false),
        (&[6],      50,  77,   Channel,           Mode::Tensor,     Bf16, true),
        (&[1],      300, 260,  Block(128, 128),   Group(128),       F32,  false),
        (&[7],      300, 260,  Block(128, 128),   Group(128),       F32,  true),
        (&[7],      300, 260,  Block(128, 128),   Group(128),       Bf16, false),
        (&[7],      300, 260,  Block(128, 128),   Token,            F32,  false),
        (&[7],      300, 260,  Block(128, 128),   Mode::Tensor,     F32,  false),
        (&[3],      37,  53,   Block(16, 24),     Group(10),        F32,  false),
        (&[3],      37,  53,   Block(16, 24),     Group(64),        F32,  true),
        (&[3],      37,  53,   Channel,           Group(7),         F32,  false),
        (&[4],      37,  53,   Tensor,            Full,             F32,  true),
        (&[4],      37,  53,   Channel,           Full,             F16,  false),
        (&[1],      37,  53,   Channel,           Full,             F32,  true),
        (&[4],      300, 260,  Block(128, 128),   Full,             Bf16, false),
        (&[2],      70,  4100, Channel,           Full,             F32,  false),
        (&[1],      70,  4100, Block(32, 1030),   Group(1000),      F32,  true),
        (&[9],      70,  4100, Block(32, 1030),   Group(1000),      F32,  true),
        (&[0],      33,  70,   Channel,           Token,            F32,  true),
        (&[2, 0],   33,  70,   Block(16, 24),     Group(16),        Bf16, false),
        (&[0],      33,  70,   Tensor,            Mode::Tensor,     F32,  false),
    ];
    rows.iter()
        .zip(1..)
        .map(|(&(lead, n, k, layout, mode, float, bias), seed)| Case {
            lead: lead.to_vec(),
            n,
            k,
            layout,
            mode,
            float,
            bias,
            seed,
        })
        .collect()
}

/// A case's numbers.
#[derive(Clone)]
pub(crate) struct Data {
    /// `[m, k]`, values of the case's float type; each row of another magnitude.
    pub(crate) x: Vec<f32>,
    /// Finite codes `[n, k]`, each as likely as the others.
    pub(crate) weight: Vec<u8>,
    /// Spanning 2^8.
    pub(crate) scales: Vec<f32>,
    /// `[n]`, values of the case's float type.
    pub(crate) bias: Vec<f32>,
}

/// Numbers that are the same everywhere.
pub(crate) struct Random(pub u64);

impl Random {
    pub(crate) fn bits(&mut self) -> u32 {
        self.0 = self
            .0
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (self.0 >> 32) as u32
    }

    /// Between -1 and 1.
    pub(crate) fn signed(&mut self) -> f32 {
        (self.bits() as f32 / 2f32.powi(31)) - 1.0
    }

    pub(crate) fn finite_code(&mut self) -> u8 {
        loop {
            let code = self.bits() as u8;
            if code & 0x7f != 0x7f {
                return code;
            }
        }
    }
}

impl Case {
    pub(crate) fn m(&self) -> usize {
        self.lead.iter().product()
    }

    pub(crate) fn data(&self) -> Data {
        let (m, n, k) = (self.m(), self.n, self.k);
        let mut random = Random(self.seed);
        let round = |value: f32| self.float.round(f64::from(value)) as f32;
        let x = (0..m * k)
            .map(|i| {
                // Cubed: a few large values, many small ones, as activations are.
                let value = random.signed().powi(3) * 2f32.powi((i / k % 5) as i32 - 2);
                // One row of zeros, when there are several.
                round(if m > 3 && i / k == 2 { 0.0 } else { value })
            })
            .collect();
        let weight = (0..n * k).map(|_| random.finite_code()).collect();
        let (rows, cols) = self.layout.grid(n, k);
        let scales = (0..rows * cols)
            .map(|i| 2f32.powi(-4 - ((i * 5) % 9) as i32) * (1.5 + random.signed() / 2.0))
            .collect();
        let bias = (0..n).map(|_| round(random.signed() * 8.0)).collect();
        Data {
            x,
            weight,
            scales,
            bias,
        }
    }

    /// What the oracle says, for other scales or another mode than the case's too.
    pub(crate) fn expected(&self, data: &Data) -> Product {
        let wide = |values: &[f32]| values.iter().map(|&v| f64::from(v)).collect::<Vec<_>>();
        let bias = wide(&data.bias);
        scaled_mm(
            &wide(&data.x),
            &data.weight,
            self.k,
            &data.scales,
            self.layout,
            self.mode,
            self.bias.then_some(&bias[..]),
        )
    }
}
