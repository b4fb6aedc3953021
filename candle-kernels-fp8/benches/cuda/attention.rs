//! Attention and what is just before it: checked against f64 in places, then timed.

use candle_kernels_fp8::cuda::{
    self, Attention, AttentionKernel, Error, Float, Gpu, Heads, Positions, RopeAppend,
    attention_scratch,
};
use half::bf16;
use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};

use crate::Args;
use crate::device::{Buffer, Device, Failed};
use crate::products::PAST_L2;
use crate::random::Random;

/// Sizes of a layer's attention.
#[derive(Debug, Clone, Copy)]
struct Layer {
    name: &'static str,
    heads: usize,
    kv_heads: usize,
    dim: usize,
}

const LAYERS: [Layer; 3] = [
    Layer {
        name: "llama-8b",
        heads: 32,
        kv_heads: 8,
        dim: 128,
    },
    Layer {
        name: "qwen3-30b-a3b",
        heads: 32,
        kv_heads: 4,
        dim: 128,
    },
    Layer {
        name: "llama-1b",
        heads: 32,
        kv_heads: 8,
        dim: 64,
    },
];

/// Sequences, tokens of each, and positions before them.
const DECODE: [(usize, usize, usize); 9] = [
    (1, 1, 128),
    (1, 1, 1024),
    (1, 1, 4096),
    (1, 1, 32_768),
    (1, 4, 4096),
    (1, 16, 4096),
    (8, 1, 1024),
    (8, 1, 4096),
    (32, 1, 4096),
];
const PREFILL: [(usize, usize, usize); 5] = [
    (1, 128, 0),
    (1, 512, 0),
    (1, 2048, 0),
    (1, 8192, 0),
    (1, 2048, 6144),
];

/// Tokens of each sequence, and their cache.
struct Problem<'a> {
    device: &'a Device,
    layer: Layer,
    batch: usize,
    len: usize,
    position: usize,
    /// `[B, L, Hq + 2 · Hkv, D]`.
    qkv: Vec<bf16>,
    k: Vec<bf16>,
    v: Vec<bf16>,
    device_qkv: Buffer<u16>,
    /// `[len, D / 2]`.
    cos: Buffer<u16>,
    sin: Buffer<u16>,
    positions: Buffer<u32>,
    scratch: Buffer<u8>,
    /// Keys, values and results of each launch.
    copies: Vec<[Buffer<u16>; 3]>,
}

impl<'a> Problem<'a> {
    fn new(
        device: &'a Device,
        layer: Layer,
        (batch, len, position): (usize, usize, usize),
    ) -> Result<Self, Failed> {
        let mut random = Random::new((len * 31 + position) as u64);
        let (rows, keys) = (batch * len, position + len);
        let qkv = random.values(rows * layer.width());
        let k = random.values(batch * layer.kv_heads * keys * layer.dim);
        let v = random.values(batch * layer.kv_heads * keys * layer.dim);
        let angles = random.values(len * layer.dim / 2);
        let (device_k, device_v) = (
            device.upload(k.reinterpret_cast())?,
            device.upload(v.reinterpret_cast())?,
        );
        let copies = (PAST_L2 / (2 * k.len() * 2)).clamp(2, 64);
        let copy = |_| {
            let out = device.room(rows * layer.heads * layer.dim)?;
            Ok([device.copy(&device_k)?, device.copy(&device_v)?, out])
        };
        Ok(Self {
            device,
            layer,
            batch,
            len,
            position,
            device_qkv: device.upload(qkv.reinterpret_cast())?,
            cos: device.upload(angles.reinterpret_cast())?,
            sin: device.upload(angles.reinterpret_cast())?,
            positions: device.upload(&vec![position as u32; batch])?,
            scratch: device.upload(&vec![0; attention_scratch(Gpu::of(&device.stream)?)])?,
            copies: (0..copies).map(copy).collect::<Result<_, Failed>>()?,
            qkv,
            k,
            v,
        })
    }

    fn heads(&self, buffer: &Buffer<u16>) -> Heads {
        let head_stride = (self.position + self.len) * self.layer.dim;
        Heads {
            values: buffer.address,
            batch_stride: self.layer.kv_heads * head_stride,
            head_stride,
        }
    }

