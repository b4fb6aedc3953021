//! Scores a text with a model: mean negative log-likelihood and perplexity.

mod input;
mod logits_file;
mod score;

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::Result;
use candle_compressed_tensors::{Checkpoint, CtLinear};
use candle_fp8::Quantization;
use candle_fp8_examples::{Loaded, ModelArgs, STORIES_LLAMA, cli, units};
use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

use logits_file::LogitsFile;
use score::{Passes, Score};

/// Scores a text with a model: mean negative log-likelihood and perplexity.
#[derive(Parser, Debug)]
#[command(version, after_help = METHOD)]
struct Args {
    #[command(flatten)]
    text: TextArgs,

    /// Tokens that are seen together. [default: the whole text, or windows of the model's max_position_embeddings if the
    /// text is longer]
    #[arg(long, value_name = "TOKENS")]
    window: Option<usize>,

    /// Write the logits of every token of the text to this safetensors file: `logits`, F32 [tokens, vocab].
    #[arg(long, value_name = "FILE")]
    logits_out: Option<PathBuf>,

    /// Print one JSON object on stdout.
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    model: ModelArgs,
}

#[derive(clap::Args, Debug)]
#[group(required = true, multiple = false)]
struct TextArgs {
    /// A text, split into tokens by the checkpoint's tokenizer.json, special tokens added as it says.
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,

    /// Token ids separated by whitespace, taken as they are: no tokenizer is needed.
    #[arg(long, value_name = "FILE")]
    ids: Option<PathBuf>,
}

/// What the numbers mean.
const METHOD: &str = "\
What is scored:
  The text is cut into consecutive windows of --window tokens, which do not overlap and do not see each other; the last
  one may be shorter. Every token of a window is scored given those before it in its window, except the window's first,
  which is given to the model but not scored. The mean is over all scored tokens of the text: `scored_tokens` of the
  JSON, where `tokens` counts all of them and `mean_nll` is in nats. Perplexity is exp(mean_nll). The softmax is in f64.
  Published perplexities often use windows of 2048.

  A window whose logits would take more than 256 MiB goes through in several passes over one KV cache, which is the same
  but for rounding; it goes in one where inputs are quantized dynamically per tensor.

  Row i of --logits-out belongs to token i of the text, and predicts token i + 1; the last row of a window predicts
  nothing that is scored.";

/// Keeps freed memory. The system's gives large pieces back, and every page of the next prompt is made anew.
// Not in the unit tests, which several examples share.
#[cfg(all(feature = "mimalloc", not(test)))]
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    cli::run(run)
}

fn run() -> Result<()> {
    let args = Args::parse();
    let checkpoint = args.model.open(STORIES_LLAMA)?;
    let config = ModelArgs::model_config(&checkpoint)?;
    let ids = read(&args.text, &checkpoint)?;
    let window = args.window.unwrap_or(config.max_position_embeddings);
    input::check_ids(&ids, config.vocab_size, window)?;
    let window = window.min(ids.len());

    let loaded = args.model.load_checkpoint(checkpoint, config)?;
    let per_tensor = |linear: &CtLinear| match linear {
        CtLinear::Fp8(linear) => matches!(linear.activations(), Some(Quantization::PerTensor)),
        CtLinear::Dense(_) => false,
    };
    let whole = loaded.model.linears().any(|(_, linear)| per_tensor(linear));
    let passes = Passes::new(window, loaded.config.vocab_size, whole);

    let start = Instant::now();
    let score = through(&args, &loaded, &ids, passes)?;
    let seconds = start.elapsed().as_secs_f64();

    let text = match args.json {
        true => {
            let options = loaded.quantizer.options();
            let json = json!({
                "model": loaded.checkpoint.dir().display().to_string(),
                "dtype": loaded.dtype.as_str(),
                "fp8": loaded.quantizer.use_fp8_kernel(),
                "activations": options.activations.name(),
                "tokens": ids.len(),
                "scored_tokens": score.scored,
                "window": passes.window,
                "mean_nll": score.mean_nll(),
                "perplexity": score.perplexity(),
                "seconds": seconds,
            });
            format!("{json}\n")
        }
        false => format!(
            "{}, {} ({})\n\
             tokens                        {} in windows of {}, {} scored\n\
             mean negative log-likelihood  {}\n\
             perplexity                    {}\n\
             speed                         {}\n",
            loaded.checkpoint.dir().display(),
            loaded.setting(),
            loaded.linears(),
            ids.len(),
            passes.window,
            score.scored,
            score.mean_nll(),
            score.perplexity(),
            units::tokens_per_second(ids.len() as f64 / seconds),
        ),
    };
    Ok(std::io::stdout().lock().write_all(text.as_bytes())?)
}

fn read(args: &TextArgs, checkpoint: &Checkpoint) -> Result<Vec<u32>> {
    match (&args.ids, &args.text) {
        (Some(path), _) => input::read_ids(path),
        (None, Some(path)) => input::read_text(path, checkpoint),
        // The group is required.
        (None, None) => anyhow::bail!("give --text FILE or --ids FILE"),
    }
}

/// Runs the text through the model, logits into the file if there is one.
fn through(args: &Args, loaded: &Loaded, ids: &[u32], passes: Passes) -> Result<Score> {
    let vocab = loaded.config.vocab_size;
    let mut file = match &args.logits_out {
        Some(path) => Some(LogitsFile::create(path, ids.len(), vocab)?),
        None => None,
    };
    let bar = ProgressBar::new(ids.len() as u64);
    if let Ok(style) = ProgressStyle::with_template("tokens [{bar:30}] {pos}/{len} {eta}") {
        bar.set_style(style.progress_chars("=> "));
    }
    let score = score::score(
        &loaded.model,
        ids,
        passes,
        |logits| match &mut file {
            Some(file) => file.append(logits),
            None => Ok(()),
        },
        |done| bar.set_position(done as u64),
    );
    bar.finish_and_clear();
    let score = score?;
    if let Some(file) = file {
        file.finish()?;
    }
    Ok(score)
}
