//! What a model hands to [`save`](crate::save()).

use std::collections::BTreeMap;

use candle_core::Tensor;

use crate::CtLinear;

/// The tensors of a loaded model under their names in the checkpoint. Holds references, copies nothing.
#[derive(Debug, Clone, Default)]
pub struct State(BTreeMap<String, Tensor>);

impl State {
    /// Nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a tensor under its full name, e.g. `model.norm.weight`.
    pub fn tensor(&mut self, name: impl Into<String>, tensor: &Tensor) {
        self.0.insert(name.into(), tensor.clone());
    }

    /// Adds the weight, the bias and the scale of the module `prefix`, e.g. `model.layers.0.mlp.up_proj`.
    pub fn linear(&mut self, prefix: &str, linear: &CtLinear) {
        self.tensor(format!("{prefix}.weight"), linear.weight());
        if let Some(bias) = linear.bias() {
            self.tensor(format!("{prefix}.bias"), bias);
        }
        if let CtLinear::Fp8(linear) = linear {
            self.tensor(format!("{prefix}.weight_scale"), linear.weight_scale());
        }
    }

    /// The tensor of that name.
    pub fn get(&self, name: &str) -> Option<&Tensor> {
        self.0.get(name)
    }

    /// All names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }
}
