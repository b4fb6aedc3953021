//! Single linears against the clock, the machine and Candle.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use candle_compressed_tensors::{CtLinear, LinearSource};
use candle_core::{DType, Device, Tensor};
use candle_fp8::{Input, Quantization, ScaleLayout, Weight};
use candle_fp8_examples::{cli, units};
use candle_fp8_transformers::ModelConfig;
use candle_nn::Module;
use serde::Serialize;

use super::exact;
use super::machine::{Machine, READ_BYTES};
use super::memory;
use super::random::RandomWeights;
use super::shape::Shape;

/// A linear is run again and again for so long, and at least [`RUNS`] times.
const TIME: Duration = Duration::from_millis(400);
/// See [`TIME`]. Candle's own gets as many.
const RUNS: usize = 3;

/// One linear with one number of rows, compared with the machine.
#[derive(Debug, Serialize)]
pub(crate) struct LinearTime {
    /// As the model runs it: `qkv_proj` is three weights in one call.
    pub(crate) linear: &'static str,
    /// Of the weight: `fp8` or `bf16`.
    pub(crate) weight: &'static str,
    /// Output features, of all weights together.
    pub(crate) n: usize,
    /// Input features.
    pub(crate) k: usize,
    /// Rows of activations.
    pub(crate) m: usize,
    /// The median.
    pub(crate) us: f64,
    /// Weights and scales, in 10⁹ bytes a second.
    pub(crate) gb_s: f64,
    /// `2 · M · N · K`, in 10⁹ a second.
    pub(crate) gflop_s: f64,
    /// What the machine allows: the larger of weights and scales at its read bandwidth, and operations at its
    /// multiply-add rate; in percent of the time that was taken.
    pub(crate) peak_percent: f64,
    /// Which of the two it is: `read` or `multiply`.
    pub(crate) bound: &'static str,
    /// Candle's dense BF16 linear of the same shape: its best time.
    pub(crate) candle_us: f64,
    /// How many times as long Candle takes.
    pub(crate) times_candle: f64,
}

/// What to measure.
pub(crate) struct Plan<'a> {
    pub(crate) shape: Shape,
    /// Numbers of activation rows.
    pub(crate) rows: &'a [usize],
    /// Of the activations.
    pub(crate) dtype: DType,
    /// Bytes of weights that runs take turns with, at least.
    pub(crate) rotate: u64,
}

/// What was measured of one linear with `m` rows.
#[derive(Debug, Clone)]
pub(crate) struct Timed {
    linear: Shared,
    m: usize,
    us: f64,
    candle_us: f64,
}

/// A linear of a model: weights `[n, k]` that share their input.
#[derive(Debug, Clone)]
struct Shared {
    name: &'static str,
    fp8: bool,
    n: Vec<usize>,
    k: usize,
}

impl Shared {
    fn elements(&self) -> usize {
        self.n.iter().sum::<usize>() * self.k
    }

    /// Of weights and scales.
    fn bytes(&self) -> u64 {
        let bytes = match self.fp8 {
            true => self.elements() + 4 * self.n.iter().sum::<usize>(),
            false => 2 * self.elements(),
        };
        bytes as u64
    }
}

/// The linears of a layer and the head, each once.
fn linears(config: &ModelConfig) -> Vec<Shared> {
    let (hidden, inner) = (config.hidden_size, config.intermediate_size);
    let (q, kv) = (
        config.num_attention_heads * config.head_dim,
        config.num_key_value_heads * config.head_dim,
    );
    let shared = |name, fp8, n: &[usize], k| Shared {
        name,
        fp8,
        n: n.to_vec(),
        k,
    };
    let mut linears = vec![
        shared("qkv_proj", true, &[q, kv, kv], hidden),
        shared("o_proj", true, &[hidden], q),
    ];
    if config.moe.is_none() {
        linears.push(shared("gate_up_proj", true, &[inner, inner], hidden));
        linears.push(shared("down_proj", true, &[hidden], inner));
    }
    linears.push(shared("lm_head", true, &[config.vocab_size], hidden));
    linears.push(shared("lm_head", false, &[config.vocab_size], hidden));
    linears
}

