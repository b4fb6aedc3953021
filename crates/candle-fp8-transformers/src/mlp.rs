//! The gated MLP of a dense layer.

use candle_compressed_tensors::{CtLinear, LinearSource, forward_gated_mlp, merge_linears};
use candle_core::{Device, Tensor};
use candle_fp8::Quantization;
use candle_nn::VarBuilder;

use crate::input::LinearInput;
use crate::profile::{Part, Timer};
use crate::{ModelConfig, Result};

/// The most rows that go through the MLP at once: what is between its linears is the most memory that a long prompt
/// takes, 70 KiB a row in a model of 8B. On a GPU, products of more rows are no faster; on the CPU, inner activations of
/// so few stay in the last cache, which the ops between the linears gain from.
fn most_rows(device: &Device) -> usize {
    match device.is_cpu() {
        true => 512,
        false => 2048,
    }
}

/// `down(silu(gate(x)) · up(x))`.
#[derive(Debug)]
pub(crate) struct Mlp {
    pub(crate) gate_proj: CtLinear,
    pub(crate) up_proj: CtLinear,
    pub(crate) down_proj: CtLinear,
    /// How what computes the input quantizes it, and that of the down projection.
    input: Option<Quantization>,
    inner: Option<Quantization>,
    prefix: String,
}

impl Mlp {
    pub(crate) fn load(
        config: &ModelConfig,
        source: &dyn LinearSource,
        vb: VarBuilder,
    ) -> Result<Self> {
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        let linear = |name: &str, in_dim, out_dim| {
            source.linear_b(in_dim, out_dim, config.mlp_bias, vb.pp(name))
        };
        let gate_up = [
            linear("gate_proj", hidden, inner)?,
            linear("up_proj", hidden, inner)?,
        ];
        let [gate_proj, up_proj] = merge_linears(gate_up)?;
        let down_proj = linear("down_proj", inner, hidden)?;
        Ok(Self {
            input: LinearInput::quantization(&[&gate_proj, &up_proj], vb.device()),
            inner: LinearInput::quantization(&[&down_proj], vb.device()),
            gate_proj,
            up_proj,
            down_proj,
            prefix: vb.prefix(),
        })
    }

    /// How the input is to be quantized; `None`: not.
    pub(crate) fn input(&self) -> Option<Quantization> {
        self.input
    }

    /// `x [B, L, H]` → `[B, L, H]`.
    pub(crate) fn forward(&self, x: LinearInput, timer: Timer<'_>) -> Result<Tensor> {
        let (mut dims, rows) = (x.dims().to_vec(), x.rows());
        let most = most_rows(x.device());
        if rows <= most || !self.rows_are_independent() {
            return self.piece(x, timer);
        }
        // Pieces of one size, and of whole tiles: no short one that reads all weights for a few rows.
        let piece = rows.div_ceil(rows.div_ceil(most)).next_multiple_of(128);
        let pieces = (0..rows)
            .step_by(piece)
            .map(|start| self.piece(x.narrow(start, piece.min(rows - start))?, timer))
            .collect::<Result<Vec<_>>>()?;
        drop(x);
        let y = timer.time(Part::DownProj, || candle_fp8::cat_rows(&pieces))?;
        if let Some(last) = dims.last_mut() {
            *last = y.dim(1)?;
        }
        Ok(y.reshape(dims)?)
    }

    /// Whether no row has a part in how another is quantized.
    fn rows_are_independent(&self) -> bool {
        [&self.gate_proj, &self.up_proj, &self.down_proj]
            .iter()
            .all(|linear| match linear {
                CtLinear::Fp8(linear) => linear.activations() != Some(Quantization::PerTensor),
                CtLinear::Dense(_) => true,
            })
    }

    /// `x [.., H]` → `[.., H]`.
    fn piece(&self, x: LinearInput, timer: Timer<'_>) -> Result<Tensor> {
        if let LinearInput::Values(x) = &x {
            let whole = timer.time(Part::GateUpProj, || {
                forward_gated_mlp(&self.gate_proj, &self.up_proj, &self.down_proj, x)
            })?;
            if let Some(y) = whole {
                return Ok(y);
            }
        }
        let gate_up = [&self.gate_proj, &self.up_proj];
        let gate_up = timer.time(Part::GateUpProj, || x.forward(&gate_up))?;
        drop(x);
        let (gate, up) = (&gate_up[0], &gate_up[1]);
        let inner = timer.time(Part::SiluMul, || match self.inner {
            Some(quantization) => {
                candle_fp8::silu_mul_quantize(gate, up, quantization).map(LinearInput::Quantized)
            }
            None => candle_fp8::silu_mul(gate, up).map(LinearInput::Values),
        })?;
        drop(gate_up);
        let mut y = timer.time(Part::DownProj, || inner.forward(&[&self.down_proj]))?;
        Ok(y.swap_remove(0))
    }

