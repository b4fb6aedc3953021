//! The sources of the kernels.

/// Kernels that are compiled together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs)] // Each has the name of what it computes.
pub enum Library {
    Cast,
    Dequantize,
    FakeQuantize,
    Pad,
    Quantize,
    RmsNorm,
    ScaledMmGemv,
    ScaledMmTile,
    SiluMul,
}

/// Devices compile one text, not files that include each other.
macro_rules! source {
    ($($file:literal)*) => {
        concat!(include_str!("kernels/e4m3.h"), $("\n", include_str!(concat!("kernels/", $file))),*)
    };
}

impl Library {
    /// All.
    pub const ALL: [Self; 9] = [
        Self::Cast,
        Self::Dequantize,
        Self::FakeQuantize,
        Self::Pad,
        Self::Quantize,
        Self::RmsNorm,
        Self::ScaledMmGemv,
        Self::ScaledMmTile,
        Self::SiluMul,
    ];

    /// In the Metal Shading Language. To be compiled without fast math: results are those of the CPU, bit by bit, only
    /// where divisions are rounded correctly and NaN is kept.
    pub fn source(self) -> &'static str {
        match self {
            Self::Cast => source!("cast.metal"),
            Self::Dequantize => source!("dequantize.metal"),
            Self::FakeQuantize => source!("fake_quantize.metal"),
            Self::Pad => source!("pad.metal"),
            Self::Quantize => source!("rows.h" "quantize.metal"),
            Self::RmsNorm => source!("rows.h" "rms_norm.metal"),
            Self::ScaledMmGemv => source!("scaled_mm.h" "scaled_mm_gemv.metal"),
            Self::ScaledMmTile => source!("scaled_mm.h" "scaled_mm_tile.metal"),
            Self::SiluMul => source!("rows.h" "silu_mul.metal"),
        }
    }
}
