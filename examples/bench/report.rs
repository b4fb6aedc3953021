//! What was measured, as a table or as JSON.

use std::fmt;

use candle_core::{DType, Device, DeviceLocation};
use candle_fp8_examples::{Table, table::Align, units};
use serde::Serialize;

use super::device_memory::DeviceMemory;
use super::linears::LinearTime;
use super::machine::Machine;
use super::profile::Profiled;
use super::random::LmHead;
use super::shape::Shape;

/// One call of `bench`. Its fields are the keys of the JSON.
#[derive(Serialize)]
pub(crate) struct Report {
    shape: &'static str,
    pub(crate) device: String,
    /// Of the activations.
    dtype: &'static str,
    /// What the machine can do; known for a CPU.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) machine: Option<Machine>,
    #[serde(flatten)]
    pub(crate) model: Option<Model>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) linears: Vec<LinearTime>,
}

/// A whole model.
#[derive(Serialize)]
pub(crate) struct Model {
    lm_head: &'static str,
    weight_bytes: usize,
    /// Those that were made, and those of the whole model.
    #[serde(skip)]
    layers: (usize, usize),
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) device_memory: Option<DeviceMemory>,
    pub(crate) prefill: Vec<Prefill>,
    pub(crate) decode: Vec<Decode>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) profile: Vec<Profiled>,
}

/// One prompt.
#[derive(Serialize)]
pub(crate) struct Prefill {
    /// Its length.
    pub(crate) tokens: usize,
    /// Prompt tokens a second.
    pub(crate) tok_s: f64,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) peers: Vec<PeerRate>,
}

/// One run of decode steps.
#[derive(Serialize)]
pub(crate) struct Decode {
    /// Sequences.
    pub(crate) batch: usize,
    /// Positions in the cache before the first step.
    pub(crate) context: usize,
    /// Steps: tokens of each sequence.
    pub(crate) tokens: usize,
    /// Tokens a second, of all sequences together.
    pub(crate) tok_s: f64,
    /// Bytes that a step reads, divided by the sequences; the mean over the steps.
    pub(crate) bytes_per_token: f64,
    /// `tok_s · bytes_per_token`, in 10⁹ bytes a second.
    pub(crate) gb_s: f64,
    /// Of a streaming read between the steps, in 10⁹ bytes a second.
    #[serde(skip_serializing_if = "Option::is_none")]
    read_gb_s: Option<f64>,
    /// `gb_s` of that, in percent.
    #[serde(skip_serializing_if = "Option::is_none")]
    read_percent: Option<f64>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) peers: Vec<PeerRate>,
}

/// The same run of another model.
#[derive(Serialize)]
pub(crate) struct PeerRate {
    name: &'static str,
    /// Tokens of each sequence.
    tokens: usize,
    /// Tokens a second, of all sequences together; none if there was no memory for it.
    tok_s: Option<f64>,
    /// Our tokens a second divided by the peer's.
    times: Option<f64>,
}

impl Decode {
    pub(crate) fn new(
        (batch, context, tokens): (usize, usize, usize),
        tok_s: f64,
        bytes_per_token: f64,
        read_gb_s: Option<f64>,
    ) -> Self {
        let gb_s = tok_s * bytes_per_token / 1e9;
        Self {
            batch,
            context,
            tokens,
            tok_s,
            bytes_per_token,
            gb_s,
            read_gb_s,
            read_percent: read_gb_s.map(|read| 100. * gb_s / read),
            peers: Vec::new(),
        }
    }
}

impl PeerRate {
    /// `tok_s` of the peer, where ours is `ours`.
    pub(crate) fn new(name: &'static str, tokens: usize, tok_s: Option<f64>, ours: f64) -> Self {
        Self {
            name,
            tokens,
            tok_s,
            times: tok_s.map(|tok_s| ours / tok_s),
        }
    }
}

impl Model {
    /// Nothing measured yet, on the first `layers` layers.
    pub(crate) fn new(shape: Shape, layers: usize, lm_head: LmHead, weight_bytes: usize) -> Self {
        Self {
            lm_head: match lm_head {
                LmHead::Bf16 => "bf16",
                LmHead::Fp8 => "fp8",
            },
            weight_bytes,
            layers: (layers, shape.layers()),
            device_memory: None,
            prefill: Vec::new(),
            decode: Vec::new(),
            profile: Vec::new(),
        }
    }
}

