//! What loading and long prompts cost, measured at the allocator: one owned copy of a tensor, never the file beside it.

// Each test binary uses its part of the shared module.
#[allow(dead_code, unreachable_pub)]
mod support;

use std::{
    alloc::{GlobalAlloc, Layout, System},
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
};

use candle_compressed_tensors::{Checkpoint, LoadOptions, QuantizerCompressedTensors};
use candle_core::{DType, Device, Tensor};
use candle_fp8_transformers::{CausalLm, ModelConfig};
use candle_nn::Module;
use serde_json::{Value, json};

/// Counts live bytes, and the most there have been.
struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to the system allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let live = LIVE.fetch_add(layout.size(), Relaxed) + layout.size();
        PEAK.fetch_max(live, Relaxed);
        // SAFETY: the caller's contract is ours.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Relaxed);
        // SAFETY: the caller's contract is ours.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// What `work` leaves allocated, and the most that it had at once.
fn measured<T>(work: impl FnOnce() -> T) -> (T, usize, usize) {
    let before = LIVE.load(Relaxed);
    PEAK.store(before, Relaxed);
    let result = work();
    let (kept, peak) = (
        LIVE.load(Relaxed).saturating_sub(before),
        PEAK.load(Relaxed) - before,
    );
    (result, kept, peak)
}

const N: usize = 2048;
const K: usize = 1536;
const EXPERTS: usize = 16;
/// Names, shapes, errors, a thread's scratch rows: what does not grow with the weights.
const SMALL: usize = 256 * 1024;

type Tensors = std::collections::HashMap<String, Tensor>;

fn quantization(ignore: &[&str]) -> Value {
    json!({
        "quant_method": "compressed-tensors", "format": "float-quantized", "ignore": ignore,
        "config_groups": { "group_0": {
            "targets": ["Linear"],
            "weights": { "num_bits": 8, "type": "float", "strategy": "channel" },
            "input_activations": { "num_bits": 8, "type": "float", "strategy": "token", "dynamic": true },
        } } })
}

fn fp8(tensors: &mut Tensors, name: &str, shape: (usize, usize)) {
    let values = Tensor::rand(-1f32, 1., shape, &Device::Cpu).unwrap();
    let codes = values.to_dtype(DType::F8E4M3).unwrap();
    tensors.insert(format!("{name}.weight"), codes);
    tensors.insert(format!("{name}.weight_scale"), bf16(&[shape.0, 1]));
}

fn bf16(shape: &[usize]) -> Tensor {
    Tensor::ones(shape, DType::BF16, &Device::Cpu).unwrap()
}

/// One linear with a bias, an embedding, and a layer of experts.
fn checkpoint() -> Checkpoint {
    let dir = support::scratch("memory");
    let config = json!({
        "num_experts": EXPERTS,
        "quantization_config": quantization(&["embed_tokens"]),
    });
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let mut tensors = Tensors::new();
    fp8(&mut tensors, "proj", (N, K));
    for expert in 0..EXPERTS {
        for (projection, n, k) in [
            ("gate_proj", 128, 512),
            ("up_proj", 128, 512),
            ("down_proj", 512, 128),
        ] {
            let name = format!("mlp.experts.{expert}.{projection}");
            fp8(&mut tensors, &name, (n, k));
        }
    }
    tensors.insert("proj.bias".into(), bf16(&[N]));
    tensors.insert("embed_tokens.weight".into(), bf16(&[N, K]));
    candle_core::safetensors::save(&tensors, dir.join("model.safetensors")).unwrap();
    Checkpoint::open(&dir).unwrap()
}

/// One test: the counters are the process's, and tests run side by side.
#[test]
fn loading_and_long_prompts_take_no_more_than_they_must() {
    tensors_are_owned_once();
    for head in [Head::Own, Head::Repeated, Head::Left] {
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            models_are_owned_once(head, dtype);
        }
    }
    long_prompts_take_the_mlp_in_pieces();
}

