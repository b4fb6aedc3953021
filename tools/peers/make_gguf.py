"""Writes a GGUF of random Q8_0 weights for llama-bench: every linear, the embedding and the output in Q8_0.

RoPE scaling is left out: it changes values, not time.
"""

import argparse
import math

import gguf
import numpy as np

from shapes import SHAPES, config, linears

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}

BLOCK = 32  # values that share an f16 scale


def q8_0(rng, rows, cols):
    """Random blocks, as bytes: an f16 scale and 32 signed bytes each. Values have variance 1 / cols."""
    blocks = np.empty((rows, cols // BLOCK, 2 + BLOCK), np.uint8)
    # Uniform bytes in ±127 have a standard deviation of 73.6.
    scale = np.array([1 / (73.6 * math.sqrt(cols))], np.float16)
    blocks[..., :2] = scale.view(np.uint8)
    values = rng.integers(-127, 128, (rows, cols // BLOCK, BLOCK), np.int8)
    blocks[..., 2:] = values.view(np.uint8)
    return blocks.reshape(rows, -1)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="llama-1b")
    parser.add_argument("--layers", type=int, help="only the first layers")
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    shape = config(args.shape, args.layers)
    hidden, vocab = shape["hidden_size"], shape["vocab_size"]

    writer = gguf.GGUFWriter(args.out, "llama")
    writer.add_block_count(shape["num_hidden_layers"])
    writer.add_context_length(shape["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(shape["intermediate_size"])
    writer.add_head_count(shape["num_attention_heads"])
    writer.add_head_count_kv(shape["num_key_value_heads"])
    writer.add_rope_dimension_count(shape["head_dim"])
    writer.add_rope_freq_base(shape["rope_theta"])
    writer.add_layer_norm_rms_eps(shape["rms_norm_eps"])
    writer.add_vocab_size(vocab)
    writer.add_tokenizer_model("none")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)

    rng = np.random.default_rng(0)

    def matrix(name, rows, cols):
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(f"{name}.weight", q8_0(rng, rows, cols), raw_dtype=kind)

    def norm(name):
        writer.add_tensor(f"{name}.weight", np.ones(hidden, np.float32))

    matrix("token_embd", vocab, hidden)
    matrix("output", vocab, hidden)
    norm("output_norm")
    for layer in range(shape["num_hidden_layers"]):
        for name, rows, cols in linears(shape):
            matrix(f"blk.{layer}.{NAMES[name]}", rows, cols)
        norm(f"blk.{layer}.attn_norm")
        norm(f"blk.{layer}.ffn_norm")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
