//! What was measured, as a table or as JSON.

use std::fmt;

use candle_core::{DType, Device, DeviceLocation};
use candle_fp8_examples::{Table, table::Align, units};
use serde::Serialize;

use super::measure::{Decode, Prefill};
use super::shape::Shape;

/// One call of `bench`. Its fields are the keys of the JSON.
#[derive(Serialize)]
pub(crate) struct Report {
    shape: &'static str,
    device: String,
    dtype: &'static str,
    weight_bytes: usize,
    /// Those that were made, and those of the whole model.
    #[serde(skip)]
    layers: (usize, usize),
    pub(crate) prefill: Vec<Prefill>,
    pub(crate) decode: Vec<Decode>,
}

impl Report {
    /// Nothing measured yet.
    pub(crate) fn new(
        shape: Shape,
        layers: usize,
        device: &Device,
        dtype: DType,
        weight_bytes: usize,
    ) -> Self {
        let device = match device.location() {
            DeviceLocation::Cpu => "cpu".to_string(),
            DeviceLocation::Cuda { gpu_id } => format!("cuda:{gpu_id}"),
            DeviceLocation::Metal { gpu_id } => format!("metal:{gpu_id}"),
        };
        Self {
            shape: shape.name(),
            layers: (layers, shape.layers()),
            device,
            dtype: dtype.as_str(),
            weight_bytes,
            prefill: Vec::new(),
            decode: Vec::new(),
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{} on {} in {}, {} of {} layers, {} of weights\n",
            self.shape,
            self.device,
            self.dtype,
            self.layers.0,
            self.layers.1,
            units::bytes(self.weight_bytes as u64)
        )?;
        let mut table = Table::new([
            ("run", Align::Left),
            ("batch", Align::Right),
            ("context", Align::Right),
            ("tokens", Align::Right),
            ("tokens/s", Align::Right),
            ("MB a token", Align::Right),
            ("GB/s", Align::Right),
        ]);
        for run in &self.prefill {
            table.row([
                "prefill".to_string(),
                "1".into(),
                "0".into(),
                run.tokens.to_string(),
                units::significant(run.tok_s),
            ]);
        }
        for run in &self.decode {
            table.row([
                "decode".to_string(),
                run.batch.to_string(),
                run.context.to_string(),
                run.tokens.to_string(),
                units::significant(run.tok_s),
                units::significant(run.bytes_per_token / 1e6),
                units::significant(run.gb_s),
            ]);
        }
        write!(f, "{table}")
    }
}
