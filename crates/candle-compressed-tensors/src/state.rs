//! What a model hands to [`save`](crate::save()).

use std::collections::BTreeMap;

use candle_core::{DType, Result, Tensor};

use crate::{CtLinear, linear::Fp8Weight};

/// The tensors of a loaded model under their names in the checkpoint. Holds references, copies nothing.
#[derive(Debug, Clone, Default)]
pub struct State(BTreeMap<String, StateTensor>);

/// A tensor of a model.
#[derive(Debug, Clone)]
pub struct StateTensor(Values);

#[derive(Debug, Clone)]
enum Values {
    /// As it is.
    Tensor(Tensor),
    /// The weight of an FP8 linear.
    Codes(Fp8Weight),
}

impl StateTensor {
    /// The tensor. Of an FP8 linear's weight on CUDA or on an XPU, a copy.
    ///
    /// # Errors
    /// There is no memory left for the copy, or an XPU fails.
    pub fn tensor(&self) -> Result<Tensor> {
        match &self.0 {
            Values::Tensor(tensor) => Ok(tensor.clone()),
            Values::Codes(weight) => weight.unpack(),
        }
    }

    /// Its shape.
    pub fn dims(&self) -> Vec<usize> {
        match &self.0 {
            Values::Tensor(tensor) => tensor.dims().to_vec(),
            Values::Codes(weight) => <[usize; 2]>::from(weight.dims()).to_vec(),
        }
    }

    /// Its dtype.
    pub fn dtype(&self) -> DType {
        match &self.0 {
            Values::Tensor(tensor) => tensor.dtype(),
            Values::Codes(_) => DType::F8E4M3,
        }
    }

    /// Bytes of memory that it takes.
    pub fn bytes(&self) -> usize {
        match &self.0 {
            Values::Tensor(tensor) => tensor.elem_count() * tensor.dtype().size_in_bytes(),
            Values::Codes(weight) => weight.bytes(),
        }
    }
}

impl State {
    /// Nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a tensor under its full name, e.g. `model.norm.weight`.
    pub fn tensor(&mut self, name: impl Into<String>, tensor: &Tensor) {
        let values = Values::Tensor(tensor.clone());
        self.0.insert(name.into(), StateTensor(values));
    }

    /// Adds the weight, the bias and the scale of the module `prefix`, e.g. `model.layers.0.mlp.up_proj`.
    pub fn linear(&mut self, prefix: &str, linear: &CtLinear) {
        let weight = match linear {
            CtLinear::Fp8(linear) => Values::Codes(linear.fp8_weight().clone()),
            CtLinear::Dense(linear) => Values::Tensor(linear.weight().clone()),
        };
        (self.0).insert(format!("{prefix}.weight"), StateTensor(weight));
        if let Some(bias) = linear.bias() {
            self.tensor(format!("{prefix}.bias"), bias);
        }
        if let CtLinear::Fp8(linear) = linear {
            self.tensor(format!("{prefix}.weight_scale"), linear.weight_scale());
        }
    }

    /// The tensor of that name.
    pub fn get(&self, name: &str) -> Option<&StateTensor> {
        self.0.get(name)
    }

    /// All names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }
}
