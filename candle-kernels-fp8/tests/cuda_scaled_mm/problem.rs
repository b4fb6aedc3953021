//! A product, its data, and what it should be.

use candle_kernels_fp8::ScaleLayout;
use candle_kernels_fp8::cuda::{
    Accumulation, Activations, Float, Kernel, Panels, ScaledMm, Scaling, WeightLayout,
    scaled_mm_with,
};
use half::{bf16, f16};
use rayon::prelude::*;

use crate::oracle::{self, Adder, Product};
use crate::support_cuda::{Device, Guarded};

/// Activations, dense.
#[derive(Debug, Clone)]
pub(crate) enum X {
    /// Values of a type.
    Values(Vec<f32>, Float),
    /// Codes, scales, and which codes share one.
    Codes(Vec<u8>, Vec<f32>, Scaling),
}

/// A product with all that goes into it; matrices are dense.
#[derive(Debug, Clone)]
pub(crate) struct Problem {
    pub(crate) m: usize,
    pub(crate) n: usize,
    pub(crate) k: usize,
    pub(crate) x: X,
    pub(crate) weight: Vec<u8>,
    pub(crate) scales: Vec<f32>,
    pub(crate) layout: ScaleLayout,
    /// Values of a type.
    pub(crate) bias: Option<(Vec<f32>, Float)>,
    pub(crate) out: Float,
    pub(crate) accumulation: Accumulation,
    /// Pieces of 16 bytes that rows are apart, beyond what they need: NaN in every type.
    pub(crate) padding: usize,
    pub(crate) dependent: bool,
}

/// A problem in the memory of a device, its weight in each layout.
pub(crate) struct Uploaded {
    /// With a weight in rows, then with the same in panels.
    pub(crate) args: [ScaledMm; 2],
    /// What the addresses point to.
    _memory: Vec<Guarded>,
}

pub(crate) fn bytes_of(values: &[f32], float: Float) -> Vec<u8> {
    let bytes = |value: &f32| match float {
        Float::Bf16 => bf16::from_f32(*value).to_le_bytes().to_vec(),
        Float::F16 => f16::from_f32(*value).to_le_bytes().to_vec(),
        Float::F32 => value.to_le_bytes().to_vec(),
    };
    values.iter().flat_map(bytes).collect()
}

pub(crate) fn values_of(bytes: &[u8], float: Float) -> Vec<f64> {
    let value = |bytes: &[u8]| match float {
        Float::Bf16 => bf16::from_le_bytes([bytes[0], bytes[1]]).to_f64(),
        Float::F16 => f16::from_le_bytes([bytes[0], bytes[1]]).to_f64(),
        Float::F32 => f32::from_le_bytes(bytes.try_into().unwrap()).into(),
    };
    bytes.chunks_exact(float.size()).map(value).collect()
}

/// Rows of so many bytes at multiples of 16 bytes, `padding` of these further apart than they need to be. What is
/// between them is NaN. Nothing follows the last row.
fn padded(bytes: &[u8], row: usize, padding: usize) -> (Vec<u8>, usize) {
    let stride = row.next_multiple_of(16) + padding * 16;
    let mut all = vec![0xff; bytes.len() / row * stride];
    for (to, from) in all.chunks_exact_mut(stride).zip(bytes.chunks_exact(row)) {
        to[..row].copy_from_slice(from);
    }
    all.truncate((all.len() + row).saturating_sub(stride));
    (all, stride)
}

/// A weight `[n, k]` in panels.
fn packed(weight: &[u8], n: usize, k: usize) -> Vec<u8> {
    let panels = Panels { n, k };
    let mut all = vec![0; panels.len()];
    for (row, codes) in weight.chunks(k).enumerate() {
        for (i, codes) in codes.chunks(16).enumerate() {
            all[panels.place(row, i * 16)..][..codes.len()].copy_from_slice(codes);
        }
    }
    all
}

