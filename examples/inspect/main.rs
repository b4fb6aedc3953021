//! Shows what a checkpoint holds and how it would be loaded, from its headers and scales alone.

mod print;
mod report;

use std::io::Write;
use std::process::ExitCode;

use anyhow::{Result, bail};
use candle_fp8_examples::{LoadArgs, STORIES_LLAMA, SourceArgs, cli, units};
use clap::Parser;

use report::Report;

/// Shows what a checkpoint holds: every module with its scheme, dtype, shape and bytes; totals; and what would be refused.
///
/// Only headers and scales are read. The exit code is 1 if the checkpoint would be refused.
#[derive(Parser, Debug)]
#[command(version)]
struct Args {
    /// Print one JSON object on stdout, every expert on its own.
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    source: SourceArgs,

    #[command(flatten)]
    load: LoadArgs,
}

fn main() -> ExitCode {
    cli::run(run)
}

fn run() -> Result<()> {
    let args = Args::parse();
    let report = match args.source.open(STORIES_LLAMA) {
        Ok(checkpoint) => Report::new(&checkpoint, &args.load.options()),
        Err(error) if args.json => {
            let name = args.source.model.map(|dir| dir.display().to_string());
            let name = name.or(args.source.model_id).unwrap_or_default();
            Report::unreadable(name, format!("{error:#}"))
        }
        Err(error) => return Err(error),
    };
    let text = match args.json {
        true => serde_json::to_string_pretty(&report)? + "\n",
        false => print::text(&report),
    };
    std::io::stdout().lock().write_all(text.as_bytes())?;
    match report.refused.len() {
        0 => Ok(()),
        problems => bail!(
            "{} would be refused: {}",
            report.checkpoint,
            units::plural(problems, "problem")
        ),
    }
}
