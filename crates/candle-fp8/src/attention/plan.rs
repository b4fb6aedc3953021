//! Which keys each query sees: causal masks, in blocks of queries.

use candle_core::{Device, Result, Tensor};

/// Queries that are scored at a time. Scores of a block take `B · Hq · 256 · keys · 4` bytes, and
/// keys after the block's last query are never touched.
const QUERY_BLOCK: usize = 256;

/// The blocks of one forward pass, for all layers with the same window.
#[derive(Debug)]
pub(super) struct AttentionPlan {
    pub(super) blocks: Vec<QueryBlock>,
}

/// A run of queries and the run of keys that at least one of them sees.
#[derive(Debug)]
pub(super) struct QueryBlock {
    /// First query, counted in this forward pass.
    pub(super) query_start: usize,
    pub(super) query_len: usize,
    /// First key, counted in the cache.
    pub(super) key_start: usize,
    pub(super) key_len: usize,
    /// `[query_len, key_len]` F32, 0 or -inf, to be added to the scores; `None`: all keys are seen.
    pub(super) mask: Option<Tensor>,
}

impl AttentionPlan {
    /// `len` queries at positions `offset ..`. With a window of w, position p sees `p - w + 1 ..= p`.
    pub(super) fn new(
        offset: usize,
        len: usize,
        window: Option<usize>,
        device: &Device,
    ) -> Result<Self> {
        Self::with_block(offset, len, window, QUERY_BLOCK, device)
    }

    fn with_block(
        offset: usize,
        len: usize,
        window: Option<usize>,
        block: usize,
        device: &Device,
    ) -> Result<Self> {
        let window = window.unwrap_or(usize::MAX);
        let make = |query_start: usize| -> Result<QueryBlock> {
            let query_len = block.min(len - query_start);
            let first = offset + query_start;
            let key_start = (first + 1).saturating_sub(window);
            let key_len = first + query_len - key_start;
            let mask = if query_len == 1 {
                None
            } else {
                let values: Vec<f32> = (first..first + query_len)
                    .flat_map(|query| {
                        (key_start..key_start + key_len).map(move |key| {
                            let seen = key <= query && query - key < window;
                            if seen { 0.0 } else { f32::NEG_INFINITY }
                        })
                    })
                    .collect();
                Some(Tensor::from_vec(values, (query_len, key_len), device)?)
            };
            Ok(QueryBlock {
                query_start,
                query_len,
                key_start,
                key_len,
                mask,
            })
        };
        let blocks = (0..len).step_by(block).map(make).collect::<Result<_>>()?;
        Ok(Self { blocks })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// For each query the keys it sees, read back from the blocks.
    fn seen(offset: usize, len: usize, window: Option<usize>, block: usize) -> Vec<Vec<usize>> {
        let plan = AttentionPlan::with_block(offset, len, window, block, &Device::Cpu).unwrap();
        let mut rows = Vec::new();
        for block in &plan.blocks {
            assert_eq!(block.query_start, rows.len());
            let mask = block
                .mask
                .as_ref()
                .map(|mask| mask.to_vec2::<f32>().unwrap());
            for query in 0..block.query_len {
                let visible = |&key: &usize| mask.as_ref().is_none_or(|m| m[query][key] == 0.0);
                let keys = (0..block.key_len).filter(visible);
                rows.push(keys.map(|key| block.key_start + key).collect());
            }
        }
        rows
    }

    #[test]
    fn queries_see_the_past_and_themselves_in_any_blocking() {
        for (offset, len) in [(0, 1), (0, 7), (5, 1), (3, 4), (9, 6)] {
            for window in [None, Some(1), Some(3), Some(100)] {
                let expected: Vec<Vec<usize>> = (offset..offset + len)
                    .map(|p| (0..=p).filter(|k| p - k < window.unwrap_or(1000)).collect())
                    .collect();
                for block in [1, 2, 3, 256] {
                    assert_eq!(seen(offset, len, window, block), expected);
                }
            }
        }
    }

    #[test]
    fn keys_outside_every_window_are_not_scored() {
        let plan = AttentionPlan::with_block(10, 4, Some(3), 2, &Device::Cpu).unwrap();
        let spans: Vec<_> = plan
            .blocks
            .iter()
            .map(|b| (b.key_start, b.key_len))
            .collect();
        assert_eq!(spans, [(8, 4), (10, 4)]);
    }
}
