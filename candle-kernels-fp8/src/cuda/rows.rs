//! Rows of activations: where kernels write them, and how threads are shared out among them.

use super::launch::Launch;
use super::{Address, Float, Gpu};

/// Where rows `[m, k]` go, and as what.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Output {
    /// As values of the activations' type.
    Values {
        /// Receives the values.
        values: Address,
        /// Elements from one row to the next, at least `k`. What lies between rows is left alone.
        stride: usize,
    },
    /// As E4M3.
    Codes {
        /// Receives the codes.
        codes: Address,
        /// Bytes from one row to the next, at least `k`. What lies between rows, and behind the last one, becomes zero.
        stride: usize,
        /// The scales that values are divided by.
        quantization: Quantization,
    },
}

/// How rows `[m, k]` are quantized: scale = amax / 448 and code = `encode(x / scale)`, as on the CPU
/// ([`quantize_groups`](crate::cpu::quantize_groups) says what becomes of zeros, NaN and infinities).
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Quantization {
    /// With a scale for each row.
    Token {
        /// Receives `[m]`, F32.
        scales: Address,
    },
    /// With a scale for each `group` neighbours of a row.
    Group {
        /// Not 0. Powers of two from 8 to 256 are the fast ones.
        group: usize,
        /// Receives `[m, ceil(k / group)]`, F32.
        scales: Address,
    },
    /// With a scale that is given.
    Static {
        /// Positive and finite.
        scale: f32,
    },
}

/// Device twin: `Mode` in `kernels/rows.cuh`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Mode {
    Values = 0,
    Token = 1,
    Group = 2,
    Static = 3,
    Tensor = 4,
}

/// Elements that a thread handles at once.
const PIECE: usize = 8;
/// Threads of a block that share a row, at most, where each has one piece, and where each has up to four.
const MOST_OF_ONE: usize = 1024;
const MOST_OF_FOUR: usize = 512;
/// Blocks that share a row and exchange values, at most: what every device that has clusters can schedule.
const MOST_PARTS: usize = 8;
/// Threads that a multiprocessor runs at a time.
const RESIDENT: usize = 2048;
/// Threads of a block that has several rows.
const SEVERAL_ROWS: u32 = 256;

/// How a kernel's threads are shared out among rows. Device twin: `Shape` in `kernels/team.cuh`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub(super) struct Shape {
    threads: u32,
    shift: u32,
    cluster: u32,
}

/// Device twin: `Output` in `kernels/rows.cuh`, which says what the fields mean.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct Params {
    pub(super) to: Address,
    pub(super) scales: Address,
    pub(super) stride: u64,
    pub(super) m: u32,
    pub(super) k: u32,
    pub(super) shape: Shape,
    pub(super) group: u32,
    pub(super) mode: Mode,
    pub(super) scale: f32,
}

/// Which of an operation's kernels runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Variant {
    /// A thread holds one piece of a row.
    One,
    /// A thread holds up to four.
    Four,
    /// Rows of any length and alignment, computed anew in each pass.
    Any,
}

/// A choice of a kernel and its launch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Choice {
    pub(super) variant: Variant,
    pub(super) shape: Shape,
    pub(super) blocks: u32,
    /// Of a block.
    pub(super) threads: u32,
}

impl Choice {
    /// For rows `[m, k]`. `aligned`: all rows start at multiples of what pieces are read and written by. `reduces`: the
    /// threads of a row wait for each other. `effort`: how long a piece takes to compute, 1 for one that is just
    /// quantized; rows are shared out among more blocks where it is larger.
    pub(super) fn new(
        gpu: Gpu,
        (m, k): (usize, usize),
        aligned: bool,
        reduces: bool,
        effort: usize,
    ) -> Self {
        let pieces = k / PIECE;
        let any = Self::whole_rows(Variant::Any, m, k.div_ceil(PIECE).min(MOST_OF_FOUR));
        if !aligned || !k.is_multiple_of(PIECE) {
            return any;
        }
        let processors = gpu.processors as usize;
        if m * pieces <= processors * RESIDENT {
            // All at once: the fewer pieces a thread has, the sooner it is done.
            let parts = if reduces {
                // Exchanging values among blocks takes as long as some hundred pieces in one.
                let wanted = (pieces * effort).div_ceil(768).next_power_of_two();
                let most = if has_clusters(gpu) {
                    MOST_PARTS.min(processors / m.max(1))
                } else {
                    1
                };
                // The largest power of two up to both.
                wanted.min((most + 1).next_power_of_two() / 2).max(1)
            } else {
                pieces.div_ceil(128).next_power_of_two()
            };
            if pieces.div_ceil(parts) <= MOST_OF_ONE {
                return Self::of_parts(Variant::One, m, pieces.div_ceil(parts), parts, reduces);
            }
        }
        let each = pieces.div_ceil(4);
        if each <= MOST_OF_FOUR {
            return Self::whole_rows(Variant::Four, m, each);
        }
        let parts = each.div_ceil(MOST_OF_FOUR).next_power_of_two();
        if !reduces || (parts <= MOST_PARTS && has_clusters(gpu)) {
            return Self::of_parts(Variant::Four, m, each.div_ceil(parts), parts, reduces);
        }
        any
    }

