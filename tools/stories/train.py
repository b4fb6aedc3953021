"""Trains the two story models and writes them as plain BF16 checkpoints.

    python train.py --model llama --out target/stories/llama-bf16
    python train.py --model qwen3-moe --out target/stories/qwen3-moe-bf16

Minutes on one GPU; `--device cpu --steps 20 --stories 2000 --batch 4` tries it out.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from corpus import CHAT_TEMPLATE, VOCABULARY, Style, train_tokenizer, training_documents
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.models.qwen3_moe import modeling_qwen3_moe

POSITIONS = 512


def llama(tokenizer):
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=POSITIONS,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.token_to_id("<s>"),
        eos_token_id=tokenizer.token_to_id("</s>"),
    )
    return LlamaForCausalLM(config)


def qwen3_moe(tokenizer):
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=384,
        moe_intermediate_size=112,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        router_aux_loss_coef=0.01,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.token_to_id("<|im_end|>"),
        pad_token_id=tokenizer.token_to_id("<|endoftext|>"),
    )
    return Qwen3MoeForCausalLM(config)


def all_experts(self, hidden_states, top_k_index, top_k_weights):
    """Every expert on every token, weighted by the router: no gather, so it is fast for few small experts and
    gives the same gradients every time."""
    tokens = hidden_states.shape[0]
    weights = top_k_weights.new_zeros(tokens, self.num_experts).scatter(1, top_k_index, top_k_weights)
    gate, up = torch.matmul(hidden_states, self.gate_up_proj.transpose(1, 2)).chunk(2, dim=-1)
    inner = self.act_fn(gate) * up * weights.t().unsqueeze(-1)
    return torch.einsum("eti,ehi->th", inner, self.down_proj.to(inner.dtype)).to(hidden_states.dtype)


class Stream:
    """Documents end to end as one row of tokens. Half of the windows begin where a document does, half anywhere:
    the model has to start a story and to go on in the middle of one."""

    def __init__(self, tokenizer, documents, device, seed):
        ids, starts, at = [], [], 0
        for begin in range(0, len(documents), 10_000):
            for encoding in tokenizer.encode_batch(documents[begin:begin + 10_000], add_special_tokens=False):
                starts.append(at)
                at += len(encoding.ids)
                ids.append(torch.tensor(encoding.ids, dtype=torch.int16))
        self.ids = torch.cat(ids).to(device)
        starts = torch.tensor(starts)
        self.starts = starts[starts < len(self.ids) - POSITIONS].to(device)
        self.generator = torch.Generator(device).manual_seed(seed)
        self.offsets = torch.arange(POSITIONS, device=device)

    def batch(self, rows):
        device = self.ids.device
        aligned = rows // 2
        at_start = torch.randint(len(self.starts), (aligned,), generator=self.generator, device=device)
        anywhere = torch.randint(
            len(self.ids) - POSITIONS, (rows - aligned,), generator=self.generator, device=device
        )
        begins = torch.cat([self.starts[at_start], anywhere])
        return self.ids[begins[:, None] + self.offsets].long()


def parameter_groups(model, weight_decay):
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def train(model, stream, args):
    on_gpu = args.device == "cuda"
    optimizer = torch.optim.AdamW(
        parameter_groups(model, 0.1), lr=args.lr, betas=(0.9, 0.98), eps=1e-9, fused=on_gpu
    )

    def rate(step):
        warm = min(1.0, (step + 1) / 200)
        return warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / args.steps)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    model.train()
    routed = {"output_router_logits": True} if model.config.model_type == "qwen3_moe" else {}
    began = time.time()
    for step in range(args.steps):
        ids = stream.batch(args.batch)
        with torch.autocast(args.device, torch.bfloat16):
            logits_and_loss = model(input_ids=ids, labels=ids, use_cache=False, **routed)
        logits_and_loss.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step % args.report == 0 or step + 1 == args.steps:
            loss = logits_and_loss.loss.item()
            print(f"step {step} loss {loss:.4f} seconds {time.time() - began:.1f}", flush=True)
            if not math.isfinite(loss):
                raise RuntimeError("the loss is not finite")


def save(model, tokenizer, style, out):
    special = {"eos_token": style.specials[-1], "pad_token": style.eos}
    if style.bos:
        special["bos_token"] = style.bos
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=POSITIONS, clean_up_tokenization_spaces=False, **special
    )
    if style.chat:
        wrapped.chat_template = CHAT_TEMPLATE
    wrapped.save_pretrained(out, save_jinja_files=False)
    ends = [tokenizer.token_to_id(token) for token in reversed(style.specials) if token not in ("<s>", "<|im_start|>")]
    model.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id,
        eos_token_id=ends if len(ends) > 1 else ends[0],
        pad_token_id=tokenizer.token_to_id(style.eos),
    )
    model.to(torch.bfloat16).save_pretrained(out)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["llama", "qwen3-moe"], required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--steps", type=int, default=7500)
    parser.add_argument("--batch", type=int, default=64, help=f"rows of {POSITIONS} tokens a step")
    parser.add_argument("--stories", type=int, default=300_000)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--report", type=int, default=500, help="steps between two lines of progress")
    args = parser.parse_args()

    began = time.time()
    style = Style(args.model)
    documents = training_documents(style, args.stories)
    tokenizer = train_tokenizer(style, documents[:20_000])
    stream = Stream(tokenizer, documents, args.device, args.seed)
    print(f"{len(documents)} documents, {len(stream.ids)} tokens, seconds {time.time() - began:.1f}", flush=True)

    torch.manual_seed(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    if args.model == "qwen3-moe":
        modeling_qwen3_moe.Qwen3MoeExperts.forward = all_experts
    model = (llama if args.model == "llama" else qwen3_moe)(tokenizer).to(args.device)
    print(f"{sum(p.numel() for p in model.parameters())} parameters", flush=True)
    train(model, stream, args)
    save(model, tokenizer, style, args.out)
    (args.out / "training.json").write_text(
        json.dumps({key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}) + "\n"
    )


if __name__ == "__main__":
    main()
