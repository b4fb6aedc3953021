//! Times prompts and decode steps of a model of random FP8 weights: no checkpoint is needed.

mod fill;
mod measure;
mod memory;
mod random;
mod report;
mod shape;
mod traffic;

use std::io::Write;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device};
use candle_fp8_examples::{DeviceArgs, cli, units};
use candle_fp8_transformers::CausalLm;
use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};

use memory::Largest;
use random::RandomWeights;
use report::Report;
use shape::Shape;

/// Times a model of random FP8 weights: no checkpoint is needed.
///
/// Linears are FP8 with a scale for each output channel, and their inputs are quantized for each token, as in an
/// FP8-dynamic checkpoint. As there, embedding, norms, router and lm_head are dense; so are merged experts.
#[derive(Parser, Debug)]
#[command(version, after_help = METHOD)]
struct Args {
    /// Dimensions of the model.
    #[arg(long, value_enum, default_value_t = Shape::Llama1b)]
    shape: Shape,

    /// Take only the first N layers. [default: all]
    #[arg(long, value_name = "N")]
    layers: Option<usize>,

    /// Lengths of prompts, one sequence each; 0 for none.
    #[arg(
        long,
        value_name = "TOKENS",
        value_delimiter = ',',
        default_value = "512,2048"
    )]
    prefill: Vec<usize>,

    /// Decode steps of each run; 0 for none.
    #[arg(long, value_name = "TOKENS", default_value_t = 64)]
    decode: usize,

    /// Positions in the cache of each sequence when decoding starts.
    #[arg(
        long,
        value_name = "TOKENS",
        value_delimiter = ',',
        default_value = "128"
    )]
    context: Vec<usize>,

    /// Sequences that are decoded together.
    #[arg(
        long,
        value_name = "SEQUENCES",
        value_delimiter = ',',
        default_value = "1,8"
    )]
    batch: Vec<usize>,

    /// Print one JSON object on stdout.
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    device: DeviceArgs,
}

/// What the numbers mean.
const METHOD: &str = "\
What is measured:
  prefill    One prompt of random tokens, from the token ids to the token sampled after it. The median of 3 runs,
             or of fewer when they take more than 5 s; a short prompt warms up.
  decode     Greedy steps of all sequences together, after --context random positions and one step to warm up.
  tokens/s   Of all sequences together. Sampling (argmax) and the read-back of the token are inside the time.
  bytes a token
             What a decode step has to read, divided by the sequences, in the mean over the steps: every weight and
             scale once; of the embedding one row a sequence; keys and values of every position, the new one included.
             Of E experts, those that are touched: k for one sequence; for a batch the mean when every token takes k
             at random, E·(1 - (1 - k/E)^batch) (computed, not counted).
  GB/s       tokens/s × bytes a token, in 10^9 bytes a second.
Logits are checked to be finite in every step; if they are not, the run fails.";

fn main() -> ExitCode {
    cli::run(run)
}

fn run() -> Result<()> {
    let args = Args::parse();
    ensure!(
        args.batch
            .iter()
            .chain(&args.context)
            .all(|&number| number > 0),
        "--batch and --context: expected numbers of at least 1"
    );
    let device = args.device.device()?;
    let dtype = args.device.dtype(&device);
    let layers = args.layers.unwrap_or(args.shape.layers());
    let model = make(&args, layers, dtype, &device)?;

    let mut report = Report::new(args.shape, layers, &device, dtype, model.weight_bytes());
    for &tokens in args.prefill.iter().filter(|&&tokens| tokens > 0) {
        cli::note(format_args!("prefill: {tokens} tokens"));
        report.prefill.push(measure::prefill(&model, tokens)?);
    }
    if args.decode > 0 {
        for &context in &args.context {
            for &batch in &args.batch {
                let steps = units::plural(args.decode, "step");
                cli::note(format_args!(
                    "decode: {steps} of {batch}, context {context}"
                ));
                let run = measure::decode(&model, batch, context, args.decode);
                report.decode.push(run?);
            }
        }
    }
    let text = match args.json {
        true => serde_json::to_string(&report)? + "\n",
        false => report.to_string(),
    };
    Ok(std::io::stdout().lock().write_all(text.as_bytes())?)
}

/// The model, if there is memory for it and for the largest of its runs.
fn make(args: &Args, layers: usize, dtype: DType, device: &Device) -> Result<CausalLm> {
    let largest = |numbers: &[usize]| numbers.iter().copied().max().unwrap_or(0);
    let (prompt, context) = (largest(&args.prefill), largest(&args.context));
    let (batch, decodes) = (largest(&args.batch), args.decode > 0);
    let longest = match decodes {
        true => context
            .checked_add(args.decode)
            .context("--context and --decode are too large")?,
        false => 0,
    };
    let product = |a: usize, b: usize| {
        a.checked_mul(b)
            .filter(|&positions| positions < 1 << 40)
            .context(
                "--batch, --context and --prefill ask for more positions than any memory holds",
            )
    };
    let runs = Largest {
        tokens: product(prompt, 1)?.max(product(batch, context)?),
        positions: product(prompt, 1)?.max(product(batch, longest)?),
        context: prompt.max(longest),
        batch,
    };
    let free = memory::available(device);
    let need = memory::check(args.shape, layers, dtype, device.is_cpu(), runs, free)?;

    let bar = ProgressBar::new(need.weights);
    let template = "random weights [{bar:30}] {bytes}/{total_bytes} {eta}";
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style.progress_chars("=> "));
    }
    let start = Instant::now();
    let weights = RandomWeights::new({
        let bar = bar.clone();
        move |bytes| bar.inc(bytes)
    });
    let config = args.shape.config(layers)?;
    let model = CausalLm::load(&config, &weights, weights.var_builder(dtype, device));
    bar.finish_and_clear();
    let model = model?;
    cli::note(format_args!(
        "{}, {}: {} of random weights in {:.1} s",
        args.shape.name(),
        units::plural(layers, "layer"),
        units::bytes(model.weight_bytes() as u64),
        start.elapsed().as_secs_f64()
    ));
    Ok(model)
}
