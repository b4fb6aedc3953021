//! A small checkpoint with everything in it, damaged at random: it may load or be refused, but never panic.

use std::{collections::BTreeMap, fs, path::Path};

use candle_compressed_tensors::QuantizerCompressedTensors;
use candle_core::{DType, Device, Tensor};
use candle_nn::Module;
use proptest::{
    collection::vec,
    prelude::*,
    sample::{Index, select},
};
use safetensors::Dtype;
use serde_json::{Map, Value, json};

use crate::{
    load,
    support::{Mode, Raw, scratch},
};

/// The config: static tensors, blocks, a skipped head, a quantized cache, two experts.
fn config() -> Value {
    let args = |strategy: &str| json!({"num_bits": 8, "type": "float", "strategy": strategy});
    let mut block = args("block");
    block["block_structure"] = json!([4, 4]);
    let mut group = args("group");
    (group["group_size"], group["dynamic"]) = (json!(4), json!(true));
    json!({
        "num_key_value_heads": 2,
        "num_experts": 2,
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "config_groups": {
                "group_0": {
                    "targets": ["re:.*(k|v)_proj$"],
                    "weights": args("channel"),
                    "input_activations": args("tensor"),
                },
                "group_1": {"targets": ["Linear"], "weights": block, "input_activations": group},
            },
            "ignore": ["lm_head", "re:.*norm"],
            "kv_cache_scheme": args("attn_head"),
            "sparsity_config": {"format": "dense"},
        },
    })
}

/// Header entries and data of its tensors.
fn tensors() -> BTreeMap<String, Raw> {
    let mut all = BTreeMap::new();
    let mut add = |name: String, dtype: Dtype, shape: &[usize]| {
        let elements: usize = shape.iter().product();
        let bytes = match dtype {
            Dtype::F8_E4M3 => (0..elements).map(|i| (i * 7 % 120) as u8).collect(),
            _ => half::bf16::from_f32(0.25).to_le_bytes().repeat(elements),
        };
        let shape = shape.to_vec();
        all.insert(
            name,
            Raw {
                dtype,
                shape,
                bytes,
            },
        );
    };
    for projection in ["k_proj", "v_proj"] {
        let module = format!("layers.0.self_attn.{projection}");
        add(format!("{module}.weight"), Dtype::F8_E4M3, &[6, 10]);
        add(format!("{module}.weight_scale"), Dtype::BF16, &[6, 1]);
        add(format!("{module}.input_scale"), Dtype::BF16, &[1]);
    }
    add("layers.0.self_attn.k_scale".into(), Dtype::BF16, &[2, 1, 1]);
    add("layers.0.self_attn.v_scale".into(), Dtype::BF16, &[2, 1, 1]);
    for expert in 0..2 {
        for (projection, shape, blocks) in [
            ("gate_proj", [6, 10], [2, 3]),
            ("up_proj", [6, 10], [2, 3]),
            ("down_proj", [10, 6], [3, 2]),
        ] {
            let module = format!("layers.0.mlp.experts.{expert}.{projection}");
            add(format!("{module}.weight"), Dtype::F8_E4M3, &shape);
            add(format!("{module}.weight_scale"), Dtype::BF16, &blocks);
        }
    }
    add("lm_head.weight".into(), Dtype::BF16, &[12, 10]);
    add("norm.weight".into(), Dtype::BF16, &[10]);
    all
}

/// The checkpoint before it is written.
struct Files {
    config: Vec<u8>,
    /// The safetensors header; its length is written as it is, unless `length` says otherwise.
    header: Vec<u8>,
    length: Option<u64>,
    data: Vec<u8>,
}

impl Files {
    fn new(tensors: BTreeMap<String, Raw>) -> Self {
        let mut data = Vec::new();
        let mut header = Map::new();
        for (name, raw) in tensors {
            let start = data.len();
            data.extend(raw.bytes);
            header.insert(
                name,
                json!({"dtype": raw.dtype, "shape": raw.shape, "data_offsets": [start, data.len()]}),
            );
        }
        Self {
            config: config().to_string().into_bytes(),
            header: Value::Object(header).to_string().into_bytes(),
            length: None,
            data,
        }
    }

    fn write(&self, dir: &Path) {
        let length = self.length.unwrap_or(self.header.len() as u64);
        let file = [&length.to_le_bytes()[..], &self.header, &self.data].concat();
        fs::write(dir.join("config.json"), &self.config).unwrap();
        fs::write(dir.join("model.safetensors"), file).unwrap();
    }
}

#[derive(Debug, Clone, Copy)]
enum Part {
    Config,
    Header,
    Data,
}

#[derive(Debug, Clone)]
enum Damage {
    /// A tensor has another dtype and shape, with the data to it.
    Recast(Index, Dtype, Vec<usize>),
    /// A tensor is gone.
    Drop(Index),
    /// A tensor has another name.
    Call(Index, String),
    /// One byte becomes another.
    Byte(Part, Index, u8),
    /// The rest is gone.
    Cut(Part, Index),
    Length(u64),
    /// A value of the JSON becomes another one, or a copy of one that stands elsewhere.
    Value(Part, Index, Value),
    Copy(Part, Index, Index),
    /// A key of the config and its value are gone, or the key is another one.
    Remove(Index),
    Rename(Index, String),
}