impl Plan<'_> {
    /// Times every linear with every number of rows.
    pub(crate) fn measure(&self) -> Result<Vec<Timed>> {
        let mut times = Vec::new();
        for linear in linears(&self.shape.config(1)?) {
            let ours = self.ours(&linear)?;
            let candles = self.candles(&linear)?;
            let pairs = self.rows.iter().zip(ours.into_iter().zip(candles));
            times.extend(pairs.map(|(&m, (us, candle_us))| Timed {
                linear: linear.clone(),
                m,
                us,
                candle_us,
            }));
        }
        Ok(times)
    }

    /// The median time of our call in µs, for each number of rows.
    fn ours(&self, linear: &Shared) -> Result<Vec<f64>> {
        let weights = weights(linear)?;
        let copies = rotation(&weights, linear.bytes(), self.rotate)?;
        let time = |&m: &usize| {
            let rows = units::plural(m, "row");
            let what = format!("{} in {}, {rows}", linear.name, kind(linear.fp8));
            cli::note(&what);
            let x = activations(m, linear.k, self.dtype)?;
            check(&x, &weights).context(what)?;
            let times = repeat(&copies, |weights| run(&x, weights))?;
            Ok(times[times.len() / 2])
        };
        self.rows.iter().map(time).collect()
    }

    /// The best time of Candle's call in µs, for each number of rows.
    fn candles(&self, linear: &Shared) -> Result<Vec<f64>> {
        let weight = dense_weight(linear.n.iter().sum(), linear.k)?;
        let dense = candle_nn::Linear::new(weight, None);
        let copies = rotation(&dense, 2 * linear.elements() as u64, self.rotate)?;
        let time = |&m: &usize| {
            let x = activations(m, linear.k, DType::BF16)?;
            Ok(repeat(&copies, |linear| Ok(linear.forward(&x)?))?[0])
        };
        self.rows.iter().map(time).collect()
    }

    /// Errs if the largest of the linears, or Candle's way with it, does not fit.
    pub(crate) fn check_memory(&self) -> Result<()> {
        let rows = self.rows.iter().copied().max().unwrap_or(0) as u64;
        let linears = linears(&self.shape.config(1)?);
        let need = linears.iter().map(|linear| {
            let turns =
                |bytes: u64| bytes.saturating_mul(copies(bytes, self.rotate).saturating_add(1));
            let n: usize = linear.n.iter().sum();
            // Activations and products in two dtypes.
            let work = 6 * rows * (linear.k + n) as u64;
            // Candle widens a BF16 weight to f32.
            let widened = 4 * linear.elements() as u64;
            let largest = turns(linear.bytes()).max(turns(2 * linear.elements() as u64));
            largest.saturating_add(widened + work)
        });
        let need = need.max().unwrap_or(0).max(READ_BYTES);
        let free = memory::available(&Device::Cpu);
        if let Some(free) = free.filter(|&free| need > free) {
            bail!(
                "--linears needs {:.1} GB, and {:.1} GB are free; take a smaller --rotate or fewer --rows",
                need as f64 / 1e9,
                free as f64 / 1e9
            );
        }
        Ok(())
    }
}

impl Timed {
    /// The rates, and what of `machine` they are.
    pub(crate) fn against(&self, machine: &Machine) -> LinearTime {
        let Self { linear, m, us, .. } = self;
        let n: usize = linear.n.iter().sum();
        let flop = 2. * (m * n * linear.k) as f64;
        let bytes = linear.bytes() as f64;
        // 10⁹ a second are 10³ in a µs.
        let read_us = bytes / machine.read_gb_s / 1e3;
        let multiply_us = flop / machine.multiply_gflop_s / 1e3;
        let bound = match read_us >= multiply_us {
            true => "read",
            false => "multiply",
        };
        LinearTime {
            linear: linear.name,
            weight: kind(linear.fp8),
            n,
            k: linear.k,
            m: *m,
            us: *us,
            gb_s: bytes / us / 1e3,
            gflop_s: flop / us / 1e3,
            peak_percent: 100. * read_us.max(multiply_us) / us,
            bound,
            candle_us: self.candle_us,
            times_candle: self.candle_us / us,
        }
    }
}

