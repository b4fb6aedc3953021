//! Which scale belongs to which weight.

/// How the scales of a weight `[N, K]` are laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ScaleLayout {
    /// One scale for the whole weight: `[1]`.
    Tensor,
    /// One scale for each output feature (row of the weight): `[N, 1]`.
    Channel,
    /// One scale for each block of `rows × cols` weights: `[ceil(N / rows), ceil(K / cols)]`. The last block of a row
    /// or column may be short.
    Block {
        /// Output features in a block; not 0.
        rows: usize,
        /// Input features in a block; not 0.
        cols: usize,
    },
}

impl ScaleLayout {
    /// The shape that the scales of a weight `[n, k]` have.
    pub fn shape(self, n: usize, k: usize) -> Vec<usize> {
        match self {
            Self::Tensor => vec![1],
            Self::Channel => vec![n, 1],
            Self::Block { rows, cols } => vec![n.div_ceil(rows), k.div_ceil(cols)],
        }
    }

    /// The number of scales that a weight `[n, k]` has.
    pub fn len(self, n: usize, k: usize) -> usize {
        self.shape(n, k).iter().product()
    }

    /// The number of neighbouring weights of a row that share a scale (the last run of the row may be shorter).
    pub fn run(self, k: usize) -> usize {
        match self {
            Self::Tensor | Self::Channel => k,
            Self::Block { cols, .. } => cols,
        }
    }

    /// The scales of one row of a weight `[n, k]`.
    ///
    /// # Panics
    /// If `scales` is shorter than `len(n, k)` asks for this row.
    pub fn row(self, scales: &[f32], row: usize, k: usize) -> RowScales<'_> {
        let scales = match self {
            Self::Tensor => &scales[..1],
            Self::Channel => &scales[row..row + 1],
            Self::Block { rows, cols } => {
                let across = k.div_ceil(cols);
                &scales[row / rows * across..][..across]
            }
        };
        RowScales {
            scales,
            run: self.run(k),
        }
    }
}

/// The scales of one row of a weight.
#[derive(Debug, Clone, Copy)]
pub struct RowScales<'a> {
    /// From left to right, one for each run.
    pub scales: &'a [f32],
    /// The number of weights that one scale covers; the last run may be shorter.
    pub run: usize,
}
