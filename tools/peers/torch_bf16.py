"""Times transformers on an FP8 checkpoint of random weights that compressed-tensors dequantizes to BF16, on the CPU.

The checkpoint is made once, in --dir. Prints one JSON object: prefill and decode in tokens a second.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from shapes import SHAPES, config, linears

SCHEME = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"type": "float", "num_bits": 8, "strategy": "channel", "symmetric": True, "dynamic": False},
            "input_activations": {"type": "float", "num_bits": 8, "strategy": "token", "symmetric": True, "dynamic": True},
        }
    },
}


def make(folder, shape):
    """Writes config.json and model.safetensors."""
    generator = torch.Generator().manual_seed(0)
    hidden, vocab = shape["hidden_size"], shape["vocab_size"]
    tensors = {}

    def dense(name, rows, cols, deviation):
        values = torch.randn(rows, cols, generator=generator) * deviation
        tensors[f"{name}.weight"] = values.bfloat16()

    dense("model.embed_tokens", vocab, hidden, 1.0)
    dense("lm_head", vocab, hidden, hidden**-0.5)
    tensors["model.norm.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    for layer in range(shape["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{norm}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
        for name, rows, cols in linears(shape):
            values = torch.randn(rows, cols, generator=generator) * cols**-0.5
            scale = values.abs().amax(1, keepdim=True) / 448
            tensors[f"{prefix}.{name}.weight"] = (values / scale).to(torch.float8_e4m3fn)
            tensors[f"{prefix}.{name}.weight_scale"] = scale.bfloat16()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    extra = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "quantization_config": SCHEME,
    }
    # Last, so that a checkpoint that was interrupted is made again.
    (folder / "config.json").write_text(json.dumps(shape | extra))


def seconds(work):
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="llama-1b")
    parser.add_argument("--layers", type=int, help="only the first layers")
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--decode", type=int, default=64)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shape = config(args.shape, args.layers)
    if not (args.dir / "config.json").exists():
        make(args.dir, shape)

    scheme = CompressedTensorsConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(args.dir, quantization_config=scheme, dtype=torch.bfloat16)
    weight = model.model.layers[0].mlp.up_proj.weight
    assert weight.dtype == torch.bfloat16, f"dequantized to {weight.dtype}"
    prompt = torch.randint(0, shape["vocab_size"], (1, max(args.prefill, args.context)))
    with torch.inference_mode():

        def prefill():
            logits = model(prompt[:, : args.prefill], logits_to_keep=1).logits
            return logits[:, -1].argmax(-1).item()

        prefill()
        prefill_time = statistics.median(seconds(prefill) for _ in range(3))

        state = model(prompt[:, : args.context], use_cache=True, logits_to_keep=1)

        def step():
            nonlocal state
            token = state.logits[:, -1].argmax(-1, keepdim=True)
            state = model(token, past_key_values=state.past_key_values, use_cache=True, logits_to_keep=1)

        step()
        decode_time = seconds(lambda: [step() for _ in range(args.decode)])
    assert state.logits.isfinite().all(), "logits are not finite: this is no measurement"
    print(json.dumps({"prefill": args.prefill / prefill_time, "decode": args.decode / decode_time}))


if __name__ == "__main__":
    main()
