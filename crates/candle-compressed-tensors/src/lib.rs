//! Loads compressed-tensors FP8 checkpoints into Candle: VarBuilder backend, FP8 linears, conversions, saving.
