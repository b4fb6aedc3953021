//! Llama, Qwen and Mixtral models over FP8 linears, and text generation.
