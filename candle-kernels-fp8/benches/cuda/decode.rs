//! What a decode step has around its layers: embedding, `lm_head`, the choice of a token. Checked, then timed.

use candle_kernels_fp8::cuda::{self, Argmax, DenseMm, Embed, Error, Float, Gpu, argmax_scratch};
use half::bf16;
use half::slice::HalfBitsSliceExt;
use half::slice::HalfFloatSliceExt;

use crate::Args;
use crate::device::{Buffer, Device, Failed};
use crate::products::PAST_L2;
use crate::random::Random;

/// Tokens × hidden size of models whose `lm_head` is in BF16.
const MODELS: [(&str, (usize, usize)); 3] = [
    ("llama-8b", (128_256, 4096)),
    ("llama-1b", (128_256, 2048)),
    ("qwen3-30b-a3b", (151_936, 2048)),
];

/// Rows, at most, of a product and of a choice.
const MOST: usize = 16;
/// Ids of a prompt.
const PROMPT: usize = 2048;
/// Launches of a graph of short kernels.
const COPIES: usize = 32;

/// A model's `lm_head` and embedding, which are the same table.
struct Model<'a> {
    device: &'a Device,
    name: &'static str,
    vocab: usize,
    dim: usize,
    /// `[vocab, dim]`.
    host: Vec<bf16>,
    copies: Vec<Buffer<u16>>,
    /// `[MOST, dim]`.
    x: Vec<bf16>,
    device_x: Buffer<u16>,
    /// `[MOST, vocab]`.
    logits: Buffer<f32>,
    /// `[PROMPT]`.
    ids: Vec<u32>,
    device_ids: Buffer<u32>,
    /// `[PROMPT, dim]`.
    embedded: Buffer<u16>,
    chosen: Buffer<u32>,
    next: Buffer<u32>,
    positions: Buffer<u32>,
    scratch: Buffer<u8>,
}

impl<'a> Model<'a> {
    fn new(
        device: &'a Device,
        name: &'static str,
        (vocab, dim): (usize, usize),
    ) -> Result<Self, Failed> {
        let mut random = Random::new((vocab + dim) as u64);
        let host = random.values(vocab * dim);
        let x = random.values(MOST * dim);
        let ids: Vec<u32> = (0..PROMPT).map(|_| random.bits() % vocab as u32).collect();
        let first = device.upload::<u16>(host.reinterpret_cast())?;
        let mut copies = Vec::new();
        for _ in 1..(PAST_L2 / (host.len() * 2)).max(2) {
            copies.push(device.copy(&first)?);
        }
        copies.push(first);
        Ok(Self {
            device,
            name,
            vocab,
            dim,
            device_x: device.upload::<u16>(x.reinterpret_cast())?,
            logits: device.room(MOST * vocab)?,
            device_ids: device.upload(&ids)?,
            embedded: device.room(PROMPT * dim)?,
            chosen: device.room(MOST)?,
            next: device.room(MOST)?,
            positions: device.upload(&[0; MOST])?,
            scratch: device.upload(&vec![0; argmax_scratch(MOST)])?,
            host,
            copies,
            x,
            ids,
        })
    }

    fn dense_mm(&self, m: usize, copy: usize, dependent: bool) -> Result<(), Error> {
        let args = DenseMm {
            m,
            n: self.vocab,
            k: self.dim,
            x: self.device_x.address,
            row_stride: self.dim,
            weight: self.copies[copy].address,
            weight_stride: self.dim,
            float: Float::Bf16,
            bias: None,
            out: self.logits.address,
            out_float: Float::F32,
            dependent,
        };
        // SAFETY: the buffers are as large as the sizes say and live until the stream is synchronized; weights are
        // written before the first launch only.
        unsafe { cuda::dense_mm(&self.device.stream, &args) }
    }

    fn argmax(&self, m: usize, dependent: bool) -> Result<(), Error> {
        let args = Argmax {
            batch: m,
            vocab: self.vocab,
            logits: self.logits.address,
            row_stride: self.vocab,
            float: Float::F32,
            ids: self.chosen.address,
            next: Some(self.next.address),
            positions: Some(self.positions.address),
            not_finite: None,
            scratch: self.scratch.address,
            dependent,
        };
        // SAFETY: as above; nothing reads the positions.
        unsafe { cuda::argmax(&self.device.stream, &args) }
    }

    fn embed(&self, n: usize, dependent: bool) -> Result<(), Error> {
        let args = Embed {
            n,
            vocab: self.vocab,
            dim: self.dim,
            table: self.copies[0].address,
            float: Float::Bf16,
            ids: self.device_ids.address,
            out: self.embedded.address,
            out_float: Float::Bf16,
            unknown: None,
            dependent,
        };
        // SAFETY: as above.
        unsafe { cuda::embed(&self.device.stream, &args) }
    }

