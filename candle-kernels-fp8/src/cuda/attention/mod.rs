//! Causal attention over a KV cache that is read in place, with grouped-query heads.
//!
//! Scores are never stored: keys and values pass in tiles, and each query keeps its largest score, the sum of its
//! exponentials and the weighted sum of its values ("online softmax"), all in f32; weights are rounded to the type of
//! the values before they meet them. The query heads that share keys are stacked, so that a key is read once for all of
//! them.
//!
//! Floor: a token reads T · Hkv · D keys and as many values, from memory (at T = 4096, 8 heads of 128: 16.8 MB, 4 µs at
//! 4.2 TB/s). A prompt of n tokens takes 2 · n² · Hq · D operations in the tensor cores.

mod any;
mod few_rows;
mod many_rows;
mod params;
mod sm90;

use cudarc::driver::CudaStream;

use super::error::Error;
use super::{Address, Float, Gpu};

/// Heads of keys or values, `[B, H, T, D]` with room between sequences and heads, as in a cache that is longer than
/// what it holds.
#[derive(Debug, Clone, Copy)]
pub struct Heads {
    /// Of the first element.
    pub values: Address,
    /// Elements from one sequence to the next.
    pub batch_stride: usize,
    /// Elements from one head to the next.
    pub head_stride: usize,
}

/// Positions of the first token that each sequence has in a call: as many positions before it are in the cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Positions {
    /// The same for all sequences.
    Known(usize),
    /// U32 `[B]` in device memory, read when the kernel runs, so that a captured graph serves one token after the
    /// other. What would not fit the cache counts as the last position that does.
    OnDevice(Address),
}

impl Positions {
    /// The address, or 0, and the number, or 0, as kernels take them. `capacity` positions are there, for `len` tokens.
    pub(super) fn params(self, len: usize, capacity: usize) -> (Address, u32) {
        assert!(capacity >= len, "{len} tokens fit a cache of {capacity}");
        match self {
            Self::OnDevice(address) => {
                assert!(address != 0, "positions are somewhere");
                (address, 0)
            }
            Self::Known(position) => {
                let most = capacity - len;
                assert!(
                    position <= most,
                    "{len} tokens from {position} on fit a cache of {capacity}"
                );
                (0, super::rows::size(position))
            }
        }
    }
}

/// Attention of L queries of each sequence to the keys up to them, their own included.
#[derive(Debug, Clone, Copy)]
pub struct Attention {
    /// Sequences B.
    pub batch: usize,
    /// Queries L of a sequence.
    pub queries: usize,
    /// Query heads Hq, a multiple of `kv_heads`.
    pub heads: usize,
    /// Heads Hkv of keys and values. Query head h reads head `h / (Hq / Hkv)`.
    pub kv_heads: usize,
    /// Elements D of a head, at most 512. 64 and 128 are the fast ones.
    pub dim: usize,
    /// Of the first query: query l sees the keys up to position + l.
    pub positions: Positions,
    /// Positions that a head of the cache has room for, at least L.
    pub capacity: usize,
    /// With a window of w, position p sees `p - w + 1 ..= p` only.
    pub window: Option<usize>,
    /// What scores are multiplied by; positive.
    pub scale: f32,
    /// Type of everything. BF16 and F16 are the fast ones.
    pub float: Float,
    /// `[B, L, Hq, D]`.
    pub q: Address,
    /// Elements from one token of `q` to the next.
    pub q_stride: usize,
    /// `[B, Hkv, capacity, D]`.
    pub keys: Heads,
    /// `[B, Hkv, capacity, D]`.
    pub values: Heads,
    /// Receives `[B, L, Hq, D]`.
    pub out: Address,
    /// Elements from one token of `out` to the next.
    pub out_stride: usize,
    /// [`attention_scratch`] bytes, a multiple of 16, all zero before the first use. Calls of one stream may share it.
    pub scratch: Address,
    /// Whether the launch may overlap the kernel before it: see [dependent launches](super#dependent-launches).
    pub dependent: bool,
}

/// A kernel for attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum AttentionKernel {
    /// Any dimension and type.
    Any,
    /// Few queries: keys are split among blocks.
    FewRows,
    /// Many queries, on the tensor cores of every card since Ada.
    ManyRows,
    /// Many queries at known positions, on Hopper.
    Sm90,
}

impl AttentionKernel {
    /// Every kernel.
    pub const ALL: [Self; 4] = [Self::Any, Self::FewRows, Self::ManyRows, Self::Sm90];

    /// The one that should be the fastest on a device.
    pub fn chosen(gpu: Gpu, args: &Attention) -> Self {
        let few = args.queries <= few_rows::MOST_QUERIES;
        let order = match few {
            true => [Self::FewRows, Self::Sm90, Self::ManyRows],
            false => [Self::Sm90, Self::ManyRows, Self::FewRows],
        };
        let mut serving = order.into_iter().filter(|kernel| kernel.serves(gpu, args));
        serving.next().unwrap_or(Self::Any)
    }

