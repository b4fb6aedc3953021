//! Products, checked and timed.

use candle_kernels_fp8::cuda::{
    self, Accumulation, Activations, Error, Float, Gpu, Kernel, Panels, ScaledMm, Scaling,
    WeightLayout,
};
use candle_kernels_fp8::{ScaleLayout, e4m3};
use half::bf16;

use crate::Args;
use crate::cases::{self, Layout, Scheme};
use crate::device::{Buffer, Device, Failed};
use crate::peer::{Peer, Times};
use crate::random::Random;

/// Bytes of weights that a graph goes through: several times the L2 cache of an H200 (50 MiB).
pub(crate) const PAST_L2: usize = 300_000_000;

pub(crate) fn run(args: &Args) -> Result<(), Failed> {
    let device = Device::new()?;
    let gpu = Gpu::of(&device.stream)?;
    let layout = format!("{:?}", args.layout).to_lowercase();
    println!(
        "{}: {gpu:?}; weights in {layout}",
        device.stream.context().name()?
    );
    let mut peer = args.peer.as_deref().map(Peer::start).transpose()?;
    let shapes = match &args.shapes[..] {
        [] => cases::SHAPES.iter().map(|(_, shape)| *shape).collect(),
        named => named
            .iter()
            .map(|name| cases::shape(name))
            .collect::<Result<Vec<_>, _>>()?,
    };
    println!(
        "{:>13} {:>5}  {:<22} {:>9} {:>8} {:>7} {:>7} {:>7} {:>7} {:>7}",
        "N x K", "M", "kernel", "us", "TFLOP/s", "GB/s", "x row", "x tens.", "x bf16", "x read"
    );
    for (n, k) in shapes {
        let weights = Weights::new(&device, args, n, k)?;
        for &m in &args.m {
            Product::new(&device, &weights, args, m)?.report(gpu, peer.as_mut())?;
        }
    }
    Ok(())
}

/// Seconds of a product of `m` rows with the kernel that is chosen for it, which is checked.
pub(crate) fn seconds(
    device: &Device,
    weights: &Weights,
    args: &Args,
    m: usize,
) -> Result<f64, Failed> {
    let product = Product::new(device, weights, args, m)?;
    let kernel = Kernel::chosen(Gpu::of(&device.stream)?, &product.args(0));
    product.check(kernel)?;
    product.time(kernel)
}

/// Copies of a weight, and what the host needs to check products with it.
pub(crate) struct Weights {
    n: usize,
    k: usize,
    host: Vec<u8>,
    host_scales: Vec<f32>,
    scales: Buffer<f32>,
    layout: ScaleLayout,
    weight_layout: WeightLayout,
    copies: Vec<Buffer<u8>>,
}

impl Weights {
    pub(crate) fn new(device: &Device, args: &Args, n: usize, k: usize) -> Result<Self, Failed> {
        let mut random = Random::new((n * k) as u64);
        let layout = match args.scheme {
            Scheme::Block => ScaleLayout::Block {
                rows: 128,
                cols: 128,
            },
            Scheme::Row | Scheme::W8a16 => ScaleLayout::Channel,
        };
        let host = random.codes(n * k);
        let host_scales = random.scales(layout.len(n, k));
        let rows = device.upload(&host)?;
        let count = (PAST_L2 / (n * k)).max(2);
        let copies = match args.layout {
            Layout::Rows => (0..count)
                .map(|_| device.copy(&rows))
                .collect::<Result<_, _>>()?,
            Layout::Panels => {
                let room = |_| device.room(Panels { n, k }.len());
                (0..count).map(room).collect::<Result<Vec<_>, _>>()?
            }
        };
        let weight_layout = match args.layout {
            Layout::Rows => WeightLayout::Rows { stride: k },
            Layout::Panels => {
                let panels = Panels { n, k };
                // SAFETY: the buffers are as large as the sizes say and live until the stream is synchronized.
                let seconds = device.time(args.replays, count, |copy| unsafe {
                    let to = copies[copy].address;
                    cuda::pack(&device.stream, (rows.address, k), to, panels, false)
                })?;
                println!(
                    "{n} x {k} into panels: {:.2} us, {:.0} GB/s",
                    seconds * 1e6,
                    (n * k + panels.len()) as f64 / seconds / 1e9
                );
                WeightLayout::Panels
            }
        };
        Ok(Self {
            n,
            k,
            scales: device.upload(&host_scales)?,
            host,
            host_scales,
            layout,
            weight_layout,
            copies,
        })
    }
}