impl Report {
    /// Nothing measured yet.
    pub(crate) fn new(shape: Shape, device: &Device, dtype: DType) -> Self {
        let device = match device.location() {
            DeviceLocation::Cpu => "cpu".to_string(),
            DeviceLocation::Cuda { gpu_id } => format!("cuda:{gpu_id}"),
            DeviceLocation::Metal { gpu_id } => format!("metal:{gpu_id}"),
        };
        Self {
            shape: shape.name(),
            device,
            dtype: dtype.as_str(),
            machine: None,
            model: None,
            linears: Vec::new(),
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} on {} in {}", self.shape, self.device, self.dtype)?;
        if let Some(model) = &self.model {
            write!(
                f,
                ", {} of {} layers, lm_head in {}, {} of weights",
                model.layers.0,
                model.layers.1,
                model.lm_head,
                units::bytes(model.weight_bytes as u64)
            )?;
        }
        writeln!(f)?;
        if let Some(machine) = &self.machine {
            writeln!(
                f,
                "{} with {}: reads {} GB/s, multiplies and adds {} GFLOP/s",
                units::plural(machine.threads, "thread"),
                machine.instruction_set,
                units::significant(machine.read_gb_s),
                units::significant(machine.multiply_gflop_s)
            )?;
        }
        if let Some(model) = &self.model {
            if let Some(memory) = &model.device_memory {
                writeln!(f, "{memory}")?;
            }
            write!(f, "\n{}", runs(model, self.machine.is_some()))?;
            for run in &model.profile {
                write!(f, "\n{}", profile(run))?;
            }
        }
        if !self.linears.is_empty() {
            write!(f, "\n{}", linears(&self.linears))?;
        }
        Ok(())
    }
}

/// A row for each prompt and each run of decode steps. Columns of what was not measured are left out.
fn runs(model: &Model, machine: bool) -> Table {
    let peers = model.prefill.iter().map(|run| &run.peers);
    let mut peers = peers.chain(model.decode.iter().map(|run| &run.peers));
    // Each run has all of them, in one order.
    let peers = peers.next().into_iter().flatten().map(|peer| peer.name);
    let mut columns = vec![
        ("run".to_string(), Align::Left),
        ("batch".into(), Align::Right),
        ("context".into(), Align::Right),
        ("tokens".into(), Align::Right),
        ("tokens/s".into(), Align::Right),
        ("MB a token".into(), Align::Right),
        ("GB/s".into(), Align::Right),
    ];
    if machine {
        columns.push(("read GB/s".into(), Align::Right));
        columns.push(("% of read".into(), Align::Right));
    }
    for peer in peers {
        columns.push((format!("{peer} tokens/s"), Align::Right));
        columns.push((format!("× {peer}"), Align::Right));
    }
    let mut table = Table::new(columns);
    let against = |peers: &[PeerRate]| {
        let cells = peers.iter().flat_map(|peer| {
            let tok_s = peer.tok_s.map(units::significant);
            let times = peer.times.map(units::significant);
            [
                tok_s.unwrap_or("no memory".into()),
                times.unwrap_or_default(),
            ]
        });
        cells.collect::<Vec<_>>()
    };
    for run in &model.prefill {
        let mut row = vec![
            "prefill".to_string(),
            "1".into(),
            "0".into(),
            run.tokens.to_string(),
            units::significant(run.tok_s),
            String::new(),
            String::new(),
        ];
        row.extend(
            machine
                .then(|| [String::new(), String::new()])
                .into_iter()
                .flatten(),
        );
        row.extend(against(&run.peers));
        table.row(row);
    }
    for run in &model.decode {
        let mut row = vec![
            "decode".to_string(),
            run.batch.to_string(),
            run.context.to_string(),
            run.tokens.to_string(),
            units::significant(run.tok_s),
            units::significant(run.bytes_per_token / 1e6),
            units::significant(run.gb_s),
        ];
        let read = [run.read_gb_s, run.read_percent];
        row.extend(read.into_iter().flatten().map(units::significant));
        row.extend(against(&run.peers));
        table.row(row);
    }
    table
}

/// A row for each part of a step.
fn profile(run: &Profiled) -> Table {
    let head = match run.run {
        "prefill" => format!("prefill of {}", run.tokens),
        run_name => format!("{run_name}, batch {}, context {}", run.batch, run.context),
    };
    let mut table = Table::new([
        (head, Align::Left),
        ("µs".into(), Align::Right),
        ("%".into(), Align::Right),
        ("GB/s".into(), Align::Right),
        ("GFLOP/s".into(), Align::Right),
    ]);
    let optional = |value: Option<f64>| value.map(units::significant).unwrap_or_default();
    for part in &run.parts {
        table.row([
            part.part.to_string(),
            units::significant(part.us),
            units::significant(part.percent),
            optional(part.gb_s),
            optional(part.gflop_s),
        ]);
    }
    table.rule();
    table.row([
        "step".to_string(),
        units::significant(run.step_us),
        units::significant(100.),
    ]);
    table
}

/// A row for each linear and number of rows.
fn linears(times: &[LinearTime]) -> Table {
    let mut table = Table::new([
        ("linear", Align::Left),
        ("weight", Align::Left),
        ("N × K", Align::Right),
        ("M", Align::Right),
        ("µs", Align::Right),
        ("GB/s", Align::Right),
        ("GFLOP/s", Align::Right),
        ("% of peak", Align::Right),
        ("bound", Align::Left),
        ("candle µs", Align::Right),
        ("× candle", Align::Right),
    ]);
    for time in times {
        table.row([
            time.linear.to_string(),
            time.weight.to_string(),
            format!("{} × {}", time.n, time.k),
            time.m.to_string(),
            units::significant(time.us),
            units::significant(time.gb_s),
            units::significant(time.gflop_s),
            units::significant(time.peak_percent),
            time.bound.to_string(),
            units::significant(time.candle_us),
            units::significant(time.times_candle),
        ]);
    }
    table
}