fn tensors_are_owned_once() {
    let ((checkpoint, quantizer), kept, _) = measured(|| {
        let checkpoint = checkpoint();
        let quantizer =
            QuantizerCompressedTensors::new(&checkpoint, LoadOptions::default()).unwrap();
        (checkpoint, quantizer)
    });
    assert!(
        checkpoint.bytes() as usize > 8 * N * K / 4,
        "the checkpoint is too small to tell"
    );
    assert!(kept < SMALL, "an open checkpoint holds {kept} bytes");
    let vb = quantizer.var_builder(DType::BF16, &Device::Cpu).unwrap();

    // One byte a parameter, after a forward too; beside it the activations and a thread's scratch.
    let x = Tensor::randn(0f32, 1., (4, K), &Device::Cpu).unwrap();
    let (linear, kept, peak) = measured(|| quantizer.linear(K, N, vb.pp("proj")).unwrap());
    let weight = N * K + 4 * N + 2 * N;
    assert!(
        kept <= weight + SMALL && peak <= weight + SMALL,
        "a linear keeps {kept} bytes, peaks at {peak}"
    );
    assert!(
        kept >= N * K,
        "a linear of {} bytes: nothing was measured",
        kept
    );
    let (y, kept, peak) = measured(|| linear.forward(&x).unwrap());
    assert_eq!(y.dims(), [4, N]);
    assert!(
        kept <= SMALL && peak <= 4 * SMALL,
        "a forward keeps {kept} bytes, peaks at {peak}"
    );

    for (dtype, size) in [(DType::BF16, 2), (DType::F32, 4), (DType::F16, 2)] {
        for name in ["proj.weight", "embed_tokens.weight"] {
            let get = || {
                vb.get_with_hints_dtype((N, K), name, Default::default(), dtype)
                    .unwrap()
            };
            let (tensor, kept, peak) = measured(get);
            let bytes = N * K * size;
            assert_eq!(tensor.dtype(), dtype);
            assert!(
                kept <= bytes + SMALL && peak <= bytes + SMALL,
                "{name} as {dtype:?}: {kept} bytes, peaks at {peak}"
            );
        }
    }

    // The stack, and one expert beside it.
    let name = "mlp.experts.gate_up_proj";
    let (experts, kept, peak) = measured(|| vb.get((EXPERTS, 256, 512), name).unwrap());
    let bytes = EXPERTS * 256 * 512 * 2;
    assert_eq!(experts.dims(), [EXPERTS, 256, 512]);
    assert!(kept <= bytes + SMALL, "merged experts keep {kept} bytes");
    assert!(
        peak <= bytes + 2 * bytes / EXPERTS + SMALL,
        "merging experts peaks at {peak} bytes for {bytes}"
    );
}

/// The output projection of a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Head {
    /// Not the embedding.
    Own,
    /// The embedding once more, which the config says.
    Repeated,
    /// Not there: the embedding, as the config says.
    Left,
}

const VOCABULARY: usize = 4096;
const HIDDEN: usize = 256;
const INNER: usize = 512;
const LAYERS: usize = 2;

