//! The arguments of a product as device code takes them.

use super::{Activations, ScaledMm, WeightLayout};
use crate::ScaleLayout;
use crate::cpu::Scaling;
use crate::cuda::{Address, Float, Panels};

/// Device twin: `ScaledMm` in `kernels/scaled_mm.cuh`, which says what the fields mean.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct Params {
    pub(super) x: Address,
    pub(super) x_scales: Address,
    pub(super) weight: Address,
    pub(super) weight_scales: Address,
    pub(super) bias: Address,
    pub(super) out: Address,
    pub(super) m: u32,
    pub(super) n: u32,
    pub(super) k: u32,
    pub(super) x_stride: u32,
    pub(super) weight_stride: u32,
    pub(super) panels: u32,
    pub(super) x_scale_row: u32,
    pub(super) x_scale_run: u32,
    pub(super) weight_scale_rows: u32,
    pub(super) weight_scale_row: u32,
    pub(super) weight_scale_run: u32,
    pub(super) x_float: Float,
    pub(super) bias_float: Float,
    pub(super) out_float: Float,
}

impl Params {
    pub(super) fn new(args: &ScaledMm) -> Self {
        let &ScaledMm { m, n, k, .. } = args;
        let size = |value: usize| u32::try_from(value).expect("sizes fit 32 bits");
        let (x, x_scales, x_scale_row, x_scale_run, x_float) = match args.activations {
            Activations::Values { values, float } => (values, 0, 0, k, float),
            Activations::Codes {
                codes,
                scales,
                scaling,
            } => {
                let (row, run) = match scaling {
                    Scaling::Tensor => (0, k),
                    Scaling::Token => (1, k),
                    Scaling::Group(group) => (k.div_ceil(group), group),
                };
                (codes, scales, row, run, Float::F32)
            }
        };
        let (weight_scale_rows, weight_scale_row) = match args.layout {
            ScaleLayout::Tensor => (n, 0),
            ScaleLayout::Channel => (1, 1),
            ScaleLayout::Block { rows, cols } => (rows, k.div_ceil(cols)),
        };
        let (weight_stride, panels) = match args.weight_layout {
            WeightLayout::Rows { stride } => (stride, 0),
            WeightLayout::Panels => (Panels { n, k }.row_len(), 1),
        };
        let (bias, bias_float) = args.bias.unwrap_or((0, Float::F32));
        Self {
            x,
            x_scales,
            weight: args.weight,
            weight_scales: args.weight_scales,
            bias,
            out: args.out,
            m: size(m),
            n: size(n),
            k: size(k),
            x_stride: size(args.row_stride),
            weight_stride: size(weight_stride),
            panels,
            x_scale_row: size(x_scale_row),
            x_scale_run: size(x_scale_run.min(k)),
            weight_scale_rows: size(weight_scale_rows),
            weight_scale_row: size(weight_scale_row),
            weight_scale_run: size(args.layout.run(k).min(k)),
            x_float,
            bias_float,
            out_float: args.out_float,
        }
    }
}
