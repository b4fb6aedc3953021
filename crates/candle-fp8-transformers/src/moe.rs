//! Routed experts over stacked weights.

use std::collections::BTreeMap;

use candle_compressed_tensors::{CtLinear, LinearSource, State};
use candle_core::{DType, Tensor};
use candle_nn::{Module, VarBuilder, ops::softmax_last_dim};

use crate::linalg::matmul_t;
use crate::{ModelConfig, MoeConfig, Result};

/// A sparse layer: a router, and E gated MLPs of which each token uses a few.
///
/// Tokens are grouped by expert, so that an expert's weights are read once for all of its tokens
/// and not at all when no token chose it.
#[derive(Debug)]
pub(crate) struct SparseMoe {
    gate: CtLinear,
    /// `[E, 2I, H]`, gate rows first.
    gate_up_proj: Tensor,
    /// `[E, H, I]`.
    down_proj: Tensor,
    num_experts_per_tok: usize,
    norm_topk_prob: bool,
    prefix: String,
}

/// The experts of every token.
struct Routes {
    /// For each expert that some token chose: those tokens, and where its result belongs, as
    /// `token · k + slot`.
    by_expert: BTreeMap<usize, Vec<(u32, u32)>>,
    /// `[T · k]`: weights of the results, by token and slot.
    weights: Vec<f32>,
}

impl SparseMoe {
    pub(crate) fn load(
        config: &ModelConfig,
        moe: &MoeConfig,
        source: &dyn LinearSource,
        vb: VarBuilder,
    ) -> Result<Self> {
        let (experts, hidden, inner) = (moe.num_experts, config.hidden_size, moe.intermediate_size);
        let stacks = vb.pp("experts");
        Ok(Self {
            gate: source.linear_b(hidden, experts, false, vb.pp("gate"))?,
            gate_up_proj: stacks.get((experts, 2 * inner, hidden), "gate_up_proj")?,
            down_proj: stacks.get((experts, hidden, inner), "down_proj")?,
            num_experts_per_tok: moe.num_experts_per_tok,
            norm_topk_prob: moe.norm_topk_prob,
            prefix: vb.prefix(),
        })
    }

    /// `x [B, L, H]` → `[B, L, H]`.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let hidden = x.dim(2)?;
        let tokens = x.reshape(((), hidden))?;
        let count = tokens.dim(0)?;
        let k = self.num_experts_per_tok;
        let device = x.device();

        let logits = self.gate.forward(&tokens)?.to_dtype(DType::F32)?;
        let probabilities = softmax_last_dim(&logits)?.to_vec2::<f32>()?;
        let routes = self.route(&probabilities);

        let mut results = Vec::with_capacity(routes.by_expert.len());
        // Row of the concatenated results at which each (token, slot) ends up.
        let mut rows = vec![0u32; count * k];
        let mut row = 0;
        for (&expert, members) in &routes.by_expert {
            for &(_, place) in members {
                rows[place as usize] = row;
                row += 1;
            }
            let members: Vec<u32> = members.iter().map(|&(token, _)| token).collect();
            let members = Tensor::new(members, device)?;
            results.push(self.expert(expert, &tokens.index_select(&members, 0)?)?);
        }
        let weights = Tensor::from_vec(routes.weights, (count, k, 1), device)?;
        let y = Tensor::cat(&results, 0)?
            .index_select(&Tensor::new(rows, device)?, 0)?
            .reshape((count, k, hidden))?
            .broadcast_mul(&weights)?
            .sum(1)?;
        Ok(y.to_dtype(x.dtype())?.reshape(x.shape())?)
    }

    /// `x [n, H]` through one expert → `[n, H]` in F32.
    fn expert(&self, expert: usize, x: &Tensor) -> candle_core::Result<Tensor> {
        let gate_up = matmul_t(x, &self.gate_up_proj.get(expert)?)?;
        let inner = gate_up.dim(1)? / 2;
        let (gate, up) = (
            gate_up.narrow(1, 0, inner)?,
            gate_up.narrow(1, inner, inner)?,
        );
        let inner = candle_fp8::silu_mul(&gate, &up)?;
        matmul_t(&inner, &self.down_proj.get(expert)?)?.to_dtype(DType::F32)
    }

    /// The k most probable experts of each token; of equals, the one with the lower index. A
    /// token's slots are in the order of its experts' indices, which is the order in which
    /// transformers adds their results up.
    fn route(&self, probabilities: &[Vec<f32>]) -> Routes {
        let k = self.num_experts_per_tok;
        let mut by_expert = BTreeMap::<_, Vec<_>>::new();
        let mut weights = Vec::with_capacity(probabilities.len() * k);
        for (token, row) in probabilities.iter().enumerate() {
            let mut chosen: Vec<usize> = (0..row.len()).collect();
            chosen.sort_by(|&a, &b| row[b].total_cmp(&row[a]));
            chosen.truncate(k);
            let total = match self.norm_topk_prob {
                true => chosen.iter().map(|&expert| row[expert]).sum::<f32>(),
                false => 1.0,
            };
            chosen.sort_unstable();
            for expert in chosen {
                let place = weights.len() as u32;
                weights.push(row[expert] / total);
                by_expert
                    .entry(expert)
                    .or_default()
                    .push((token as u32, place));
            }
        }
        Routes { by_expert, weights }
    }

    pub(crate) fn linears(&self) -> impl Iterator<Item = (String, &CtLinear)> {
        std::iter::once((format!("{}.gate", self.prefix), &self.gate))
    }

    /// The stacked experts, which are no linears: name and tensor.
    pub(crate) fn stacks(&self) -> [(String, &Tensor); 2] {
        let name = |stack: &str| format!("{}.experts.{stack}", self.prefix);
        [
            (name("gate_up_proj"), &self.gate_up_proj),
            (name("down_proj"), &self.down_proj),
        ]
    }

    /// Adds what is not a linear.
    pub(crate) fn add_to(&self, state: &mut State) {
        for (name, stack) in self.stacks() {
            state.tensor(name, stack);
        }
    }
}