struct Product<'a> {
    device: &'a Device,
    weights: &'a Weights,
    args: &'a Args,
    m: usize,
    /// Values of the activations, without their scales.
    host: Vec<f32>,
    host_scales: Vec<f32>,
    scaling: Scaling,
    x: Buffer<u8>,
    scales: Buffer<f32>,
    out: Buffer<u16>,
}

impl<'a> Product<'a> {
    fn new(
        device: &'a Device,
        weights: &'a Weights,
        args: &'a Args,
        m: usize,
    ) -> Result<Self, Failed> {
        let &Weights { n, k, .. } = weights;
        let mut random = Random::new(m as u64);
        let scaling = match args.scheme {
            Scheme::Block => Scaling::Group(128),
            Scheme::Row | Scheme::W8a16 => Scaling::Token,
        };
        let codes = random.codes(m * k);
        let host: Vec<f32> = codes.iter().map(|&code| e4m3::decode(code)).collect();
        let (x, host_scales) = match args.scheme {
            Scheme::W8a16 => {
                let bytes: Vec<u8> = host
                    .iter()
                    .flat_map(|&value| bf16::from_f32(value).to_le_bytes())
                    .collect();
                (bytes, vec![1.0; m])
            }
            Scheme::Row | Scheme::Block => (codes, random.scales(scaling.len(m, k))),
        };
        Ok(Self {
            device,
            weights,
            args,
            m,
            host,
            scales: device.upload(&host_scales)?,
            host_scales,
            scaling,
            x: device.upload(&x)?,
            // NaN, wherever nothing is written.
            out: device.upload(&vec![0xffffu16; m * n])?,
        })
    }

    fn args(&self, copy: usize) -> ScaledMm {
        let &Weights { n, k, layout, .. } = self.weights;
        let activations = match self.args.scheme {
            Scheme::W8a16 => Activations::Values {
                values: self.x.address,
                float: Float::Bf16,
            },
            Scheme::Row | Scheme::Block => Activations::Codes {
                codes: self.x.address,
                scales: self.scales.address,
                scaling: self.scaling,
            },
        };
        ScaledMm {
            m: self.m,
            n,
            k,
            activations,
            row_stride: k,
            weight: self.weights.copies[copy].address,
            weight_layout: self.weights.weight_layout,
            weight_scales: self.weights.scales.address,
            layout,
            bias: None,
            out: self.out.address,
            out_float: Float::Bf16,
            accumulation: match self.args.fast {
                true => Accumulation::Fast,
                false => Accumulation::Promoted,
            },
            dependent: self.args.dependent,
        }
    }

    fn launch(&self, copy: usize, kernel: Kernel) -> Result<(), Error> {
        // SAFETY: the buffers are as large as the sizes say and live until the stream is synchronized; weights are written
        // before the first launch only.
        unsafe { cuda::scaled_mm_with(&self.device.stream, &self.args(copy), kernel) }
    }

    /// Compares some results with sums in f64.
    fn check(&self, kernel: Kernel) -> Result<(), Failed> {
        let &Weights { n, k, layout, .. } = self.weights;
        self.launch(0, kernel)?;
        let out = self.device.download(&self.out)?;
        if let Some(at) = out.iter().position(|&bits| bf16::from_bits(bits).is_nan()) {
            return Err(format!("{kernel}: NaN at row {}, column {}", at / n, at % n).into());
        }
        let mut random = Random::new(7);
        for i in 0..500 {
            let (row, col) = match i {
                0 => (self.m - 1, n - 1),
                _ => (random.bits() as usize % self.m, random.bits() as usize % n),
            };
            let scales = layout.row(&self.weights.host_scales, col, k);
            let (mut expected, mut magnitude) = (0.0, 0.0);
            for at in 0..k {
                let x_scale = match self.scaling {
                    Scaling::Group(group) => self.host_scales[row * k.div_ceil(group) + at / group],
                    _ => self.host_scales[row],
                };
                let x = f64::from(self.host[row * k + at]) * f64::from(x_scale);
                let weight = f64::from(e4m3::decode(self.weights.host[col * k + at]))
                    * f64::from(scales.scales[at / scales.run]);
                expected += x * weight;
                magnitude += (x * weight).abs();
            }
            let found = f64::from(bf16::from_bits(out[row * n + col]).to_f32());
            // What the tensor cores drop of sums, and the rounding of the result.
            let bound = magnitude * 2f64.powi(-12) + expected.abs() * 2f64.powi(-8);
            if (found - expected).abs() > bound {
                return Err(format!(
                    "{kernel}: {found} at row {row}, column {col}; expected {expected} within {bound}"
                )
                .into());
            }
        }
        Ok(())
    }