    /// How the kernel starts.
    pub(super) fn launch(&self, dependent: bool) -> Launch {
        Launch {
            grid: [self.blocks, 1, 1],
            threads: self.threads,
            shared: 0,
            cluster: self.shape.cluster,
            dependent,
        }
    }

    fn whole_rows(variant: Variant, m: usize, threads: usize) -> Self {
        Self::of_parts(variant, m, threads, 1, false)
    }

    fn of_parts(variant: Variant, m: usize, threads: usize, parts: usize, exchange: bool) -> Self {
        let threads = (threads.max(1) as u32).next_multiple_of(32);
        // Short rows share a block, where there are many.
        let several = threads == 32 && parts == 1 && variant != Variant::Any && m > 1024;
        let rows = if several { SEVERAL_ROWS / 32 } else { 1 };
        let blocks = m.div_ceil(rows as usize) * parts;
        Self {
            variant,
            shape: Shape {
                threads,
                shift: parts.trailing_zeros(),
                cluster: if exchange { parts as u32 } else { 1 },
            },
            blocks: i32::try_from(blocks).expect("as many rows as blocks can be launched") as u32,
            threads: threads * rows,
        }
    }
}

impl Output {
    /// Whether rows start where pieces can be written.
    pub(super) fn is_aligned(&self, float: Float) -> bool {
        match *self {
            Self::Values { values, stride } => rows_are_aligned(values, stride * float.size(), 16),
            Self::Codes {
                codes,
                stride,
                quantization,
            } => {
                let fast = match quantization {
                    Quantization::Group { group, .. } => {
                        group.is_power_of_two() && (PIECE..=32 * PIECE).contains(&group)
                    }
                    _ => true,
                };
                rows_are_aligned(codes, stride, PIECE) && fast
            }
        }
    }

    /// Whether a row is written only when all of it is known.
    pub(super) fn reduces(&self) -> bool {
        let Self::Codes { quantization, .. } = self else {
            return false;
        };
        matches!(quantization, Quantization::Token { .. })
    }

    /// As device code takes it.
    pub(super) fn params(&self, (m, k): (usize, usize), shape: Shape) -> Params {
        let (to, stride) = match *self {
            Self::Values { values, stride } => (values, stride),
            Self::Codes { codes, stride, .. } => (codes, stride),
        };
        assert!(k > 0, "rows are not empty");
        assert!(stride >= k, "rows of {k} fit their stride of {stride}");
        let mut params = Params {
            to,
            scales: 0,
            stride: stride as u64,
            m: size(m),
            k: size(k),
            shape,
            group: PIECE as u32,
            mode: Mode::Values,
            scale: 1.0,
        };
        if let Self::Codes { quantization, .. } = *self {
            match quantization {
                Quantization::Token { scales } => {
                    (params.mode, params.scales) = (Mode::Token, scales);
                }
                Quantization::Group { group, scales } => {
                    assert!(group > 0, "groups are not empty");
                    (params.mode, params.scales) = (Mode::Group, scales);
                    params.group = size(group);
                }
                Quantization::Static { scale } => {
                    assert!(
                        scale > 0.0 && scale.is_finite(),
                        "{scale} is a positive scale"
                    );
                    (params.mode, params.scale) = (Mode::Static, scale);
                }
            }
        }
        params
    }
}