    pub(crate) fn linears(&self) -> impl Iterator<Item = (String, &CtLinear)> {
        [
            ("gate_proj", &self.gate_proj),
            ("up_proj", &self.up_proj),
            ("down_proj", &self.down_proj),
        ]
        .into_iter()
        .map(|(name, linear)| (format!("{}.{name}", self.prefix), linear))
    }
}

#[cfg(test)]
mod tests {
    use candle_compressed_tensors::CtFp8Linear;
    use candle_core::DType;
    use candle_fp8::ScaleLayout;

    use super::*;

    const HIDDEN: usize = 24;
    const INNER: usize = 40;
    const OUT: usize = 16;
    /// Three pieces of 512 rows and less, the second of which begins in the first sequence and ends in the second.
    const DIMS: (usize, usize, usize) = (2, 700, HIDDEN);

    fn linear(inn: usize, out: usize, activations: Option<Quantization>) -> CtLinear {
        let codes = Tensor::randn(0f32, 20., (out, inn), &Device::Cpu).unwrap();
        let codes = codes.to_dtype(DType::F8E4M3).unwrap();
        let scale = Tensor::new(&[0.01f32], &Device::Cpu).unwrap();
        let layout = ScaleLayout::Tensor;
        CtLinear::Fp8(CtFp8Linear::new(codes, scale, layout, None, activations).unwrap())
    }

    fn mlp(activations: Option<Quantization>, inner: Option<Quantization>) -> Mlp {
        Mlp {
            gate_proj: linear(HIDDEN, INNER, activations),
            up_proj: linear(HIDDEN, INNER, activations),
            down_proj: linear(INNER, OUT, inner),
            input: None,
            inner: None,
            prefix: String::new(),
        }
    }

    /// Activations of which the last row is far larger than all others.
    fn activations() -> Tensor {
        let (batch, len, hidden) = DIMS;
        let mut x: Vec<f32> = Tensor::randn(0f32, 1., batch * len * hidden, &Device::Cpu)
            .and_then(|x| x.to_vec1())
            .unwrap();
        x[batch * len * hidden - 1] = 1e3;
        Tensor::from_vec(x, DIMS, &Device::Cpu).unwrap()
    }

    /// The outputs of all rows at once.
    fn values(y: &Tensor) -> Vec<f32> {
        assert_eq!(y.dims(), [DIMS.0, DIMS.1, OUT]);
        y.flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn pieces_of_a_long_prompt_give_what_all_of_it_does() {
        let x = activations();
        for quantization in [
            None,
            Some(Quantization::PerToken),
            Some(Quantization::PerGroup(8)),
            Some(Quantization::Static(0.01)),
            Some(Quantization::PerTensor),
        ] {
            for mlp in [mlp(quantization, None), mlp(None, quantization)] {
                let input = || LinearInput::Values(x.clone());
                let whole = mlp.piece(input(), Timer::OFF).unwrap();
                let pieces = mlp.forward(input(), Timer::OFF).unwrap();
                assert!(values(&pieces) == values(&whole), "{quantization:?}");
            }
        }
    }

    #[test]
    fn pieces_of_a_quantized_prompt_do_too() {
        let x = activations();
        for quantization in [
            Quantization::PerToken,
            Quantization::PerGroup(8),
            Quantization::Static(0.01),
        ] {
            let mut mlp = mlp(Some(quantization), Some(quantization));
            mlp.inner = Some(quantization);
            let input = || LinearInput::Quantized(candle_fp8::quantize(&x, quantization).unwrap());
            let whole = mlp.piece(input(), Timer::OFF).unwrap();
            let pieces = mlp.forward(input(), Timer::OFF).unwrap();
            assert!(values(&pieces) == values(&whole), "{quantization:?}");
        }
    }
}
