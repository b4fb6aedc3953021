//! The most probable tokens, chosen where the logits are.

use candle_core::{D, DType, Tensor};

use crate::{CausalLm, KvCache, Result};

/// What a greedy step gives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Greedy {
    /// The most probable token of each sequence.
    pub tokens: Vec<u32>,
    /// Whether all logits were finite. Where they were not, the tokens mean nothing.
    pub finite: bool,
}

impl CausalLm {
    /// The most probable token of each sequence after `tokens`, one of each, which follow the positions already in
    /// `cache` and are added to it: as [`forward`](Self::forward), and the largest of the logits. Of equal ones it is
    /// the one that Candle's `argmax` takes, the first.
    ///
    /// On a GPU, where [`forward`](Self::forward) has a list of launches and the output projection is among them, so is
    /// the choice. What it leaves there is the input of the step that follows it: when the tokens that were given are
    /// passed back, nothing is copied to the device, and from it one word a sequence and one more. Projections that
    /// have a launch are FP8 ones, and dense ones in the model's dtype, BF16 or F16, for 16 sequences or fewer. Both
    /// kinds of steps may take turns on a cache.
    ///
    /// # Errors
    /// Those of [`forward`](Self::forward), and [`Error::Mismatch`](crate::Error::Mismatch) for a token id outside the
    /// vocabulary, on any device.
    pub fn forward_greedy(&self, tokens: &[u32], cache: &mut KvCache) -> Result<Greedy> {
        self.check_tokens([tokens.len(), 1], tokens, cache)?;
        #[cfg(feature = "cuda")]
        {
            let step = self.step(cache, |step, position| step.choose(tokens, position));
            let step = step.map_err(|error| error.during(self.device(), || "a decode step".into()));
            if let Some(greedy) = step? {
                return Ok(greedy);
            }
        }
        let ids = Tensor::new(tokens, self.device())?.unsqueeze(1)?;
        choose(&self.forward(&ids, cache)?)
    }
}

/// From logits `[B, V]`, with one copy to the host.
fn choose(logits: &Tensor) -> Result<Greedy> {
    let chosen = logits.argmax(D::Minus1)?;
    // NaN and infinity survive addition, and zero times them is NaN.
    let sums = logits.sum(D::Minus1)?;
    let finite = (sums * 0.0)?.eq(0f32)?.to_dtype(DType::U32)?;
    let mut tokens = Tensor::cat(&[chosen, finite], 0)?.to_vec1::<u32>()?;
    let finite = tokens.split_off(tokens.len() / 2);
    Ok(Greedy {
        tokens,
        finite: finite.iter().all(|finite| *finite == 1),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn the_first_of_the_largest_and_what_is_not_finite() {
        let of = |logits: [[f32; 3]; 2]| choose(&Tensor::new(&logits, &Device::Cpu).unwrap());
        let greedy = of([[0., 3., 3.], [5., -7., 5.]]).unwrap();
        assert_eq!(greedy.tokens, [1, 0]);
        assert!(greedy.finite);
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            assert!(!of([[0., 3., 1.], [5., bad, 4.]]).unwrap().finite);
        }
    }
}