/// Whether blocks can be scheduled together and write to each other's shared memory.
fn has_clusters(gpu: Gpu) -> bool {
    gpu.capability >= (9, 0)
}

/// A size as device code takes it: with room for the next multiple of anything.
pub(super) fn size(value: usize) -> u32 {
    i32::try_from(value).expect("sizes fit 31 bits") as u32
}

/// Whether rows of `stride` bytes start at multiples of `alignment`.
pub(super) fn rows_are_aligned(address: Address, stride: usize, alignment: usize) -> bool {
    address.is_multiple_of(alignment as u64) && stride.is_multiple_of(alignment)
}

/// The name of an operation's kernel for a type: `OP_TYPE_VARIANT`.
macro_rules! kernel_name {
    ($op:literal, $float:expr, $variant:expr) => {{
        use crate::cuda::{Float, rows::Variant};
        match ($float, $variant) {
            (Float::Bf16, Variant::One) => concat!($op, "_bf16_1"),
            (Float::Bf16, Variant::Four) => concat!($op, "_bf16_4"),
            (Float::Bf16, Variant::Any) => concat!($op, "_bf16_any"),
            (Float::F16, Variant::One) => concat!($op, "_f16_1"),
            (Float::F16, Variant::Four) => concat!($op, "_f16_4"),
            (Float::F16, Variant::Any) => concat!($op, "_f16_any"),
            (Float::F32, Variant::One) => concat!($op, "_f32_1"),
            (Float::F32, Variant::Four) => concat!($op, "_f32_4"),
            (Float::F32, Variant::Any) => concat!($op, "_f32_any"),
        }
    }};
}
pub(super) use kernel_name;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_is_covered_by_launches_that_devices_take() {
        let gpus = [((8, 9), 24), ((8, 9), 142), ((9, 0), 132), ((10, 0), 148)];
        let sizes = [
            1,
            7,
            8,
            40,
            128,
            1000,
            4096,
            8192,
            14336,
            20000,
            28672,
            65536,
            1 << 20,
        ];
        for (capability, processors) in gpus {
            let gpu = Gpu {
                capability,
                processors,
            };
            for m in [0, 1, 2, 3, 17, 66, 132, 300, 1025, 8192, 300_000] {
                for k in sizes {
                    for (reduces, effort) in [(false, 1), (true, 1), (false, 3), (true, 3)] {
                        let choice = Choice::new(gpu, (m, k), true, reduces, effort);
                        check(gpu, (m, k), reduces, choice);
                        let any = Choice::new(gpu, (m, k), false, reduces, effort);
                        assert_eq!(any.variant, Variant::Any);
                        check(gpu, (m, k), reduces, any);
                    }
                }
            }
        }
    }

    fn check(gpu: Gpu, (m, k): (usize, usize), reduces: bool, choice: Choice) {
        let what = format!("{gpu:?} [{m}, {k}], {reduces}: {choice:?}");
        let Shape {
            threads,
            shift,
            cluster,
        } = choice.shape;
        let parts = 1 << shift;
        let (most, held) = match choice.variant {
            Variant::One => (MOST_OF_ONE, 1),
            Variant::Four => (MOST_OF_FOUR, 4),
            Variant::Any => (MOST_OF_FOUR, usize::MAX / MOST_OF_ONE / PIECE),
        };
        assert!(
            threads.is_multiple_of(32) && choice.threads as usize <= most,
            "{what}"
        );
        // A block has one row, or a warp has.
        assert!(
            choice.threads == threads || threads == 32 && parts == 1,
            "{what}"
        );
        let rows = choice.threads / threads * choice.blocks / parts;
        assert!(rows as usize >= m, "{what}");
        assert!((threads * parts) as usize * held * PIECE >= k, "{what}");
        // Blocks of a row are together where they wait for each other, and devices schedule so many.
        assert!(
            cluster == 1 || cluster == parts && has_clusters(gpu),
            "{what}"
        );
        assert!(!reduces || cluster == parts, "{what}");
        assert!(
            cluster as usize <= MOST_PARTS && choice.blocks.is_multiple_of(parts),
            "{what}"
        );
        assert!(parts == 1 || choice.variant != Variant::Any, "{what}");
    }
}
