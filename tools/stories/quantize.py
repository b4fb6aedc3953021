"""Quantizes the story models with llm-compressor, as its own examples do, and writes them for the tests.

    OMP_NUM_THREADS=2 python quantize.py --models target/stories --out tests/checkpoints

`--models` holds what train.py wrote (llama-bf16, qwen3-moe-bf16). Weights and config.json are left exactly as
llm-compressor writes them; generation_config.json and the tokenizer are copied from the BF16 checkpoint.
"""

import argparse
import shutil
from pathlib import Path

import torch
from corpus import Style, held_out_stories
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modeling.moe.conversion_mappings import set_save_conversion_mapping
from llmcompressor.modeling.moe.linearize import linearize_moe
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

CALIBRATION_SEED = 2_000_000
CALIBRATION_STORIES = 64
COPIED = ["generation_config.json", "tokenizer.json", "tokenizer_config.json"]

# name, BF16 model, preset, modules left alone
CHECKPOINTS = [
    ("stories-llama-fp8-dynamic", "llama", "FP8_DYNAMIC", ["lm_head"]),
    ("stories-llama-fp8-static", "llama", "FP8", ["lm_head"]),
    ("stories-qwen3-moe-fp8-dynamic", "qwen3-moe", "FP8_DYNAMIC", ["lm_head", "re:.*mlp.gate$"]),
]


def calibration(style, tokenizer):
    """Stories that are neither trained on nor held out."""
    stories = held_out_stories(CALIBRATION_STORIES, CALIBRATION_SEED)
    rows = [tokenizer(style.document(story), add_special_tokens=False) for story in stories]
    return Dataset.from_list([{key: row[key] for key in ("input_ids", "attention_mask")} for row in rows])


def quantize(source, destination, style, preset, ignore):
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    if style.name == "qwen3-moe":
        # transformers stacks the experts as it loads them. One linear per expert again, saved under its own name,
        # so that every expert gets its own scales.
        linearize_moe(model)
        set_save_conversion_mapping(model, [])
    recipe = QuantizationModifier(targets="Linear", scheme=preset, ignore=ignore)
    data = {}
    if preset == "FP8":
        data = {
            "dataset": calibration(style, tokenizer),
            "max_seq_length": 512,
            "num_calibration_samples": CALIBRATION_STORIES,
        }
    oneshot(model=model, recipe=recipe, tokenizer=tokenizer, **data)
    shutil.rmtree(destination, ignore_errors=True)
    model.save_pretrained(destination, save_compressed=True)
    for unused in destination.glob("*"):
        if unused.name not in ("config.json", "model.safetensors", "recipe.yaml"):
            unused.unlink()
    for name in COPIED:
        shutil.copyfile(source / name, destination / name)
    (destination / "model.safetensors").chmod(0o644)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", help="one checkpoint's name")
    args = parser.parse_args()
    for name, model, preset, ignore in CHECKPOINTS:
        if args.only in (None, name):
            quantize(args.models / f"{model}-bf16", args.out / name, Style(model), preset, ignore)


if __name__ == "__main__":
    main()