    fn time(&self, kernel: Kernel) -> Result<f64, Failed> {
        self.device
            .time(self.args.replays, self.weights.copies.len(), |copy| {
                self.launch(copy, kernel)
            })
    }

    /// Seconds of reading the weight alone, with the best of some grids.
    fn read(&self) -> Result<f64, Failed> {
        let bytes = self.weights.n * self.weights.k;
        let mut best = f64::INFINITY;
        for blocks in [1, 2, 4, 8] {
            let seconds = self.device.time(
                self.args.replays,
                self.weights.copies.len(),
                // SAFETY: the copies live until the stream is synchronized; `out` may be overwritten.
                |copy| unsafe {
                    cuda::probe::read(
                        &self.device.stream,
                        (self.weights.copies[copy].address, bytes),
                        self.out.address,
                        blocks,
                        self.args.dependent,
                    )
                },
            )?;
            best = best.min(seconds);
        }
        Ok(best)
    }

    fn report(&self, gpu: Gpu, peer: Option<&mut Peer>) -> Result<(), Failed> {
        let args = self.args(0);
        let chosen = Kernel::chosen(gpu, &args);
        let kernels = match self.args.sweep {
            true => Kernel::all()
                .into_iter()
                .filter(|kernel| kernel.serves(gpu, &args))
                .filter(|kernel| kernel.to_string().contains(&self.args.kernel))
                .collect(),
            false => vec![chosen],
        };
        let read = self.read()?;
        let mut timed = Vec::new();
        for kernel in kernels {
            match self.check(kernel).and_then(|()| self.time(kernel)) {
                Ok(seconds) => timed.push((kernel, seconds)),
                Err(error) if self.args.sweep => println!("FAILED {self} {kernel}: {error}"),
                Err(error) => return Err(error),
            }
        }
        timed.sort_by(|a, b| a.1.total_cmp(&b.1));
        let peer = peer
            .map(|peer| peer.time(self.m, self.weights.n, self.weights.k))
            .transpose()?;
        for (i, &(kernel, seconds)) in timed.iter().enumerate() {
            if i < 5 || kernel == chosen {
                let mark = if kernel == chosen { "*" } else { "" };
                self.line(&format!("{kernel}{mark}"), seconds, read, peer);
            }
        }
        Ok(())
    }

    fn line(&self, kernel: &str, seconds: f64, read: f64, peer: Option<Times>) {
        let &Weights { n, k, .. } = self.weights;
        let operations = 2.0 * self.m as f64 * n as f64 * k as f64;
        let x_size = if self.args.scheme == Scheme::W8a16 {
            2
        } else {
            1
        };
        let bytes = (n * k + self.m * k * x_size + self.m * n * 2) as f64;
        let ratio = |of: fn(Times) -> f64| match peer {
            Some(times) => format!("{:.2}", of(times) / seconds),
            None => "-".to_string(),
        };
        println!(
            "{self} {kernel:<22} {:>9.2} {:>8.0} {:>7.0} {:>7} {:>7} {:>7} {:>7.2}",
            seconds * 1e6,
            operations / seconds / 1e12,
            bytes / seconds / 1e9,
            ratio(|times| times.row),
            ratio(|times| times.tensor),
            ratio(|times| times.bf16),
            seconds / read,
        );
    }
}

impl std::fmt::Display for Product<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let shape = format!("{} x {}", self.weights.n, self.weights.k);
        write!(f, "{shape:>13} {:>5} ", self.m)
    }
}