    /// Whether it computes this on a device.
    pub fn serves(self, gpu: Gpu, args: &Attention) -> bool {
        match self {
            Self::Any => args.dim <= any::MOST_DIMS,
            Self::FewRows | Self::ManyRows => args.in_tiles(),
            Self::Sm90 => gpu.is_hopper() && args.in_tiles() && sm90::serves(args),
        }
    }
}

impl std::fmt::Display for AttentionKernel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Any => "any",
            Self::FewRows => "few rows",
            Self::ManyRows => "many rows",
            Self::Sm90 => "sm90",
        })
    }
}

/// Bytes of [`Attention::scratch`], whatever the sizes.
pub fn attention_scratch(gpu: Gpu) -> usize {
    few_rows::scratch(gpu)
}

/// Computes `softmax(q · kᵀ · scale) · v` over the keys that each query sees, with the kernel that should be the
/// fastest on the stream's device.
///
/// How the work is cut depends on sizes, positions and the device, and so do the results, to the bit. A value that is
/// not finite may reach other queries that see keys of the same tile.
///
/// # Errors
/// If the device has no FP8 units or the driver refuses the launch.
///
/// # Panics
/// If sizes, strides or addresses are not as [`Attention`] says.
///
/// # Safety
/// The addresses are of memory of the stream's device, as large as the sizes say, aligned to their elements, and valid
/// until the stream has passed the launch; what is written overlaps nothing that is read; the scratch is as
/// [`Attention`] says; and what [dependent launches](super#dependent-launches) ask for holds.
pub unsafe fn attention(stream: &CudaStream, args: &Attention) -> Result<(), Error> {
    let gpu = Gpu::of(stream)?;
    // SAFETY: the caller's promise.
    unsafe { attention_with(stream, args, AttentionKernel::chosen(gpu, args)) }
}

/// As [`attention`], with a kernel that is given.
///
/// # Errors
/// As [`attention`].
///
/// # Panics
/// As [`attention`], and if the kernel does not [serve](AttentionKernel::serves) the arguments.
///
/// # Safety
/// As [`attention`].
pub unsafe fn attention_with(
    stream: &CudaStream,
    args: &Attention,
    kernel: AttentionKernel,
) -> Result<(), Error> {
    args.check();
    let gpu = Gpu::of(stream)?;
    assert!(kernel.serves(gpu, args), "{kernel} does not serve {args:?}");
    if args.batch == 0 || args.queries == 0 {
        return Ok(());
    }
    // SAFETY: the caller's promise, and the kernel serves the arguments.
    unsafe {
        match kernel {
            AttentionKernel::Any => any::launch(stream, args),
            AttentionKernel::FewRows => few_rows::launch(stream, gpu, args),
            AttentionKernel::ManyRows => many_rows::launch(stream, args),
            AttentionKernel::Sm90 => sm90::launch(stream, gpu, args),
        }
    }
}

impl Attention {
    fn check(&self) {
        assert!(self.heads > 0 && self.kv_heads > 0 && self.dim > 0);
        assert!(
            self.heads.is_multiple_of(self.kv_heads),
            "each head of keys has as many query heads"
        );
        assert!(
            self.window != Some(0),
            "a query sees at least its own position"
        );
        assert!(
            self.scale > 0.0 && self.scale.is_finite(),
            "scores are scaled by a positive number, not {}",
            self.scale
        );
        for stride in [self.q_stride, self.out_stride] {
            assert!(stride >= self.heads * self.dim, "tokens fit their stride");
        }
        for heads in [self.keys, self.values] {
            assert!(
                heads.head_stride >= self.capacity * self.dim,
                "heads fit their stride"
            );
        }
        assert_eq!(self.scratch % 16, 0, "scratch starts at a multiple of 16");
    }

    /// Query heads that share a head of keys.
    fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// Rows of a head of keys: its query heads at all positions.
    fn rows(&self) -> usize {
        self.queries * self.group()
    }

    /// Whether heads are of what tensor cores multiply, in pieces of 16 bytes.
    fn in_tiles(&self) -> bool {
        let strides = [
            self.q_stride,
            self.out_stride,
            self.keys.batch_stride,
            self.keys.head_stride,
            self.values.batch_stride,
            self.values.head_stride,
        ];
        let addresses = [self.q, self.out, self.keys.values, self.values.values];
        self.float != Float::F32
            && matches!(self.dim, 64 | 128)
            && strides.iter().all(|stride| stride.is_multiple_of(8))
            && addresses.iter().all(|address| address.is_multiple_of(16))
    }

    /// A kernel's name for this type and dimension, of those for BF16 and F16, 64 and 128.
    fn name_of(&self, names: [&'static str; 4]) -> &'static str {
        let float = usize::from(self.float == Float::F16);
        names[2 * float + usize::from(self.dim == 128)]
    }
}