fn kind(fp8: bool) -> &'static str {
    match fp8 {
        true => "fp8",
        false => "bf16",
    }
}

/// Weights that share their input.
#[derive(Clone)]
enum Weights {
    /// Codes `[n, k]` and scales `[n, 1]`.
    Fp8(Vec<(Tensor, Tensor)>),
    /// `[n, k]`.
    Bf16(Tensor),
}

/// A thing of which there can be copies with memory of their own.
trait Copies: Sized {
    fn deep_copy(&self) -> Result<Self>;
}

impl Copies for Weights {
    fn deep_copy(&self) -> Result<Self> {
        Ok(match self {
            Self::Fp8(pairs) => {
                let pairs = pairs.iter();
                let copies = pairs.map(|(codes, scales)| Ok((codes.copy()?, scales.copy()?)));
                Self::Fp8(copies.collect::<Result<_>>()?)
            }
            Self::Bf16(weight) => Self::Bf16(weight.copy()?),
        })
    }
}

impl Copies for candle_nn::Linear {
    fn deep_copy(&self) -> Result<Self> {
        Ok(Self::new(self.weight().copy()?, None))
    }
}

/// So many copies that together they have `rotate` bytes: when it is a copy's turn again, no cache has it any more.
fn rotation<T: Copies>(weights: &T, bytes: u64, rotate: u64) -> Result<Vec<T>> {
    (0..copies(bytes, rotate))
        .map(|_| weights.deep_copy())
        .collect()
}

fn copies(bytes: u64, rotate: u64) -> u64 {
    rotate.div_ceil(bytes).max(1)
}

/// The sorted times of `run` in µs, with each of `copies` in turn, after a run to warm up.
fn repeat<T, Y>(copies: &[T], mut run: impl FnMut(&T) -> Result<Y>) -> Result<Vec<f64>> {
    let mut turn = copies.iter().cycle();
    let mut times = Vec::new();
    let begin = Instant::now();
    let mut warm = false;
    while times.len() < RUNS || begin.elapsed() < TIME {
        let weights = turn.next().context("no weights to take turns")?;
        let start = Instant::now();
        std::hint::black_box(run(weights)?);
        let time = start.elapsed().as_secs_f64() * 1e6;
        if std::mem::replace(&mut warm, true) {
            times.push(time);
        }
    }
    times.sort_unstable_by(f64::total_cmp);
    Ok(times)
}

/// One call, as the model makes it.
fn run(x: &Tensor, weights: &Weights) -> Result<Vec<Tensor>> {
    let layout = ScaleLayout::Channel;
    match weights {
        Weights::Fp8(pairs) => {
            let pairs = pairs.iter().map(|(codes, scale)| Weight {
                codes: codes.into(),
                scale,
                layout,
                bias: None,
            });
            let input = Input::Quantize(x, Quantization::PerToken);
            Ok(candle_fp8::scaled_mm_many(
                input,
                &pairs.collect::<Vec<_>>(),
            )?)
        }
        Weights::Bf16(weight) => Ok(vec![candle_fp8::dense_mm(x, weight, None)?]),
    }
}

fn weights(linear: &Shared) -> Result<Weights> {
    if !linear.fp8 {
        let n = linear.n.iter().sum();
        return Ok(Weights::Bf16(dense_weight(n, linear.k)?));
    }
    let random = RandomWeights::new(|_| ());
    let vb = random.var_builder(DType::BF16, &Device::Cpu);
    let pair = |(index, &n): (usize, &usize)| {
        let name = format!("{}.{index}", linear.name);
        match random.linear_b(linear.k, n, false, vb.pp(name))? {
            CtLinear::Fp8(fp8) => Ok((fp8.weight()?, fp8.weight_scale().clone())),
            CtLinear::Dense(_) => bail!("{}: random weights in FP8 came out dense", linear.name),
        }
    };
    let pairs = linear.n.iter().enumerate().map(pair);
    Ok(Weights::Fp8(pairs.collect::<Result<_>>()?))
}