    /// Compares some logits with sums in f64, and what is chosen with what the logits say.
    fn check(&self, m: usize, dependent: bool) -> Result<(), Failed> {
        self.device.poison(&self.logits)?;
        self.dense_mm(m, 0, dependent)?;
        self.argmax(m, dependent)?;
        let logits = self.device.download_part(&self.logits, 0..m * self.vocab)?;
        let chosen = self.device.download(&self.chosen)?;
        let mut random = Random::new(7);
        for i in 0..500 {
            let (row, col) = match i {
                0 => (m - 1, self.vocab - 1),
                _ => (
                    random.bits() as usize % m,
                    random.bits() as usize % self.vocab,
                ),
            };
            let x = &self.x[row * self.dim..][..self.dim];
            let weight = &self.host[col * self.dim..][..self.dim];
            let terms = x.iter().zip(weight).map(|(x, w)| x.to_f64() * w.to_f64());
            let (expected, magnitude) = terms.fold((0.0, 0.0), |(sum, magnitude), term: f64| {
                (sum + term, magnitude + term.abs())
            });
            let found = f64::from(logits[row * self.vocab + col]);
            let error = (found - expected).abs();
            // Also of NaN.
            if error.is_nan() || error > magnitude * 2f64.powi(-16) {
                return Err(format!("row {row}, {col}: {found} instead of {expected}").into());
            }
        }
        for (row, logits) in logits.chunks(self.vocab).enumerate() {
            let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let expected = logits.iter().position(|&logit| logit == largest);
            if Some(chosen[row] as usize) != expected {
                return Err(format!("row {row}: {} instead of {expected:?}", chosen[row]).into());
            }
        }
        Ok(())
    }

    fn check_embed(&self, n: usize, dependent: bool) -> Result<(), Failed> {
        self.device.poison(&self.embedded)?;
        self.embed(n, dependent)?;
        let found = self.device.download_part(&self.embedded, 0..n * self.dim)?;
        let found: &[bf16] = found.reinterpret_cast();
        for (&id, found) in self.ids.iter().zip(found.chunks(self.dim)) {
            if found != &self.host[id as usize * self.dim..][..self.dim] {
                return Err(format!("the row of {id} is not its own").into());
            }
        }
        Ok(())
    }

    /// Seconds of reading the weight alone, with the best of some grids.
    fn read(&self, args: &Args) -> Result<f64, Failed> {
        let bytes = self.host.len() * 2;
        let mut best = f64::INFINITY;
        for blocks in [1, 2, 4, 8] {
            // SAFETY: as above; `chosen` may be overwritten.
            let read = |copy: usize| unsafe {
                let from = (self.copies[copy].address, bytes);
                let (stream, to) = (&self.device.stream, self.chosen.address);
                cuda::probe::read(stream, from, to, blocks, args.dependent)
            };
            let seconds = self.device.time(args.replays, self.copies.len(), read)?;
            best = best.min(seconds);
        }
        Ok(best)
    }

    /// `read`: seconds of reading the weight alone, where that is the floor.
    fn line(&self, kernel: &str, m: usize, seconds: f64, bytes: usize, read: Option<f64>) {
        let ratio = read.map_or("-".to_string(), |read| format!("{:.2}", seconds / read));
        println!(
            "{:<14} {kernel:<16} {m:>5} {:>9.2} {:>7.0} {ratio:>7}",
            self.name,
            seconds * 1e6,
            bytes as f64 / seconds / 1e9,
        );
    }

    fn report(&self, args: &Args) -> Result<(), Failed> {
        let weight = self.host.len() * 2;
        let read = self.read(args)?;
        self.line("read", 0, read, weight, Some(read));
        for &m in args.m.iter().filter(|&&m| m <= MOST) {
            self.check(m, args.dependent)
                .map_err(|error| format!("{} with {m} rows: {error}", self.name))?;
            let seconds = self.device.time(args.replays, self.copies.len(), |copy| {
                self.dense_mm(m, copy, args.dependent)
            })?;
            let (rows, logits) = (m * self.dim * 2, m * self.vocab * 4);
            let moved = weight + rows + logits;
            self.line("dense_mm", m, seconds, moved, Some(read));
            // The logits are in the L2 cache, as after the product.
            let seconds = self
                .device
                .time(args.replays, COPIES, |_| self.argmax(m, args.dependent))?;
            self.line("argmax", m, seconds, logits, None);
            let seconds = self.device.time(args.replays, self.copies.len(), |copy| {
                self.dense_mm(m, copy, args.dependent)?;
                self.argmax(m, args.dependent)
            })?;
            self.line("both", m, seconds, moved + logits, Some(read));
        }
        let tokens = args.m.iter().filter(|&&m| m <= MOST).chain([&PROMPT]);
        for &n in tokens {
            self.check_embed(n, args.dependent)
                .map_err(|error| format!("{}, {n} ids: {error}", self.name))?;
            let seconds = self
                .device
                .time(args.replays, COPIES, |_| self.embed(n, args.dependent))?;
            self.line("embed", n, seconds, n * self.dim * 4, None);
        }
        Ok(())
    }
}

pub(crate) fn run(args: &Args) -> Result<(), Failed> {
    let device = Device::new()?;
    let gpu = Gpu::of(&device.stream)?;
    println!("{}: {gpu:?}", device.stream.context().name()?);
    println!(
        "{:<14} {:<16} {:>5} {:>9} {:>7} {:>7}",
        "model", "kernel", "M", "us", "GB/s", "x read"
    );
    let models = MODELS
        .into_iter()
        .filter(|(name, _)| name.contains(&args.layer));
    for (name, sizes) in models {
        Model::new(&device, name, sizes)?.report(args)?;
    }
    Ok(())
}
