"""How good a story model is: what share of its stories the grammar accepts, and its perplexity on held-out stories.

    python evaluate.py --model target/stories/llama-bf16 --count 256

`--model` is a dense checkpoint or an FP8 one, which is dequantized first. Compute is f32.
"""

import argparse
import json
import math
from pathlib import Path

import grammar
import torch
from corpus import HELD_OUT_SEED, Style, held_out_requests, held_out_stories
from dense import load_dense
from transformers import AutoTokenizer

HELD_OUT_TOKENS = 4096


def style_of(model):
    return Style({"llama": "llama", "qwen3_moe": "qwen3-moe"}[model.config.model_type])


def held_out_text(style, tokenizer):
    """Whole held-out stories, as many as make HELD_OUT_TOKENS tokens, and their ids. The text begins after the BOS
    token, so that encoding it the usual way gives exactly the ids."""
    text = ids = ""
    for story in held_out_stories(1000):
        text += style.document(story)
        ids = tokenizer(text, add_special_tokens=False).input_ids
        if len(ids) >= HELD_OUT_TOKENS:
            break
    text = text.removeprefix(style.bos)
    assert tokenizer(text).input_ids == ids
    return text, ids


@torch.no_grad()
def perplexity(model, ids, window):
    """Mean negative log-likelihood over consecutive windows: the first token of each is given, the rest predicted."""
    total, count = 0.0, 0
    for begin in range(0, len(ids), window):
        piece = torch.tensor([ids[begin:begin + window]], device=model.device)
        if piece.shape[1] < 2:
            continue
        logits = model(piece).logits[0, :-1].double()
        losses = torch.nn.functional.cross_entropy(logits, piece[0, 1:], reduction="sum")
        total, count = total + losses.item(), count + piece.shape[1] - 1
    mean = total / count
    return {"window": window, "predicted_tokens": count, "mean_nll": mean, "perplexity": math.exp(mean)}


@torch.no_grad()
def generate(model, tokenizer, prompts, temperature, seed):
    """Continues each list of ids to an end token; gives the text of prompt and continuation, special tokens kept."""
    torch.manual_seed(seed)
    longest = max(map(len, prompts))
    pad = model.generation_config.pad_token_id
    ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    output = model.generate(ids, attention_mask=mask, max_length=512, **sampling)
    texts = []
    for row, prompt in zip(output.tolist(), prompts):
        row = row[longest - len(prompt):]
        ends = [at for at, token in enumerate(row) if at >= len(prompt) and token in end_tokens(model)]
        texts.append((tokenizer.decode(row[len(prompt):ends[0] if ends else None]), bool(ends)))
    return texts


def end_tokens(model):
    ends = model.generation_config.eos_token_id
    return ends if isinstance(ends, list) else [ends]


def accepted(rules, texts, rule, examples, label):
    good = 0
    for prefix, (text, ended) in texts:
        reason = rules.accept(prefix + text, rule) if ended else "did not end"
        good += reason is None
        if reason and examples:
            print(f"  {label}: {reason}")
            examples -= 1
    print(f"{label}: {good} of {len(texts)} accepted")
    return good / len(texts)


def measure(model, tokenizer, count, seed=7, examples=3):
    """Accept rates: greedy from the first 12 tokens of held-out stories, and sampled at temperature 0.8 from nothing."""
    style, rules, rates = style_of(model), grammar.load(), {}
    stories = held_out_stories(count, HELD_OUT_SEED + 2)
    starts = [tokenizer(story).input_ids[:12] for story in stories]
    prefixes = [tokenizer.decode(start, skip_special_tokens=True) for start in starts]
    texts = generate(model, tokenizer, starts, 0, seed)
    rates["greedy"] = accepted(rules, list(zip(prefixes, texts)), "story", examples, "greedy, 12 tokens given")
    opening = "Once upon a time, there was a"
    start = tokenizer(opening).input_ids
    texts = generate(model, tokenizer, [start] * count, 0.8, seed)
    rates["sampled"] = accepted(rules, [(opening, t) for t in texts], "story", examples, "temperature 0.8")
    if style.chat:
        requests = held_out_requests(count, HELD_OUT_SEED + 3)
        starts = [tokenizer(style.request(prompt)).input_ids for prompt, _ in requests]
        prefixes = [prompt + "\t" for prompt, _ in requests]
        for name, temperature in (("chat greedy", 0), ("chat sampled", 0.8)):
            texts = generate(model, tokenizer, starts, temperature, seed)
            rates[name] = accepted(rules, list(zip(prefixes, texts)), "chat", examples, name)
    return rates


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--count", type=int, default=256)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = load_dense(args.model).to(args.device)
    _, ids = held_out_text(style_of(model), tokenizer)
    report = {"perplexity": [perplexity(model, ids, window) for window in (256, 512)]}
    print(json.dumps(report["perplexity"]), flush=True)
    report["accepted"] = measure(model, tokenizer, args.count, args.seed)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
