//! Rotary position embedding of queries and keys, with the norm of their heads before it, and keys and values written
//! to a KV cache: all that is between the projections and attention.
//!
//! Rounds where the CPU does: a norm as [`rms_norm`](crate::cpu::rms_norm) (squares are added in another order), then
//! [`rope`](crate::cpu::rope), to the bit.
//!
//! Floor: each value is read and written once. A token's 48 heads of 128 are 12 KiB in BF16, those of 8192 tokens 201
//! MB in and out, 48 µs at 4.2 TB/s.

use cudarc::driver::CudaStream;

use super::error::Error;
use super::launch::{Launch, args};
use super::library::Module;
use super::rows::size;
use super::{Address, Float, Gpu, Heads, Positions};

/// RMS norms of the heads of queries and keys: `weight · T(x / √(mean(x²) + eps))`.
#[derive(Debug, Clone, Copy)]
pub struct HeadNorms {
    /// Of queries, `[D]`.
    pub q_weight: Address,
    /// Of keys, `[D]`.
    pub k_weight: Address,
    /// Added to the mean of the squares.
    pub eps: f32,
}

/// Heads of L tokens of each sequence, on their way to attention. Each pair `(x[i], x[i + D/2])` of a query or key is
/// rotated by the angle of its position.
#[derive(Debug, Clone, Copy)]
pub struct RopeAppend {
    /// Sequences B.
    pub batch: usize,
    /// Tokens L of a sequence.
    pub len: usize,
    /// Query heads Hq.
    pub heads: usize,
    /// Heads Hkv of keys and values.
    pub kv_heads: usize,
    /// Elements D of a head, even.
    pub dim: usize,
    /// Of the first token.
    pub positions: Positions,
    /// Positions that a head of the cache has room for, at least L.
    pub capacity: usize,
    /// Type of everything.
    pub float: Float,
    /// `[B, L, Hq, D]`.
    pub q: Address,
    /// Elements from one token of `q` to the next.
    pub q_stride: usize,
    /// `[B, L, Hkv, D]`.
    pub k: Address,
    /// Elements from one token of `k` to the next.
    pub k_stride: usize,
    /// `[B, L, Hkv, D]`.
    pub v: Address,
    /// Elements from one token of `v` to the next.
    pub v_stride: usize,
    /// Norms before the rotation.
    pub norms: Option<HeadNorms>,
    /// `[P, D / 2]`, of the positions from `first_angle` on.
    pub cos: Address,
    /// `[P, D / 2]`.
    pub sin: Address,
    /// Position of the first row of `cos` and `sin`, at most that of the first token.
    pub first_angle: usize,
    /// Receives the queries `[B, L, Hq, D]`; may be `q`, with the same stride.
    pub q_out: Address,
    /// Elements from one token of `q_out` to the next.
    pub q_out_stride: usize,
    /// Of which L positions receive the keys, `[B, Hkv, capacity, D]`.
    pub keys: Heads,
    /// Of which L positions receive the values, `[B, Hkv, capacity, D]`.
    pub values: Heads,
    /// Whether the launch may overlap the kernel before it: see [dependent launches](super#dependent-launches).
    pub dependent: bool,
}

/// Device twin: `RopeAppend` in `kernels/rope_append.cu`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct Params {
    q: Address,
    k: Address,
    v: Address,
    cos: Address,
    sin: Address,
    q_weight: Address,
    k_weight: Address,
    positions: Address,
    q_out: Address,
    keys: Address,
    values: Address,
    q_stride: u64,
    k_stride: u64,
    v_stride: u64,
    q_out_stride: u64,
    k_batch: u64,
    k_head: u64,
    v_batch: u64,
    v_head: u64,
    position: u32,
    capacity: u32,
    first_angle: u32,
    batch: u32,
    len: u32,
    heads: u32,
    kv_heads: u32,
    dim: u32,
    lanes: u32,
    eps: f32,
}

/// Neighbours that a lane handles at once, where all starts at multiples of 16 bytes.
const PIECE: usize = 8;
const THREADS: usize = 256;