/// BF16 `[n, k]`.
fn dense_weight(n: usize, k: usize) -> Result<Tensor> {
    let vb = RandomWeights::new(|_| ()).var_builder(DType::BF16, &Device::Cpu);
    Ok(vb.get((n, k), "weight")?)
}

/// `[m, k]` of variance 1.
fn activations(m: usize, k: usize, dtype: DType) -> Result<Tensor> {
    let vb = RandomWeights::new(|_| ()).var_builder(dtype, &Device::Cpu);
    Ok(vb.get((m, k), "embed_tokens.weight")?)
}

/// Errs if a product is not what plain f64 arithmetic says, in some rows and output features.
fn check(x: &Tensor, weights: &Weights) -> Result<()> {
    let products = run(x, weights)?;
    match weights {
        Weights::Fp8(pairs) => {
            ensure!(products.len() == pairs.len(), "a product is missing");
            for (y, (codes, scales)) in products.iter().zip(pairs) {
                exact::check_fp8(x, codes, scales, y)?;
            }
            Ok(())
        }
        Weights::Bf16(weight) => exact::check_dense(x, weight, &products[0]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_share_is_of_the_ceiling_that_holds() {
        let machine = Machine {
            threads: 2,
            instruction_set: "generic",
            read_gb_s: 10.,
            multiply_gflop_s: 100.,
        };
        let linear = Shared {
            name: "o_proj",
            fp8: true,
            n: vec![60, 40],
            k: 996,
        };
        // (996 + 4) · 100 bytes at 10 GB/s: 10 µs.
        let timed = |m, us| Timed {
            linear: linear.clone(),
            m,
            us,
            candle_us: 100.,
        };
        let one = timed(1, 20.).against(&machine);
        assert_eq!((one.n, one.k, one.bound), (100, 996, "read"));
        assert!((one.peak_percent - 50.).abs() < 1e-9, "{one:?}");
        assert!((one.gb_s - 5.).abs() < 1e-9 && (one.times_candle - 5.).abs() < 1e-9);
        // 2 · 100 · 100 · 996 operations at 100 GFLOP/s: 199.2 µs.
        let many = timed(100, 249.).against(&machine);
        assert_eq!(many.bound, "multiply");
        assert!((many.peak_percent - 80.).abs() < 1e-9, "{many:?}");
        assert!((many.gflop_s - 80.).abs() < 1e-9);
    }

    #[test]
    fn copies_take_turns_and_own_their_memory() {
        assert_eq!(
            [copies(100, 0), copies(100, 100), copies(100, 101)],
            [1, 1, 2]
        );
        let mut seen = Vec::new();
        let times = repeat(&[1, 2, 3], |&copy| {
            seen.push(copy);
            std::thread::sleep(Duration::from_millis(100));
            Ok(())
        });
        let times = times.unwrap();
        assert_eq!(times.len() + 1, seen.len());
        assert!(times.len() >= RUNS && times.is_sorted());
        assert_eq!(seen[..4], [1, 2, 3, 1]);
    }

    #[test]
    fn a_wrong_product_is_no_measurement() {
        let linear = Shared {
            name: "qkv_proj",
            fp8: true,
            n: vec![24, 8],
            k: 64,
        };
        let right = weights(&linear).unwrap();
        let x = activations(5, 64, DType::F32).unwrap();
        check(&x, &right).unwrap();
        let Weights::Fp8(pairs) = right else {
            panic!("FP8 was asked for")
        };
        // The product of other scales.
        let (codes, scales) = &pairs[1];
        let wrong = Weights::Fp8(vec![(codes.clone(), (scales * 1.01).unwrap())]);
        let y = run(&x, &wrong).unwrap();
        let error = exact::check_fp8(&x, codes, scales, &y[0]).unwrap_err();
        assert!(error.to_string().contains("expected"), "{error}");
        let dense = Shared {
            fp8: false,
            ..linear
        };
        check(&x, &weights(&dense).unwrap()).unwrap();
    }
}