impl Problem {
    pub(crate) fn upload(&self, device: &Device) -> Uploaded {
        let mut memory = Vec::new();
        let mut address = |bytes: &[u8]| {
            memory.push(device.upload(bytes));
            memory.last().unwrap().address
        };
        let (weight, stride) = padded(&self.weight, self.k, self.padding);
        let packed = address(&packed(&self.weight, self.n, self.k));
        let (activations, row_stride) = match &self.x {
            X::Values(values, float) => {
                let bytes = bytes_of(values, *float);
                let (x, stride) = padded(&bytes, self.k * float.size(), self.padding);
                let values = address(&x);
                let float = *float;
                (Activations::Values { values, float }, stride / float.size())
            }
            X::Codes(codes, scales, scaling) => {
                let (x, stride) = padded(codes, self.k, self.padding);
                let activations = Activations::Codes {
                    codes: address(&x),
                    scales: address(&bytes_of(scales, Float::F32)),
                    scaling: *scaling,
                };
                (activations, stride)
            }
        };
        let rows = ScaledMm {
            m: self.m,
            n: self.n,
            k: self.k,
            activations,
            row_stride,
            weight: address(&weight),
            weight_layout: WeightLayout::Rows { stride },
            weight_scales: address(&bytes_of(&self.scales, Float::F32)),
            layout: self.layout,
            bias: self
                .bias
                .as_ref()
                .map(|(bias, float)| (address(&bytes_of(bias, *float)), *float)),
            out: 0,
            out_float: self.out,
            accumulation: self.accumulation,
            dependent: self.dependent && device.gpu.launches_dependents(),
        };
        let panels = ScaledMm {
            weight: packed,
            weight_layout: WeightLayout::Panels,
            ..rows
        };
        Uploaded {
            args: [rows, panels],
            _memory: memory,
        }
    }

    /// What the problem should give.
    pub(crate) fn expected(&self) -> Product {
        let &Self { m, n, k, .. } = self;
        let x_scale = |row: usize, col: usize| match &self.x {
            X::Values(..) => 1.0,
            X::Codes(_, scales, scaling) => match scaling {
                Scaling::Tensor => scales[0],
                Scaling::Token => scales[row],
                Scaling::Group(group) => scales[row * k.div_ceil(*group) + col / group],
            },
        };
        let weight_scale = |row: usize, col: usize| match self.layout {
            ScaleLayout::Tensor => self.scales[0],
            ScaleLayout::Channel => self.scales[row],
            ScaleLayout::Block { rows, cols } => {
                self.scales[row / rows * k.div_ceil(cols) + col / cols]
            }
        };
        let decoded = |codes: &[u8]| codes.iter().map(|code| oracle::decode(*code)).collect();
        let x: Vec<f64> = match &self.x {
            X::Values(values, _) => values.iter().map(|value| f64::from(*value)).collect(),
            X::Codes(codes, ..) => decoded(codes),
        };
        let weight: Vec<f64> = decoded(&self.weight);
        // Of 28 significant bits at most: exact.
        let scaled = |values: &[f64], scale: &dyn Fn(usize, usize) -> f32| -> Vec<f64> {
            let scaled = |(i, value): (usize, &f64)| value * f64::from(scale(i / k, i % k));
            values.iter().enumerate().map(scaled).collect()
        };
        let (x_scaled, weight_scaled) = (scaled(&x, &x_scale), scaled(&weight, &weight_scale));
        let bias = |col: usize| {
            self.bias
                .as_ref()
                .map_or(0.0, |(bias, _)| f64::from(bias[col]))
        };
        let sums: Vec<Sums> = (0..m * n)
            .into_par_iter()
            .map(|i| {
                let (row, col) = (i / n * k, i % n * k);
                let scaled = (&x_scaled[row..][..k], &weight_scaled[col..][..k]);
                Sums::new(scaled, (&x[row..][..k], &weight[col..][..k]))
            })
            .collect();
        let with_bias = sums
            .iter()
            .enumerate()
            .map(|(i, sums)| (sums, bias(i % n.max(1))));
        Product {
            values: with_bias
                .clone()
                .map(|(sums, bias)| sums.value + bias)
                .collect(),
            magnitudes: with_bias
                .map(|(sums, bias)| sums.magnitude + bias.abs())
                .collect(),
            unscaled: sums.iter().map(|sums| sums.unscaled).collect(),
            norms: sums.iter().map(|sums| sums.squares.sqrt()).collect(),
        }
    }