fn values() -> impl Strategy<Value = Value> {
    let large = [1u64 << 40, i64::MAX as u64, u64::MAX].map(Value::from);
    let numbers = [
        json!(-1),
        json!(0),
        json!(1),
        json!(3),
        json!(0.5),
        json!(1e300),
    ];
    let words = [
        "", "re:(", "re:.*", "Linear", "token", "tensor", "channel", "fp8", "F32", "F8_E4M3", "F4",
        "I64",
    ]
    .map(Value::from);
    let others = [
        json!(null),
        json!(true),
        json!(false),
        json!([]),
        json!({}),
        json!([[]]),
        json!([0, 0]),
        json!([10, 0]),
        json!([1u64 << 62, 1u64 << 62]),
    ];
    prop_oneof![
        select(large.to_vec()),
        select(numbers.to_vec()),
        select(words.to_vec()),
        select(others.to_vec()),
    ]
}

fn dtypes() -> impl Strategy<Value = Dtype> {
    use Dtype::*;
    select(vec![
        F8_E4M3, F8_E4M3, F8_E4M3, BF16, BF16, F16, F32, F64, F8_E5M2, F8_E8M0, U8, I64, BOOL,
    ])
}

fn damages() -> impl Strategy<Value = Damage> {
    let json = || select(vec![Part::Config, Part::Header]);
    let part = || select(vec![Part::Config, Part::Header, Part::Data]);
    let place = any::<Index>;
    let name = |names: &[&str]| {
        let names: Vec<String> = names.iter().map(|name| name.to_string()).collect();
        select(names)
    };
    let tensors = name(&[
        "weight",
        "weight_scale",
        "k_scale",
        "",
        "layers.0.mlp.up_proj.weight",
        "layers.0.mlp.up_proj.weight_packed",
        "layers.0.mlp.experts.1.up_proj.weight_scale",
        "layers.0.mlp.experts.7.up_proj.weight",
        "layers.0.mlp.experts.18446744073709551615.up_proj.weight",
        "layers.0.self_attn.q_scale",
        "layers.0.self_attn.k_proj.output_scale",
    ]);
    let keys = name(&[
        "group_2",
        "FP8",
        "run_compressed",
        "weight_block_size",
        "text_config",
        "",
    ]);
    prop_oneof![
        6 => (place(), dtypes(), vec(0usize..12, 0..4)).prop_map(|(a, b, c)| Damage::Recast(a, b, c)),
        2 => place().prop_map(Damage::Drop),
        2 => (place(), tensors).prop_map(|(a, b)| Damage::Call(a, b)),
        1 => (part(), place(), any::<u8>()).prop_map(|(a, b, c)| Damage::Byte(a, b, c)),
        1 => (part(), place()).prop_map(|(a, b)| Damage::Cut(a, b)),
        1 => prop_oneof![any::<u64>(), 0u64..4000].prop_map(Damage::Length),
        6 => (json(), place(), values()).prop_map(|(a, b, c)| Damage::Value(a, b, c)),
        4 => (json(), place(), place()).prop_map(|(a, b, c)| Damage::Copy(a, b, c)),
        2 => place().prop_map(Damage::Remove),
        2 => (place(), keys).prop_map(|(a, b)| Damage::Rename(a, b)),
    ]
}

/// The JSON pointers of all values but the root.
fn pointers(value: &Value, at: &str, all: &mut Vec<String>) {
    let mut below = |key: &str, value: &Value| {
        let pointer = format!("{at}/{}", key.replace('~', "~0").replace('/', "~1"));
        all.push(pointer.clone());
        pointers(value, &pointer, all);
    };
    match value {
        Value::Object(map) => map.iter().for_each(|(key, value)| below(key, value)),
        Value::Array(list) => {
            (list.iter().enumerate()).for_each(|(index, value)| below(&index.to_string(), value))
        }
        _ => {}
    }
}

/// Changes some JSON, if it still is JSON.
fn edit(bytes: &mut Vec<u8>, place: Index, change: impl FnOnce(&mut Value, &str, &[String])) {
    let Ok(mut json) = serde_json::from_slice::<Value>(bytes) else {
        return;
    };
    let mut all = Vec::new();
    pointers(&json, "", &mut all);
    if !all.is_empty() {
        let pointer = all[place.index(all.len())].clone();
        change(&mut json, &pointer, &all);
        *bytes = json.to_string().into_bytes();
    }
}

/// Takes a key out of its object, and puts its value back under another name.
fn rename(json: &mut Value, pointer: &str, name: Option<&str>) {
    let (parent, key) = pointer.rsplit_once('/').unwrap();
    if let Some(Value::Object(map)) = json.pointer_mut(parent)
        && let Some(value) = map.remove(&key.replace("~1", "/").replace("~0", "~"))
        && let Some(name) = name
    {
        map.insert(name.into(), value);
    }
}

