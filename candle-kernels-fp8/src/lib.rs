//! FP8 kernels for Candle: slices, pointers and sizes in; no tensors, no checkpoints.