    /// Where a kernel's results first leave what is allowed; otherwise the largest error, relative to the norm of the
    /// terms of its sum.
    pub(crate) fn check(
        &self,
        kernel: Kernel,
        found: &[f64],
        product: &Product,
    ) -> Result<f64, String> {
        let float = match self.out {
            Float::Bf16 => oracle::Float::Bf16,
            Float::F16 => oracle::Float::F16,
            Float::F32 => oracle::Float::F32,
        };
        let norms = &product.norms;
        if found.len() != norms.len() {
            return Err(format!("{} results, expected {}", found.len(), norms.len()));
        }
        let adder = adder(kernel, self);
        let errors = found.par_iter().enumerate().map(|(i, &found)| {
            let expected = product.values[i];
            let bound = product.bound(adder, i, self.k, float);
            let error = (found - expected).abs();
            let fits = product.fits(i, found, bound, float);
            if fits {
                let relative = error / norms[i];
                return Ok(if relative.is_finite() { relative } else { 0.0 });
            }
            let (row, col) = (i / self.n, i % self.n);
            Err(format!(
                "[{row}, {col}] is {found:e}, expected {expected:e} ± {bound:e}"
            ))
        });
        // Every one, in order, so that the first failure is the one that is told.
        let errors: Vec<Result<f64, String>> = errors.collect();
        let wrong = errors.iter().filter(|error| error.is_err()).count();
        let results: Result<Vec<f64>, String> = errors.into_iter().collect();
        match results {
            Ok(errors) => Ok(errors.into_iter().fold(0.0, f64::max)),
            Err(text) => Err(format!("{text} ({wrong} of {} are wrong)", norms.len())),
        }
    }
}

/// The results, or why there are none. They are computed twice, into memory that held something else.
pub(crate) fn run(device: &Device, kernel: Kernel, args: &ScaledMm) -> Result<Vec<f64>, String> {
    let len = args.m * args.n * args.out_float.size();
    let once = |poison: u8| {
        let out = device.upload(&vec![poison; len]);
        let args = ScaledMm {
            out: out.address,
            ..*args
        };
        // SAFETY: the memory is as large as the arguments say, and lives until the download has waited for the stream.
        unsafe { scaled_mm_with(&device.stream, &args, kernel) }
            .map_err(|error| error.to_string())?;
        device.download(&out)
    };
    let (first, second) = (once(0xff)?, once(0x00)?);
    if let Some(at) = (0..len).find(|at| first[*at] != second[*at]) {
        let at = at / args.out_float.size();
        let (row, col) = (at / args.n, at % args.n);
        return Err(format!(
            "[{row}, {col}] is not the same again: not written, or a race"
        ));
    }
    Ok(values_of(&first, args.out_float))
}

struct Sums {
    value: f64,
    magnitude: f64,
    unscaled: f64,
    squares: f64,
}

impl Sums {
    /// Over the terms of one result, several at a time: the rows with their scales, and without.
    fn new((x, weight): (&[f64], &[f64]), (codes, weight_codes): (&[f64], &[f64])) -> Self {
        const LANES: usize = 8;
        let mut lanes = [[0.0; LANES]; 4];
        let mut add = |lane: usize, term: f64, unscaled: f64| {
            lanes[0][lane] += term;
            lanes[1][lane] += term.abs();
            lanes[2][lane] += unscaled.abs();
            lanes[3][lane] += term * term;
        };
        let whole = x.len() / LANES * LANES;
        for start in (0..whole).step_by(LANES) {
            let at =
                |values: &[f64]| -> [f64; LANES] { values[start..][..LANES].try_into().unwrap() };
            let (x, weight, codes, weight_codes) = (at(x), at(weight), at(codes), at(weight_codes));
            for lane in 0..LANES {
                add(
                    lane,
                    x[lane] * weight[lane],
                    codes[lane] * weight_codes[lane],
                );
            }
        }
        for i in whole..x.len() {
            add(i - whole, x[i] * weight[i], codes[i] * weight_codes[i]);
        }
        let [value, magnitude, unscaled, squares] = lanes.map(|lanes| lanes.iter().sum());
        Self {
            value,
            magnitude,
            unscaled,
            squares,
        }
    }
}

/// What adds the products of a problem up.
fn adder(kernel: Kernel, problem: &Problem) -> Adder {
    match &problem.x {
        _ if kernel.to_string().starts_with("any") => Adder::F32,
        X::Values(..) => Adder::Values,
        X::Codes(..) => match problem.accumulation {
            Accumulation::Promoted => Adder::Codes(128),
            Accumulation::Fast => Adder::Codes(problem.k.max(128)),
        },
    }
}
