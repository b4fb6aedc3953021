//! What `llama-fp8` and `qwen-fp8` do: a prompt in, text out as it comes, and one line of figures.

use std::{io::Write, num::NonZeroUsize, process::ExitCode, time::Duration};

use anyhow::{Context, bail};
use candle_fp8_transformers::{
    Architecture, FinishReason, GenerationConfig, ModelConfig, TextGeneration, Timings,
};
use clap::{Args, CommandFactory, FromArgMatches, Parser};
use indicatif::{ProgressBar, ProgressStyle};

use crate::{
    Loaded, ModelArgs, Transfers,
    chat::{ChatTemplate, Message},
    cli,
    model::read_json,
    tokens::TextTokenizer,
    units,
};

/// What tells one text-generating example from another.
pub struct Example {
    /// Its name, as `cargo run --example` takes it.
    pub name: &'static str,
    /// What it does, in a sentence.
    pub about: &'static str,
    /// The default model: a folder of `tests/checkpoints`.
    pub embedded: &'static str,
    /// The default prompt, for the default model.
    pub prompt: &'static str,
    /// A model on the hub to try.
    pub model_id: &'static str,
    /// The architectures that it runs.
    pub architectures: &'static [Architecture],
    /// The example that runs the others.
    pub other: &'static str,
}

#[derive(Parser)]
struct Flags {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    text: TextArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
}

#[derive(Args)]
#[command(next_help_heading = "Text")]
struct TextArgs {
    /// What the model continues or, if it has a chat template, answers.
    #[arg(long, value_name = "TEXT")]
    prompt: String,

    /// Give the prompt to the model as it is, without its chat template.
    #[arg(long, visible_alias = "no-chat-template")]
    raw: bool,

    /// Generate at most this many tokens; the text may end before.
    #[arg(short = 'n', long, value_name = "TOKENS", default_value_t = 512)]
    sample_len: usize,

    /// Size of the KV cache: the most tokens that prompt and text have together. [default: what the prompt and --sample-len
    /// need, at most the model's context length]
    #[arg(long, value_name = "TOKENS")]
    max_seq: Option<NonZeroUsize>,
}

#[derive(Args)]
#[command(next_help_heading = "Sampling")]
struct SamplingArgs {
    /// Divides the logits before sampling; 0 always takes the most probable token. [default: what generation_config.json
    /// recommends, else 0]
    #[arg(long, value_name = "NUMBER", value_parser = temperature, allow_negative_numbers = true)]
    temperature: Option<f64>,

    /// Sample among the most probable tokens that together have this probability; 1 is off. [default: what
    /// generation_config.json recommends, else 1]
    #[arg(long, value_name = "PROBABILITY", value_parser = probability, allow_negative_numbers = true)]
    top_p: Option<f64>,

    /// Sample among this many most probable tokens; 0 is off. [default: what generation_config.json recommends, else 0]
    #[arg(long, value_name = "TOKENS")]
    top_k: Option<usize>,

    /// Seed of the sampler: the same seed gives the same text.
    #[arg(long, value_name = "INTEGER", default_value_t = GenerationConfig::default().seed)]
    seed: u64,

    /// Makes recent tokens less probable; 1 is off. [default: what generation_config.json recommends, else 1]
    #[arg(long, value_name = "FACTOR", value_parser = penalty, allow_negative_numbers = true)]
    repeat_penalty: Option<f32>,

    /// How many of the last tokens the repeat penalty looks at.
    #[arg(long, value_name = "TOKENS", default_value_t = GenerationConfig::default().repeat_last_n)]
    repeat_last_n: usize,
}

fn temperature(text: &str) -> Result<f64, String> {
    let value = text.parse::<f64>().ok();
    let value = value.filter(|value| value.is_finite() && *value >= 0.0);
    value.ok_or_else(|| "expected a number, 0 or more".to_string())
}

fn probability(text: &str) -> Result<f64, String> {
    let value = text.parse::<f64>().ok();
    let value = value.filter(|value| *value > 0.0 && *value <= 1.0);
    value.ok_or_else(|| "expected a number above 0, at most 1".to_string())
}

fn penalty(text: &str) -> Result<f32, String> {
    let value = text.parse::<f32>().ok();
    let value = value.filter(|value| value.is_finite() && *value > 0.0);
    value.ok_or_else(|| "expected a number above 0".to_string())
}

