//! What adds products up, and how exactly.

/// What adds the products of a kernel up, beside f32 additions rounded to nearest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Adder {
    /// Nothing.
    F32,
    /// Tensor cores, over products of values.
    Values,
    /// Tensor cores, over products of codes: so many in a chain.
    Codes(usize),
}

impl Adder {
    /// How large the error of a sum of `k` terms may be, by the sum of their magnitudes and by their norm.
    ///
    /// A tensor core instruction adds its products, exact ones, and what the sum was before. It shifts all of them to
    /// the exponent of the largest and cuts off what is below the last bit that it keeps: the 13th behind the leading
    /// one for codes on Ada and Hopper (measured by the DeepSeek-V3 report, section 3.3.2, and by SageAttention2),
    /// the 23rd for other types. The largest is at most the sum S of the magnitudes of a chain. So an instruction of
    /// 32 codes is off by at most 33 · 2^-13 · S, those of a chain of c codes by c / 32 times as much; one of 16
    /// values by 17 · 2^-23 · S, which K / 16 of them make less than K · 2^-22 · S.
    ///
    /// Signs are random here, and so are those of what is cut off: in a chain of 128 codes 132 times, a third of the
    /// last bit on average, of a largest value that is not much more than the norm of the chain. Those errors add up
    /// to some 2^-10 of the norm, and grow with the root of the chain's length. Eight times as much is allowed, if
    /// the worst case is not less: still half of what the loss of one term of 4096 would be.
    pub(crate) fn error(self, k: usize, magnitude: f64, norm: f64) -> f64 {
        let (worst, likely) = match self {
            Self::F32 => return 0.0,
            Self::Values => (k as f64 * 2f64.powi(-22), 2f64.powi(-14)),
            Self::Codes(chain) => {
                let instructions = (chain as f64 / 32.0).ceil();
                let growth = (chain as f64 / 128.0).sqrt();
                (instructions * 33.0 * 2f64.powi(-13), growth * 2f64.powi(-7))
            }
        };
        (worst * magnitude).min(likely * norm)
    }
}
