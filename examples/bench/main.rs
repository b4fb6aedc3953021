//! Times prompts and decode steps of a model of random FP8 weights: no checkpoint is needed.

mod args;
mod device_memory;
mod exact;
mod fill;
mod linears;
mod machine;
mod measure;
mod memory;
mod peer;
mod profile;
mod random;
mod report;
mod save;
mod shape;
mod traffic;

use std::io::Write;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device};
use candle_fp8_examples::{cli, units};
use candle_fp8_transformers::CausalLm;
use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};

use args::Args;
use device_memory::Watch;
use machine::{Machine, Reader};
use measure::Subject;
use memory::{Largest, Need};
use peer::{Peer, StockLlama};
use random::RandomWeights;
use report::{Decode, Model, PeerRate, Prefill, Report};
use traffic::Traffic;

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
    args.check()?;
    if let Some(dir) = &args.save {
        return save::save(args.shape, args.layers(), args.lm_head, dir);
    }
    let device = args.device.device()?;
    let dtype = args.device.dtype(&device);
    let mut report = Report::new(args.shape, &device, dtype);
    #[cfg(feature = "xpu")]
    if let Some(xpu) = args.device.xpu_device()? {
        report.device = format!("{} with linears on {}", report.device, xpu.info().name);
    }
    match args.linears {
        true => time_linears(&args, dtype, &device, &mut report)?,
        false => time_model(&args, dtype, &device, &mut report)?,
    }
    let text = match args.json {
        true => serde_json::to_string(&report)? + "\n",
        false => report.to_string(),
    };
    Ok(std::io::stdout().lock().write_all(text.as_bytes())?)
}

fn time_linears(args: &Args, dtype: DType, device: &Device, report: &mut Report) -> Result<()> {
    ensure!(
        device.is_cpu() && args.device.xpu.is_none(),
        "--linears measures on a CPU: add --cpu"
    );
    let plan = linears::Plan {
        shape: args.shape,
        rows: &args.rows,
        dtype,
        rotate: args.rotate.saturating_mul(1_000_000),
    };
    plan.check_memory()?;
    let before = Machine::measure();
    let times = plan.measure()?;
    let machine = before.larger(Machine::measure());
    let times = times.iter().map(|time| time.against(&machine));
    report.linears = times.collect();
    report.machine = Some(machine);
    Ok(())
}

fn time_model(args: &Args, dtype: DType, device: &Device, report: &mut Report) -> Result<()> {
    let need = needs(args, dtype, device)?;
    // What the processor reads says nothing of weights that are elsewhere.
    let on_cpu = device.is_cpu() && args.device.xpu.is_none();
    let before = on_cpu.then(Machine::measure);

    let model = make(args, dtype, device, need.weights)?;
    let mut times = Model::new(
        args.shape,
        args.layers(),
        args.lm_head,
        model.weight_bytes(),
    );
    let mut watch = Watch::start(&model)?;
    for tokens in args.prompts() {
        cli::note(format_args!("prefill: {tokens} tokens"));
        let tok_s = watch.prefill(tokens, || measure::prefill(&model, tokens))?;
        times.prefill.push(Prefill {
            tokens,
            tok_s,
            peers: Vec::new(),
        });
    }
    times.device_memory = watch.memory();
    for (context, batch) in args.decodes() {
        cli::note(format_args!(
            "decode: {} of {batch}, context {context}",
            units::plural(args.decode, "step")
        ));
        let mut reader = on_cpu.then(Reader::new);
        let pause = || reader.iter_mut().for_each(Reader::read);
        let tok_s = measure::decode(&model, batch, context, args.decode, pause)?;
        let bytes = Traffic::of(&model, batch).token_bytes(context, args.decode);
        let run = (batch, context, args.decode);
        let read_gb_s = reader.map(|reader| reader.gb_s());
        times.decode.push(Decode::new(run, tok_s, bytes, read_gb_s));
    }
    if args.profile {
        for tokens in args.prompts() {
            cli::note(format_args!("profile of a prefill: {tokens} tokens"));
            times.profile.push(profile::prefill(&model, tokens)?);
        }
        for (context, batch) in args.decodes() {
            cli::note(format_args!(
                "profile of decoding: {batch}, context {context}"
            ));
            let run = profile::decode(&model, batch, context, args.decode)?;
            times.profile.push(run);
        }
    }
    let after = on_cpu.then(Machine::measure);
    drop(model);
    for &peer in &args.peer {
        time_peer(args, peer, dtype, device, &mut times)?;
    }
    report.model = Some(times);
    if let (Some(before), Some(after)) = (before, after) {
        report.machine = Some(before.larger(after));
    }
    Ok(())
}