/// Rotates queries and keys, and appends keys and values to a cache.
///
/// # Errors
/// If the device has no FP8 units or the driver refuses the launch.
///
/// # Panics
/// If a size is 0 but those of `batch` and `len`, sizes, strides and positions are not as [`RopeAppend`] says, or do
/// not fit 31 bits.
///
/// # Safety
/// The addresses are of memory of the stream's device, as large as the sizes say, aligned to their elements, and valid
/// until the stream has passed the launch; what is written overlaps nothing that is read, but for `q_out` as said; the
/// angles of all positions are there, also of those that are [on the device](Positions::OnDevice); and what
/// [dependent launches](super#dependent-launches) ask for holds.
pub unsafe fn rope_append(stream: &CudaStream, args: &RopeAppend) -> Result<(), Error> {
    args.check();
    Gpu::of(stream)?;
    let half = args.dim / 2;
    let (width, lanes) = match args.in_pieces() {
        true => (PIECE, (half / PIECE).next_power_of_two().min(32)),
        false => (1, 32),
    };
    let teams = args.batch * args.len * (args.heads + 2 * args.kv_heads);
    let launch = Launch {
        grid: [size((teams * lanes).div_ceil(THREADS)), 1, 1],
        threads: size(THREADS),
        shared: 0,
        cluster: 1,
        dependent: args.dependent,
    };
    let kernel = Module::RopeAppend.kernel(match (args.float, width) {
        (Float::Bf16, PIECE) => "rope_append_bf16_8",
        (Float::Bf16, _) => "rope_append_bf16_1",
        (Float::F16, PIECE) => "rope_append_f16_8",
        (Float::F16, _) => "rope_append_f16_1",
        (Float::F32, PIECE) => "rope_append_f32_8",
        (Float::F32, _) => "rope_append_f32_1",
    })?;
    let params = args.params(lanes);
    // SAFETY: the kernel takes these arguments; the caller vouches for the memory.
    unsafe { launch.run(stream, kernel, args![&params]) }
}

impl RopeAppend {
    fn check(&self) {
        assert!(self.heads > 0 && self.kv_heads > 0 && self.dim > 0);
        assert!(self.dim.is_multiple_of(2), "a head is of pairs");
        for (stride, heads) in [
            (self.q_stride, self.heads),
            (self.q_out_stride, self.heads),
            (self.k_stride, self.kv_heads),
            (self.v_stride, self.kv_heads),
        ] {
            assert!(stride >= heads * self.dim, "tokens fit their stride");
        }
        for heads in [self.keys, self.values] {
            assert!(
                heads.head_stride >= self.capacity * self.dim,
                "heads fit their stride"
            );
        }
        if let Positions::Known(position) = self.positions {
            assert!(
                position >= self.first_angle,
                "the first token's angle is there"
            );
        }
    }

    /// Whether both halves of all heads start at multiples of 16 bytes.
    fn in_pieces(&self) -> bool {
        let multiples = [
            self.dim / 2,
            self.q_stride,
            self.k_stride,
            self.v_stride,
            self.q_out_stride,
            self.keys.batch_stride,
            self.keys.head_stride,
            self.values.batch_stride,
            self.values.head_stride,
        ];
        let (q_weight, k_weight) = self
            .norms
            .map_or((0, 0), |norms| (norms.q_weight, norms.k_weight));
        let addresses = [
            self.q,
            self.k,
            self.v,
            self.cos,
            self.sin,
            q_weight,
            k_weight,
            self.q_out,
            self.keys.values,
            self.values.values,
        ];
        multiples.iter().all(|count| count.is_multiple_of(PIECE))
            && addresses.iter().all(|address| address.is_multiple_of(16))
    }

    fn params(&self, lanes: usize) -> Params {
        let (positions, position) = self.positions.params(self.len, self.capacity);
        let (q_weight, k_weight, eps) = self.norms.map_or((0, 0, 0.0), |norms| {
            (norms.q_weight, norms.k_weight, norms.eps)
        });
        Params {
            q: self.q,
            k: self.k,
            v: self.v,
            cos: self.cos,
            sin: self.sin,
            q_weight,
            k_weight,
            positions,
            q_out: self.q_out,
            keys: self.keys.values,
            values: self.values.values,
            q_stride: self.q_stride as u64,
            k_stride: self.k_stride as u64,
            v_stride: self.v_stride as u64,
            q_out_stride: self.q_out_stride as u64,
            k_batch: self.keys.batch_stride as u64,
            k_head: self.keys.head_stride as u64,
            v_batch: self.values.batch_stride as u64,
            v_head: self.values.head_stride as u64,
            position,
            capacity: size(self.capacity),
            first_angle: size(self.first_angle),
            batch: size(self.batch),
            len: size(self.len),
            heads: size(self.heads),
            kv_heads: size(self.kv_heads),
            dim: size(self.dim),
            lanes: size(lanes),
            eps,
        }
    }
}
