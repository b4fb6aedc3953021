"""Writes what the tests compare a story checkpoint with, into its folder.

    python reference.py --models target/stories --checkpoints tests/checkpoints

- `heldout.txt`, `heldout.ids`: stories that were not trained on, and their token ids as trained (the ids of the text,
  encoded with special tokens).
- `bf16.json`: mean negative log-likelihood (nats) and perplexity on heldout.ids, of the BF16 model and of the
  dequantized FP8 weights, computed in f32.
- `reference.safetensors`: `input_ids`, `logits.dequantized`, `greedy.prompt`, `greedy.dequantized`. The activation
  modes are added by `tools/fixtures/reference.py`.
"""

import argparse
import json
from pathlib import Path

import torch
from corpus import HELD_OUT_SEED, Style, held_out_stories
from dense import load_dense
from evaluate import held_out_text, perplexity
from quantize import CHECKPOINTS
from safetensors.torch import save_file
from transformers import AutoTokenizer

WINDOWS = (256, 512)
WINDOWING = (
    "heldout.ids is cut into consecutive windows of `window` tokens, the last one shorter; each is a sequence of its "
    "own from position 0, its first token is given and the others are predicted; mean over all predicted tokens"
)
INPUT_TOKENS = 32
NEW_TOKENS = 64

# Prompts whose greedy continuation never comes close to a tie: at each of its 64 tokens, in every activation mode, the
# best logit leads by at least 0.03. At a free choice of the grammar the model's best tokens are nearly even.
LLAMA_PROMPT = "There once was a young boy whose name was Max. He dreamed of the day when he could play the"
QWEN_REQUEST = "Write a story in which Lucy wants to climb the tree."


def greedy_prompt(style):
    return style.request(QWEN_REQUEST) if style.chat else LLAMA_PROMPT


@torch.no_grad()
def greedy(model, prompt):
    """The greedy continuation of `prompt` and the smallest lead of a chosen token's logit over the next best."""
    ids, out, past, lead = torch.tensor([prompt]), [], None, float("inf")
    for _ in range(NEW_TOKENS):
        output = model(ids, past_key_values=past, use_cache=True)
        past, (best, which) = output.past_key_values, output.logits[0, -1].topk(2)
        lead = min(lead, (best[0] - best[1]).item())
        out.append(which[0].item())
        ids = which[:1, None]
    return out, lead


@torch.no_grad()
def write(folder, bf16, style):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text, ids = held_out_text(style, tokenizer)
    (folder / "heldout.txt").write_text(text)
    lines = (" ".join(map(str, ids[at:at + 32])) for at in range(0, len(ids), 32))
    (folder / "heldout.ids").write_text("\n".join(lines) + "\n")

    model, original = load_dense(folder), load_dense(bf16)
    quality = {
        "tokens": len(ids),
        "windowing": WINDOWING,
        "bf16": [perplexity(original, ids, window) for window in WINDOWS],
        "dequantized": [perplexity(model, ids, window) for window in WINDOWS],
    }
    (folder / "bf16.json").write_text(json.dumps(quality, indent=2) + "\n")

    story = held_out_stories(1, HELD_OUT_SEED + 4)[0]
    row = tokenizer(story).input_ids[:INPUT_TOKENS]
    prompt = tokenizer(greedy_prompt(style)).input_ids
    continuation, lead = greedy(model, prompt)
    save_file(
        {
            "input_ids": torch.tensor(row),
            "logits.dequantized": model(torch.tensor([row])).logits[0],
            "greedy.prompt": torch.tensor(prompt),
            "greedy.dequantized": torch.tensor(continuation),
        },
        folder / "reference.safetensors",
    )
    (folder / "reference.safetensors").chmod(0o644)
    before, after = quality["bf16"][0], quality["dequantized"][0]
    print(f"{folder.name}: perplexity {before['perplexity']:.5f} BF16, {after['perplexity']:.5f} dequantized")
    print(f"  greedy, smallest lead {lead:.4f}: {tokenizer.decode(prompt + continuation)!r}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--checkpoints", type=Path, required=True)
    args = parser.parse_args()
    for name, model, _, _ in CHECKPOINTS:
        write(args.checkpoints / name, args.models / f"{model}-bf16", Style(model))


if __name__ == "__main__":
    main()