    /// As in a model: few tokens at a position that is on the device.
    fn positions(&self) -> Positions {
        match self.len <= 16 {
            true => Positions::OnDevice(self.positions.address),
            false => Positions::Known(self.position),
        }
    }

    fn attention(&self, copy: usize, dependent: bool) -> Attention {
        let layer = self.layer;
        let [k, v, out] = &self.copies[copy];
        Attention {
            batch: self.batch,
            queries: self.len,
            heads: layer.heads,
            kv_heads: layer.kv_heads,
            dim: layer.dim,
            positions: self.positions(),
            capacity: self.position + self.len,
            window: None,
            scale: 1.0 / (layer.dim as f32).sqrt(),
            float: Float::Bf16,
            q: self.device_qkv.address,
            q_stride: layer.width(),
            keys: self.heads(k),
            values: self.heads(v),
            out: out.address,
            out_stride: layer.heads * layer.dim,
            scratch: self.scratch.address,
            dependent,
        }
    }

    fn rope_append(&self, copy: usize, dependent: bool) -> Result<(), Error> {
        let (layer, size) = (self.layer, Float::Bf16.size() as u64);
        let [k, v, out] = &self.copies[copy];
        let q = self.device_qkv.address;
        let k_from = q + (layer.heads * layer.dim) as u64 * size;
        let args = RopeAppend {
            batch: self.batch,
            len: self.len,
            heads: layer.heads,
            kv_heads: layer.kv_heads,
            dim: layer.dim,
            positions: self.positions(),
            capacity: self.position + self.len,
            float: Float::Bf16,
            q,
            q_stride: layer.width(),
            k: k_from,
            k_stride: layer.width(),
            v: k_from + (layer.kv_heads * layer.dim) as u64 * size,
            v_stride: layer.width(),
            norms: None,
            cos: self.cos.address,
            sin: self.sin.address,
            first_angle: self.position,
            q_out: out.address,
            q_out_stride: layer.heads * layer.dim,
            keys: self.heads(k),
            values: self.heads(v),
            dependent,
        };
        // SAFETY: the memory is as large as the sizes say and lives until the stream is synchronized.
        unsafe { cuda::rope_append(&self.device.stream, &args) }
    }

    fn launch(&self, kernel: AttentionKernel, copy: usize, dependent: bool) -> Result<(), Error> {
        let args = self.attention(copy, dependent);
        // SAFETY: the memory is as large as the sizes say and lives until the stream is synchronized; the scratch was
        // zero at first.
        unsafe { cuda::attention_with(&self.device.stream, &args, kernel) }
    }

    /// Compares some rows with f64.
    fn check(&self, kernel: AttentionKernel, dependent: bool) -> Result<(), Failed> {
        let layer = self.layer;
        let out = &self.copies[0][2];
        self.device.poison(out)?;
        self.launch(kernel, 0, dependent)?;
        let found: Vec<u16> = self.device.download(out)?;
        let found: &[bf16] = found.reinterpret_cast();
        if found.iter().any(|y| !y.is_finite()) {
            return Err("results are missing".into());
        }
        let rows = self.batch * self.len * layer.heads;
        let wide = |values: &[bf16]| values.iter().map(|x| x.to_f64()).collect::<Vec<f64>>();
        let mut random = Random::new(rows as u64);
        for _ in 0..12 {
            let row = random.bits() as usize % rows;
            let (token, head) = (row / layer.heads, row % layer.heads);
            let keys = self.position + self.len;
            let head_of = token / self.len * layer.kv_heads + head * layer.kv_heads / layer.heads;
            let q = wide(&self.qkv[token * layer.width() + head * layer.dim..][..layer.dim]);
            let at = |key: usize| (head_of * keys + key) * layer.dim;
            let seen = 0..self.position + token % self.len + 1;
            let scores: Vec<f64> = seen
                .map(|key| {
                    let k = &self.k[at(key)..][..layer.dim];
                    let sum: f64 = q.iter().zip(k).map(|(q, k)| q * k.to_f64()).sum();
                    sum / (layer.dim as f64).sqrt()
                })
                .collect();
            let most = scores.iter().copied().fold(f64::MIN, f64::max);
            let weights: Vec<f64> = scores.iter().map(|score| (score - most).exp()).collect();
            let total: f64 = weights.iter().sum();
            for d in 0..layer.dim {
                let (mut value, mut size) = (0f64, 0f64);
                for (key, weight) in weights.iter().enumerate() {
                    let add = weight / total * self.v[at(key) + d].to_f64();
                    value += add;
                    size += add.abs();
                }
                // A rounding of the result, one of each weight, and what f32 leaves.
                let bound = value.abs() * 2f64.powi(-8) + size * (2f64.powi(-8) + 1e-3) + 1e-6;
                let found = found[row * layer.dim + d].to_f64();
                if (found - value).abs() > bound {
                    return Err(format!("row {row}, {d}: {found} instead of {value}").into());
                }
            }
        }
        Ok(())
    }
}

