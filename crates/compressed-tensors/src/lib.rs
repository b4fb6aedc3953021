//! The compressed-tensors checkpoint format: config.json to one quantization scheme per module.
