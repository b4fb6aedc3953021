//! FP8 tensor operations for Candle: quantizers, scaled matrix products, dequantization.