impl Layer {
    /// Elements of a token's q, k and v.
    fn width(self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.dim
    }

    /// Bytes that attention must move: each key and value that is seen, each query and result.
    fn bytes(self, (batch, len, position): (usize, usize, usize)) -> usize {
        let cache = 2 * self.kv_heads * (position + len);
        batch * (cache + 2 * len * self.heads) * self.dim * 2
    }

    /// Operations that attention must do, masked ones left out.
    fn operations(self, (batch, len, position): (usize, usize, usize)) -> f64 {
        let pairs = len * position + len * (len + 1) / 2;
        4.0 * (batch * self.heads * self.dim) as f64 * pairs as f64
    }
}

pub(crate) fn run(args: &Args) -> Result<(), Failed> {
    let device = Device::new()?;
    let gpu = Gpu::of(&device.stream)?;
    println!("{}: {gpu:?}", device.stream.context().name()?);
    println!(
        "{:<14} {:<12} {:>5} {:>5} {:>8} {:>9} {:>7} {:>8}",
        "layer", "kernel", "batch", "len", "position", "us", "GB/s", "TFLOP/s"
    );
    let layers = LAYERS
        .iter()
        .filter(|layer| layer.name.contains(&args.layer));
    for &layer in layers {
        for sizes in DECODE.into_iter().chain(PREFILL) {
            let problem = Problem::new(&device, layer, sizes)?;
            let copies = problem.copies.len();
            let line = |name: &str, seconds: f64, bytes: usize, operations: f64| {
                let (batch, len, position) = sizes;
                println!(
                    "{:<14} {name:<12} {batch:>5} {len:>5} {position:>8} {:>9.2} {:>7.0} {:>8.1}",
                    layer.name,
                    seconds * 1e6,
                    bytes as f64 / seconds / 1e9,
                    operations / seconds / 1e12,
                );
            };
            let chosen = AttentionKernel::chosen(gpu, &problem.attention(0, false));
            for kernel in AttentionKernel::ALL {
                let serves = kernel.serves(gpu, &problem.attention(0, false));
                // The slowest one would take all the time.
                let swept = args.sweep && kernel != AttentionKernel::Any;
                let wanted = swept && kernel.to_string().contains(&args.kernel);
                if !serves || !(wanted || !args.sweep && kernel == chosen) {
                    continue;
                }
                problem
                    .check(kernel, args.dependent)
                    .map_err(|error| format!("{} {kernel} {sizes:?}: {error}", layer.name))?;
                let seconds = device.time(args.replays, copies, |copy| {
                    problem.launch(kernel, copy, args.dependent)
                })?;
                let (bytes, operations) = (layer.bytes(sizes), layer.operations(sizes));
                line(&kernel.to_string(), seconds, bytes, operations);
            }
            let seconds = device.time(args.replays, copies, |copy| {
                problem.rope_append(copy, args.dependent)
            })?;
            let bytes = 2 * problem.qkv.len() * 2;
            line("rope_append", seconds, bytes, 0.0);
            // As a layer has them, so that one may start while the other still runs.
            let seconds = device.time(args.replays, copies, |copy| {
                problem.rope_append(copy, args.dependent)?;
                problem.launch(chosen, copy, args.dependent)
            })?;
            let (bytes, operations) = (bytes + layer.bytes(sizes), layer.operations(sizes));
            line("both", seconds, bytes, operations);
        }
    }
    Ok(())
}