impl Example {
    /// Parses the command line and runs the example.
    ///
    /// The exit code is 0, 1 for an error, or 2 for a command line that makes no sense.
    pub fn main(&self) -> ExitCode {
        let matches = self.command().get_matches();
        cli::run(|| self.run(&Flags::from_arg_matches(&matches)?))
    }

    fn command(&self) -> clap::Command {
        let run = format!("cargo run --release --example {}", self.name);
        Flags::command()
            .name(self.name)
            .about(self.about)
            .mut_arg("prompt", |arg| arg.required(false).default_value(self.prompt))
            .after_help(format!(
                "Examples:\n  {run}\n  {run} -- --model path/to/checkpoint --prompt 'Hello'\n  \
                 {run} -- --model-id {}\n\nThe text goes to stdout; progress, warnings and the line of figures go to stderr.",
                self.model_id
            ))
    }

    fn run(&self, flags: &Flags) -> anyhow::Result<()> {
        // Everything that can be refused early is: weights take a while to load.
        let checkpoint = flags.model.open(self.embedded)?;
        let config = ModelArgs::model_config(&checkpoint)?;
        if !self.architectures.contains(&config.architecture) {
            bail!(
                "{} is a {}: {} does not run it, {} does",
                checkpoint.dir().display(),
                config.architecture.class_name(),
                self.name,
                self.other
            );
        }
        let quantizer = flags.model.quantizer(&checkpoint)?;
        let tokenizer = TextTokenizer::open(&checkpoint, &config)?;
        let prompt = &flags.text.prompt;
        let chat = match flags.text.raw {
            true => None,
            false => ChatTemplate::find(&checkpoint)
                .context("cannot read the chat template; --raw does without it")?,
        };
        let ids = match &chat {
            Some(template) => {
                let message = Message {
                    role: "user".to_string(),
                    content: prompt.clone(),
                };
                let text = template.render(&[message]).with_context(|| {
                    "the chat template cannot be used; --raw gives the prompt to the model as it is"
                })?;
                tokenizer.encode_chat(&text)?
            }
            None => tokenizer.encode(prompt)?,
        };
        let room = Room::new(&flags.text, ids.len(), &config)?;
        let recommended = read_json(&checkpoint, "generation_config.json")?;
        let mut settings = flags.sampling.settings(&config, recommended.as_ref())?;
        settings.sample_len = room.sample_len;
        if settings.eos_token_ids.is_empty() {
            settings.eos_token_ids.extend(tokenizer.eos());
        }

        let loaded = flags.model.load_quantized(quantizer, config)?;
        // A continuation makes sense after its beginning; an answer stands alone.
        let beginning = if chat.is_some() { "" } else { prompt };
        let mut generation = TextGeneration::new(&loaded.model, settings, room.max_seq)?;
        let transfers = || loaded.transfers();
        let written = write_text(&mut generation, &ids, &tokenizer, beginning, transfers)?;
        cli::note(written.summary(&loaded, &room));
        Ok(())
    }
}

impl SamplingArgs {
    /// What the flags say, else what the checkpoint recommends.
    fn settings(
        &self,
        config: &ModelConfig,
        recommended: Option<&serde_json::Value>,
    ) -> anyhow::Result<GenerationConfig> {
        let mut settings = GenerationConfig::new(config);
        if let Some(json) = recommended {
            settings.apply(json)?;
        }
        if self.temperature.is_some() {
            settings.temperature = self.temperature;
        }
        if let Some(p) = self.top_p {
            settings.top_p = Some(p).filter(|&p| p < 1.0);
        }
        if let Some(k) = self.top_k {
            settings.top_k = Some(k).filter(|&k| k > 0);
        }
        if let Some(penalty) = self.repeat_penalty {
            settings.repeat_penalty = penalty;
        }
        settings.repeat_last_n = self.repeat_last_n;
        settings.seed = self.seed;
        Ok(settings)
    }
}

/// How many tokens fit.
struct Room {
    /// Positions of the KV cache.
    max_seq: usize,
    /// Most tokens to generate.
    sample_len: usize,
    /// What limits them, for the reader of a text that stops in the middle.
    limit: &'static str,
}