impl Damage {
    /// To the tensors, before they are written.
    fn apply_to_tensors(&self, tensors: &mut BTreeMap<String, Raw>) {
        let nth = |place: &Index| tensors.keys().nth(place.index(tensors.len())).cloned();
        match self {
            Self::Recast(place, dtype, shape) => {
                if let Some(raw) = nth(place).and_then(|name| tensors.get_mut(&name)) {
                    raw.recast(*dtype, shape);
                    // Positive as a scale of any dtype, and a code.
                    raw.bytes.fill(0x3c);
                }
            }
            Self::Drop(place) if tensors.len() > 1 => {
                nth(place).and_then(|name| tensors.remove(&name));
            }
            Self::Call(place, name) => {
                if let Some(raw) = nth(place).and_then(|name| tensors.remove(&name)) {
                    tensors.insert(name.clone(), raw);
                }
            }
            _ => {}
        }
    }

    /// To the bytes that are written.
    fn apply_to_files(self, files: &mut Files) {
        let part = match self {
            Self::Length(length) => return files.length = Some(length),
            Self::Recast(..) | Self::Drop(_) | Self::Call(..) => return,
            Self::Remove(_) | Self::Rename(..) => Part::Config,
            Self::Byte(part, ..)
            | Self::Cut(part, _)
            | Self::Value(part, ..)
            | Self::Copy(part, ..) => part,
        };
        let bytes = match part {
            Part::Config => &mut files.config,
            Part::Header => &mut files.header,
            Part::Data => &mut files.data,
        };
        match self {
            Self::Byte(_, place, byte) if !bytes.is_empty() => {
                let at = place.index(bytes.len());
                bytes[at] = byte;
            }
            Self::Cut(_, place) => bytes.truncate(place.index(bytes.len() + 1)),
            Self::Value(_, place, value) => edit(bytes, place, |json, pointer, _| {
                *json.pointer_mut(pointer).unwrap() = value;
            }),
            Self::Copy(_, place, from) => edit(bytes, place, |json, pointer, all| {
                let value = json.pointer(&all[from.index(all.len())]).unwrap().clone();
                *json.pointer_mut(pointer).unwrap() = value;
            }),
            Self::Remove(place) => edit(bytes, place, |json, pointer, _| {
                rename(json, pointer, None);
            }),
            Self::Rename(place, name) => edit(bytes, place, |json, pointer, _| {
                rename(json, pointer, Some(&name));
            }),
            _ => {}
        }
    }
}

/// Reads everything that a model could ask for. Errors are fine.
fn use_all(quantizer: &QuantizerCompressedTensors) -> candle_core::Result<usize> {
    let vb = quantizer.var_builder(DType::F32, &Device::Cpu)?;
    let mut outputs = 0;
    for (name, module) in quantizer.plan().modules() {
        let (n, k) = module.shape;
        if let Ok(linear) = quantizer.linear_no_bias(k, n, vb.pp(name)) {
            let x = Tensor::ones((2, k), DType::F32, &Device::Cpu)?;
            outputs += linear.forward(&x).map_or(0, |y| y.elem_count());
        }
    }
    let experts = ["gate_up_proj", "down_proj"].map(|end| format!("layers.0.mlp.experts.{end}"));
    let names = quantizer.checkpoint().names().map(str::to_string);
    for name in names.chain(experts) {
        for dtype in [DType::F32, DType::F8E4M3] {
            outputs += vb
                .get_unchecked_dtype(&name, dtype)
                .map_or(0, |tensor| tensor.elem_count());
        }
        let _ = (vb.contains_tensor(&name), vb.get((6, 10), &name));
    }
    Ok(outputs)
}

#[test]
fn the_undamaged_checkpoint_loads_in_every_mode() {
    let dir = scratch("refusals-undamaged");
    Files::new(tensors()).write(&dir);
    for mode in Mode::ALL {
        let quantizer = load(&dir, mode.options()).unwrap();
        assert_eq!(quantizer.plan().modules().len(), 8);
        assert!(use_all(&quantizer).unwrap() > 1000);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_damaged_checkpoint_loads_or_is_refused(damages in vec(damages(), 1..3), mode in 0usize..4) {
        let dir = std::path::PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("refusals-damaged");
        fs::create_dir_all(&dir).unwrap();
        let mut tensors = tensors();
        for damage in &damages {
            damage.apply_to_tensors(&mut tensors);
        }
        let mut files = Files::new(tensors);
        for damage in damages {
            damage.apply_to_files(&mut files);
        }
        files.write(&dir);
        match load(&dir, Mode::ALL[mode].options()) {
            Ok(quantizer) => { use_all(&quantizer).map_err(|e| TestCaseError::fail(e.to_string()))?; }
            Err(error) => prop_assert!(!error.to_string().is_empty()),
        }
    }
}