/// Adds a peer's times to those of the same runs.
fn time_peer(
    args: &Args,
    peer: Peer,
    dtype: DType,
    device: &Device,
    times: &mut Model,
) -> Result<()> {
    candle_fp8::release_freed_memory(device)?;
    cli::note(format_args!("{}: random weights", peer.name()));
    let config = args.shape.config(args.layers())?;
    let weights = RandomWeights::new(|_| ()).with_lm_head(args.lm_head);
    match peer {
        Peer::Dequantized => {
            let weights = weights.dequantized();
            let vb = weights.var_builder(dtype, device);
            let model = CausalLm::load(&config, &weights, vb).map_err(anyhow::Error::from);
            time_runs(peer, model, device, times)
        }
        Peer::Candle => {
            let model = StockLlama::new(&config, &weights, device);
            time_runs(peer, model, device, times)
        }
    }
}

/// Runs for which there is no memory say so.
fn time_runs<S: Subject>(
    peer: Peer,
    model: Result<S>,
    device: &Device,
    times: &mut Model,
) -> Result<()> {
    let name = peer.name();
    let model = peer::fitting(model)?;
    for run in &mut times.prefill {
        cli::note(format_args!("{name}: prefill: {} tokens", run.tokens));
        let measure = |model| peer::fitting(measure::prefill(model, run.tokens));
        let tok_s = model.as_ref().map(measure).transpose()?.flatten();
        let rate = PeerRate::new(name, run.tokens, tok_s, run.tok_s);
        run.peers.push(rate);
        candle_fp8::release_freed_memory(device)?;
    }
    for run in &mut times.decode {
        let (batch, context, steps) = (run.batch, run.context, Peer::steps(run.tokens, device));
        cli::note(format_args!(
            "{name}: decode: {} of {batch}, context {context}",
            units::plural(steps, "step")
        ));
        let measure = |model| peer::fitting(measure::decode(model, batch, context, steps, || ()));
        let tok_s = model.as_ref().map(measure).transpose()?.flatten();
        run.peers.push(PeerRate::new(name, steps, tok_s, run.tok_s));
        candle_fp8::release_freed_memory(device)?;
    }
    Ok(())
}

/// What the model and the largest of its runs need, if there is memory for them.
fn needs(args: &Args, dtype: DType, device: &Device) -> Result<Need> {
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
    let plan = memory::Plan {
        shape: args.shape,
        lm_head: args.lm_head,
        dtype,
        cpu: device.is_cpu(),
        runs,
        peers: &args.peer,
    };
    plan.check(args.layers(), memory::available(device))
}

/// The model, of `bytes` bytes.
fn make(args: &Args, dtype: DType, device: &Device, bytes: u64) -> Result<CausalLm> {
    let bar = ProgressBar::new(bytes);
    let template = "random weights [{bar:30}] {bytes}/{total_bytes} {eta}";
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style.progress_chars("=> "));
    }
    let start = Instant::now();
    let weights = RandomWeights::new({
        let bar = bar.clone();
        move |bytes| bar.inc(bytes)
    });
    let weights = weights.with_lm_head(args.lm_head);
    #[cfg(feature = "xpu")]
    let weights = weights.with_xpu(args.device.xpu_device()?);
    let config = args.shape.config(args.layers())?;
    let model = CausalLm::load(&config, &weights, weights.var_builder(dtype, device));
    bar.finish_and_clear();
    let model = model?;
    cli::note(format_args!(
        "{}, {}: {} of random weights in {:.1} s",
        args.shape.name(),
        units::plural(args.layers(), "layer"),
        units::bytes(model.weight_bytes() as u64),
        start.elapsed().as_secs_f64()
    ));
    Ok(model)
}