impl Room {
    fn new(flags: &TextArgs, prompt: usize, config: &ModelConfig) -> anyhow::Result<Self> {
        let context = config.max_position_embeddings;
        let (most, limit) = match flags.max_seq {
            Some(max_seq) => (max_seq.get(), "--max-seq"),
            None => (context, "the model's context length"),
        };
        if prompt >= most {
            bail!(
                "the prompt has {}, and {limit} is {most}: no room for an answer. Shorten the prompt{}",
                units::plural(prompt, "token"),
                match flags.max_seq {
                    Some(_) if most < context =>
                        format!(" or raise --max-seq (the model's context length is {context})"),
                    _ => String::new(),
                }
            );
        }
        if most > context {
            cli::note(format!(
                "warning: --max-seq {most} goes beyond the model's context length of {context}: text beyond it may make no sense"
            ));
        }
        let free = most - prompt;
        let (sample_len, limit) = match flags.sample_len <= free {
            true => (flags.sample_len, "--sample-len"),
            false => (free, limit),
        };
        let max_seq = match flags.max_seq {
            Some(max_seq) => max_seq.get(),
            None => prompt + sample_len,
        };
        Ok(Self {
            max_seq,
            sample_len,
            limit,
        })
    }
}

/// A text that was written to stdout.
struct Written {
    tokens: usize,
    timings: Timings,
    /// It was cut off.
    cut: bool,
    /// What was copied for each token after the first, where linears are on a device of their own.
    transfers: Option<Transfers>,
}

/// Writes `beginning` and the text that follows `prompt` to stdout, as it comes.
fn write_text(
    generation: &mut TextGeneration<'_>,
    prompt: &[u32],
    tokenizer: &TextTokenizer,
    beginning: &str,
    transfers: impl Fn() -> Option<Transfers>,
) -> anyhow::Result<Written> {
    let waiting = prompt_spinner(prompt.len());
    let stream = generation.stream(prompt);
    waiting.finish_and_clear();
    let mut stream = stream?;
    let mut out = std::io::stdout().lock();
    out.write_all(beginning.as_bytes())?;
    out.flush()?;
    let mut text = tokenizer.follow(prompt);
    let mut tokens = 0;
    // After the first token, which comes out of the prompt's pass.
    let mut before = transfers();
    for token in stream.by_ref() {
        // An error has a line of its own.
        let token = token.inspect_err(|_| _ = writeln!(out))?;
        let piece = text.push(token)?;
        tokens += 1;
        if tokens == 1 {
            before = transfers();
        }
        if !piece.is_empty() {
            out.write_all(piece.as_bytes())?;
            out.flush()?;
        }
    }
    writeln!(out, "{}", text.finish()?)?;
    out.flush()?;
    let after = transfers();
    let passes = stream.timings().generated_tokens as u64;
    let transfers = match (before, after) {
        (Some(before), Some(after)) if passes > 0 => Some(Transfers {
            copies: (after.copies - before.copies) / passes,
            bytes: (after.bytes - before.bytes) / passes,
        }),
        _ => None,
    };
    Ok(Written {
        tokens,
        transfers,
        timings: stream.timings(),
        cut: matches!(stream.finish_reason(), Some(FinishReason::Length)),
    })
}

/// Says on stderr, if that is a terminal, that the first token of a long prompt takes a while.
fn prompt_spinner(tokens: usize) -> ProgressBar {
    let spinner = ProgressBar::new_spinner();
    if let Ok(style) = ProgressStyle::with_template("{spinner} prompt: {msg} {elapsed}") {
        spinner.set_style(style);
    }
    spinner.set_message(units::plural(tokens, "token"));
    spinner.enable_steady_tick(Duration::from_millis(200));
    spinner
}

impl Written {
    fn summary(&self, loaded: &Loaded, room: &Room) -> String {
        let cut = match self.cut {
            true => format!(" (stopped by {})", room.limit),
            false => String::new(),
        };
        // One token comes out of the prompt's pass: nothing to time then.
        let rate = match self.timings.generated_tokens {
            0 => String::new(),
            _ => {
                let rate = self.timings.generated_tokens_per_second();
                format!(" at {}", units::tokens_per_second(rate))
            }
        };
        let transfers = match &self.transfers {
            Some(Transfers { copies: 0, .. }) => ", nothing copied".to_string(),
            Some(Transfers { copies, bytes }) => {
                format!(", {copies} copies a token, {} in sum", units::bytes(*bytes))
            }
            None => String::new(),
        };
        format!(
            "prompt: {} at {} | generated: {}{rate}{cut} | weights: {} | {} | {} | {}{transfers}",
            units::plural(self.timings.prompt_tokens, "token"),
            units::tokens_per_second(self.timings.prompt_tokens_per_second()),
            units::plural(self.tokens, "token"),
            loaded.weights(),
            loaded.linears(),
            loaded.setting(),
            loaded.loading(),
        )
    }
}
