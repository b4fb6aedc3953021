//! What is timed.

/// Shapes of linears, output × input features.
pub(crate) const SHAPES: [(&str, (usize, usize)); 6] = [
    ("qkv-8b", (6144, 4096)),
    ("o-8b", (4096, 4096)),
    ("gate-up-8b", (28672, 4096)),
    ("down-8b", (4096, 14336)),
    ("k-30b-a3b", (1024, 2048)),
    ("q-30b-a3b", (2048, 4096)),
];

/// How scales lie, and what the activations are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Scheme {
    /// A scale for each token and each output feature.
    Row,
    /// A scale for each 128 × 128 weights and each 128 activations of a token.
    Block,
    /// BF16 activations, a scale for each output feature.
    W8a16,
}

/// Where the codes of a weight are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Layout {
    /// Row-major.
    Rows,
    /// In the order that products read them.
    Panels,
}

/// Output × input features of a name in [`SHAPES`], or as `N×K` says.
pub(crate) fn shape(text: &str) -> Result<(usize, usize), String> {
    if let Some((_, shape)) = SHAPES.iter().find(|(name, _)| *name == text) {
        return Ok(*shape);
    }
    text.split_once(['x', '×'])
        .and_then(|(n, k)| Some((n.parse().ok()?, k.parse().ok()?)))
        .ok_or_else(|| format!("{text}: neither a shape of --list nor N×K, such as 6144x4096"))
}
