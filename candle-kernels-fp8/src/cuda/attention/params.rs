//! The arguments as device code takes them.

use super::Attention;
use crate::cuda::Address;
use crate::cuda::rows::size;

/// Device twin: `Attention` in `kernels/attention.cuh`, which says what the fields mean.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct Params {
    q: Address,
    k: Address,
    v: Address,
    out: Address,
    positions: Address,
    pub(super) partial: Address,
    pub(super) counters: Address,
    q_stride: u64,
    out_stride: u64,
    k_batch: u64,
    k_head: u64,
    v_batch: u64,
    v_head: u64,
    position: u32,
    capacity: u32,
    batch: u32,
    queries: u32,
    kv_heads: u32,
    group: u32,
    dim: u32,
    window: u32,
    pub(super) splits: u32,
    scale: f32,
}

impl Params {
    pub(super) fn new(args: &Attention) -> Self {
        let (positions, position) = args.positions.params(args.queries, args.capacity);
        // Rows are counted in 32 bits, up to the end of the last tile.
        size(args.rows() + args.capacity);
        Self {
            q: args.q,
            k: args.keys.values,
            v: args.values.values,
            out: args.out,
            positions,
            partial: 0,
            counters: 0,
            q_stride: args.q_stride as u64,
            out_stride: args.out_stride as u64,
            k_batch: args.keys.batch_stride as u64,
            k_head: args.keys.head_stride as u64,
            v_batch: args.values.batch_stride as u64,
            v_head: args.values.head_stride as u64,
            position,
            capacity: size(args.capacity),
            batch: size(args.batch),
            queries: size(args.queries),
            kv_heads: size(args.kv_heads),
            group: size(args.group()),
            dim: size(args.dim),
            window: args
                .window
                .map_or(u32::MAX, |window| u32::try_from(window).unwrap_or(u32::MAX)),
            splits: 1,
            scale: args.scale * std::f32::consts::LOG2_E,
        }
    }
}
