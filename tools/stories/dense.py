"""A checkpoint as a dense transformers model in f32. FP8 weights are dequantized here, from the format's definition
and with none of the quantizer's code: `codes.to(scale.dtype) * scale`, in the scale's dtype."""

import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM


def dequantize(codes, scale):
    """`codes` E4M3 `[N, K]`; `scale` `[1]` (tensor) or `[N, 1]` (channel)."""
    return codes.to(scale.dtype) * scale


def dense_tensors(directory):
    """The checkpoint's tensors by name, dequantized; scales are gone."""
    stored = load_file(Path(directory) / "model.safetensors")
    tensors = {}
    for name, tensor in stored.items():
        if name.endswith((".weight_scale", ".input_scale")):
            continue
        if tensor.dtype == torch.float8_e4m3fn:
            tensor = dequantize(tensor, stored[f"{name}_scale"])
        tensors[name] = tensor
    return tensors


def load_dense(directory):
    """An f32 model; its weights are exactly the values of the (dequantized) checkpoint."""
    directory = Path(directory)
    config = json.loads((directory / "config.json").read_text())
    config.pop("quantization_config", None)
    with tempfile.TemporaryDirectory() as dense:
        dense = Path(dense)
        (dense / "config.json").write_text(json.dumps(config))
        (dense / "generation_config.json").write_bytes((directory / "generation_config.json").read_bytes())
        save_file(dense_tensors(directory), dense / "model.safetensors", metadata={"format": "pt"})
        model, report = AutoModelForCausalLM.from_pretrained(
            dense, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
    wrong = {key: names for key, names in report.items() if names and key != "conversion_errors"}
    if wrong.get("missing_keys") or wrong.get("unexpected_keys") or wrong.get("mismatched_keys"):
        raise ValueError(f"{directory} does not fit its model: {wrong}")
    return model.eval()