/// Embedding and head, most of the weights here, in BF16; linears in FP8.
fn model_checkpoint(head: Head, inner: usize) -> Checkpoint {
    let dir = support::scratch(&format!("memory-model-{head:?}-{inner}"));
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "torch_dtype": "bfloat16", "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN, "intermediate_size": inner, "num_hidden_layers": LAYERS,
        "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": head != Head::Own,
        "quantization_config": quantization(&["lm_head"]),
    });
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let mut tensors = Tensors::new();
    for layer in 0..LAYERS {
        let name = |part: &str| format!("model.layers.{layer}.{part}");
        for linear in ["q_proj", "k_proj", "v_proj", "o_proj"] {
            let name = name(&format!("self_attn.{linear}"));
            fp8(&mut tensors, &name, (HIDDEN, HIDDEN));
        }
        fp8(&mut tensors, &name("mlp.gate_proj"), (inner, HIDDEN));
        fp8(&mut tensors, &name("mlp.up_proj"), (inner, HIDDEN));
        fp8(&mut tensors, &name("mlp.down_proj"), (HIDDEN, inner));
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            tensors.insert(name(&format!("{norm}.weight")), bf16(&[HIDDEN]));
        }
    }
    tensors.insert("model.norm.weight".into(), bf16(&[HIDDEN]));
    let random = || Tensor::randn(0f32, 1., (VOCABULARY, HIDDEN), &Device::Cpu).unwrap();
    let embedding = random().to_dtype(DType::BF16).unwrap();
    let head = match head {
        Head::Own => Some(random().to_dtype(DType::BF16).unwrap()),
        Head::Repeated => Some(embedding.clone()),
        Head::Left => None,
    };
    tensors.insert("model.embed_tokens.weight".into(), embedding);
    tensors.extend(head.map(|head| ("lm_head.weight".into(), head)));
    candle_core::safetensors::save(&tensors, dir.join("model.safetensors")).unwrap();
    Checkpoint::open(&dir).unwrap()
}

/// Matrices as they are stored, in whatever dtype the model computes; while it loads, 5% beside them at most.
fn models_are_owned_once(head: Head, dtype: DType) {
    let checkpoint = model_checkpoint(head, INNER);
    let quantizer = QuantizerCompressedTensors::new(&checkpoint, LoadOptions::default()).unwrap();
    let config = ModelConfig::from_json(checkpoint.config()).unwrap();
    let vb = quantizer.var_builder(dtype, &Device::Cpu).unwrap();
    let (model, kept, peak) = measured(|| CausalLm::load(&config, &quantizer, vb).unwrap());

    let matrices = match head {
        Head::Own => 2,
        Head::Repeated | Head::Left => 1,
    };
    let codes = 4 * HIDDEN * HIDDEN + 3 * HIDDEN * INNER;
    let scales = 5 * HIDDEN + 2 * INNER;
    let norms = (2 * LAYERS + 1) * HIDDEN;
    let weights = 2 * matrices * VOCABULARY * HIDDEN
        + LAYERS * (codes + 4 * scales)
        + norms * dtype.size_in_bytes();
    assert_eq!(model.weight_bytes(), weights, "{head:?} in {dtype:?}");
    assert!(
        kept >= weights && peak <= weights + weights / 20,
        "{head:?} in {dtype:?}: {weights} bytes of weights, {kept} are kept, loading peaks at {peak}"
    );
}

/// The MLP's inner activations, far wider than the residual stream here, are there for a part of the rows at a time.
fn long_prompts_take_the_mlp_in_pieces() {
    const TOKENS: usize = 8192;
    const WIDE: usize = 4096;
    let checkpoint = model_checkpoint(Head::Left, WIDE);
    let quantizer = QuantizerCompressedTensors::new(&checkpoint, LoadOptions::default()).unwrap();
    let config = ModelConfig::from_json(checkpoint.config()).unwrap();
    let vb = quantizer.var_builder(DType::BF16, &Device::Cpu).unwrap();
    let model = CausalLm::load(&config, &quantizer, vb).unwrap();
    let mut cache = model.new_cache(1, TOKENS).unwrap();
    let ids = Tensor::zeros((1, TOKENS), DType::U32, &Device::Cpu).unwrap();
    let (_, _, peak) = measured(|| model.forward(&ids, &mut cache).unwrap());
    // Ten copies of the stream; of a quarter of the rows, or fewer, gate, up, their product, and its codes with room to spare.
    let allowed = 10 * TOKENS * HIDDEN * 2 + TOKENS / 4 * WIDE * (2 + 2 + 2 + 2);
    assert!(
        peak <= allowed,
        "a prompt of {TOKENS} tokens takes {peak} bytes, at most {allowed}"
    );
}
