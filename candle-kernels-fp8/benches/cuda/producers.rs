//! Kernels that write a product's activations, alone and with the result quantized, checked and timed.

use candle_kernels_fp8::cuda::Gpu;

use crate::Args;
use crate::cases;
use crate::device::{Device, Failed};
use crate::products::{self, PAST_L2, Weights};
use crate::tokens::Tokens;

/// The weights, by name, that products multiply with what is written: each says a width.
const CONSUMERS: [&str; 2] = ["qkv-8b", "down-8b"];

/// A kernel of one launch. `fused`: it quantizes its result per token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Producer {
    /// RMS norm; of the sum of two, which it writes too, with `add`.
    Norm { add: bool, fused: bool },
    /// SiLU(gate) · up.
    SiluMul { fused: bool },
    /// With a scale for each token, or for each so many neighbours.
    Quantize { group: Option<usize> },
    /// Values to codes, without a scale.
    Encode,
    /// Codes to values, without a scale.
    Decode,
    /// Codes to values, with a scale for each row.
    Dequantize,
}

impl Producer {
    /// What is timed before the product that `consumer` names; what is alone comes before what is fused.
    fn before(consumer: &str) -> Vec<Self> {
        let own = match consumer {
            "qkv-8b" => vec![
                Self::Norm {
                    add: false,
                    fused: false,
                },
                Self::Norm {
                    add: false,
                    fused: true,
                },
                Self::Norm {
                    add: true,
                    fused: false,
                },
                Self::Norm {
                    add: true,
                    fused: true,
                },
            ],
            _ => vec![
                Self::SiluMul { fused: false },
                Self::SiluMul { fused: true },
            ],
        };
        let of_any_width = [
            Self::Quantize { group: None },
            Self::Quantize { group: Some(128) },
            Self::Encode,
            Self::Decode,
            Self::Dequantize,
        ];
        own.into_iter().chain(of_any_width).collect()
    }

    fn name(self) -> &'static str {
        match self {
            Self::Norm { add, fused } => match (add, fused) {
                (false, false) => "rms_norm",
                (false, true) => "rms_norm -> quantize",
                (true, false) => "add + rms_norm",
                (true, true) => "add + rms_norm -> quantize",
            },
            Self::SiluMul { fused: false } => "silu_mul",
            Self::SiluMul { fused: true } => "silu_mul -> quantize",
            Self::Quantize { group: None } => "quantize token",
            Self::Quantize { group: Some(_) } => "quantize group 128",
            Self::Encode => "cast bf16 -> e4m3",
            Self::Decode => "cast e4m3 -> bf16",
            Self::Dequantize => "dequantize channel -> bf16",
        }
    }

    /// The same without quantizing, of one that is fused.
    pub(crate) fn alone(self) -> Option<Self> {
        match self {
            Self::Norm { add, fused: true } => Some(Self::Norm { add, fused: false }),
            Self::SiluMul { fused: true } => Some(Self::SiluMul { fused: false }),
            _ => None,
        }
    }

    /// Bytes that must move for rows `[m, k]`: each input and output once.
    fn bytes(self, m: usize, k: usize) -> usize {
        let (values, codes, scale) = (2 * m * k, m * k, 4);
        let result = |fused| if fused { codes + m * scale } else { values };
        match self {
            Self::Norm { add, fused } => {
                let weight = 2 * k;
                let sums = if add { 2 * values } else { 0 };
                values + sums + weight + result(fused)
            }
            Self::SiluMul { fused } => 2 * values + result(fused),
            Self::Quantize { group } => values + codes + m * k.div_ceil(group.unwrap_or(k)) * scale,
            Self::Encode | Self::Decode => values + codes,
            Self::Dequantize => values + codes + m * scale,
        }
    }

    /// Launches of a graph, each of which has its own copy of the activations.
    fn copies(self, m: usize, k: usize) -> usize {
        (PAST_L2 / self.bytes(m, k)).clamp(2, 64)
    }
}

pub(crate) fn run(args: &Args) -> Result<(), Failed> {
    let device = Device::new()?;
    let gpu = Gpu::of(&device.stream)?;
    println!("{}: {gpu:?}", device.stream.context().name()?);
    println!(
        "{:<26} {:>6} {:>5} {:>9} {:>7} {:>9} {:>10}",
        "kernel", "K", "M", "us", "GB/s", "extra us", "% product"
    );
    for consumer in CONSUMERS {
        let (n, k) = cases::shape(consumer)?;
        let weights = Weights::new(&device, args, n, k)?;
        let producers = Producer::before(consumer);
        for &m in &args.m {
            let product = products::seconds(&device, &weights, args, m)?;
            let moved = n * k + m * k + 2 * m * n;
            line(&format!("product {n} x {k}"), (k, m), product, moved, None);
            let copies = producers.iter().map(|producer| producer.copies(m, k));
            let tokens = Tokens::new(&device, (m, k), copies.max().unwrap_or(1))?;
            let mut timed: Vec<(Producer, f64)> = Vec::new();
            for &producer in &producers {
                tokens
                    .check(producer, args.dependent)
                    .map_err(|error| format!("{} [{m}, {k}]: {error}", producer.name()))?;
                let seconds = device.time(args.replays, producer.copies(m, k), |copy| {
                    tokens.launch(producer, copy, args.dependent)
                })?;
                timed.push((producer, seconds));
                let alone = |alone| timed.iter().find(|(producer, _)| *producer == alone);
                let extra = match producer {
                    Producer::Quantize { .. } => Some(seconds),
                    _ => producer
                        .alone()
                        .and_then(alone)
                        .map(|(_, alone)| seconds - alone),
                };
                let extra = extra.map(|extra| (extra, extra / product));
                let moved = producer.bytes(m, k);
                line(producer.name(), (k, m), seconds, moved, extra);
            }
        }
    }
    Ok(())
}

/// `extra`: seconds, and their share of the product.
fn line(name: &str, (k, m): (usize, usize), seconds: f64, bytes: usize, extra: Option<(f64, f64)>) {
    let (extra, share) = match extra {
        Some((extra, share)) => (
            format!("{:.2}", extra * 1e6),
            format!("{:.1}", share * 100.0),
        ),
        None => ("-".to_string(), "-".to_string()),
    };
    println!(
        "{name:<26} {k:>6} {m:>5} {:>9.2} {:>7.0} {extra:>9} {share:>10}",
        seconds * 1e6,
        bytes as f64 / seconds / 1e9,
    );
}
