//! Folders and files that are no checkpoint: refused by `Checkpoint::open`.

use std::{
    fs,
    path::{Path, PathBuf},
};

use candle_compressed_tensors::{Checkpoint, Error};

use crate::{
    assert_refused, refused,
    support::{dir, scratch},
    text,
};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// A folder with an empty config and these files.
fn folder(name: &str, files: &[(&str, &[u8])]) -> PathBuf {
    let dir = scratch(&format!("refusals-{name}"));
    fs::write(dir.join("config.json"), "{}").unwrap();
    for (file, bytes) in files {
        fs::write(dir.join(file), bytes).unwrap();
    }
    dir
}

/// A safetensors file of this header, right or wrong, and this many bytes of data.
fn file(header: &str, data: usize) -> Vec<u8> {
    let length = (header.len() as u64).to_le_bytes();
    [&length, header.as_bytes(), &vec![0; data]].concat()
}

/// A right one: F32 tensors of one element.
fn tensors(names: &[&str]) -> Vec<u8> {
    let entries = names.iter().enumerate().map(|(index, name)| {
        let (start, end) = (4 * index, 4 * index + 4);
        format!(r#""{name}":{{"dtype":"F32","shape":[1],"data_offsets":[{start},{end}]}}"#)
    });
    let header = format!("{{{}}}", entries.collect::<Vec<_>>().join(","));
    file(&header, 4 * names.len())
}

fn index(entries: &[(&str, &str)]) -> Vec<u8> {
    let map: serde_json::Map<String, serde_json::Value> = entries
        .iter()
        .map(|(tensor, file)| (tensor.to_string(), (*file).into()))
        .collect();
    serde_json::json!({ "weight_map": map })
        .to_string()
        .into_bytes()
}

/// The file is refused as broken; the reader's own words are in the text.
fn assert_broken(name: &str, bytes: &[u8], reason: &str) {
    let dir = folder(name, &[(SINGLE, bytes)]);
    let error = refused(&dir);
    let text = text(&error, &dir);
    assert!(matches!(error, Error::Safetensors { .. }), "{text}");
    assert!(
        text.starts_with("model.safetensors: not a valid safetensors file (")
            && text.ends_with("); it may be truncated: download it again"),
        "{name}: {text}"
    );
    assert!(text.contains(reason), "{name}: {text}");
}

#[test]
fn a_well_formed_folder_opens() {
    // All the others differ from these two in one thing.
    let single = folder("well-formed", &[(SINGLE, &tensors(&["a", "b"]))]);
    assert_eq!(Checkpoint::open(&single).unwrap().names().count(), 2);
    let sharded = folder(
        "well-formed-shards",
        &[
            (
                INDEX,
                &index(&[("a", "1.safetensors"), ("b", "2.safetensors")]),
            ),
            ("1.safetensors", &tensors(&["a"])),
            ("2.safetensors", &tensors(&["b"])),
        ],
    );
    assert_eq!(Checkpoint::open(&sharded).unwrap().names().count(), 2);
}

#[test]
fn folders_that_are_none() {
    let dir = scratch("refusals-nowhere");
    let missing = dir.join("model");
    assert_refused!(
        missing,
        Error::NotACheckpoint { .. },
        "DIR is not a checkpoint: no such folder"
    );
    fs::write(&missing, "").unwrap();
    assert_refused!(
        missing,
        Error::NotACheckpoint { .. },
        "DIR is not a checkpoint: it is a file; give the folder that holds config.json"
    );
    assert_refused!(
        dir,
        Error::NotACheckpoint { .. },
        "DIR is not a checkpoint: config.json is missing"
    );
}

#[test]
fn configs_that_are_no_json_object() {
    for (name, config, reason) in [
        (
            "config-words",
            "not json",
            "expected ident at line 1 column 2",
        ),
        (
            "config-cut",
            r#"{"a": 1"#,
            "EOF while parsing an object at line 1 column 7",
        ),
        (
            "config-empty",
            "",
            "EOF while parsing a value at line 1 column 0",
        ),
        ("config-list", "[]", "expected a JSON object"),
        ("config-null", "null", "expected a JSON object"),
        (
            "config-deep",
            &"[".repeat(100_000),
            "recursion limit exceeded at line 1 column 128",
        ),
    ] {
        let dir = folder(name, &[(SINGLE, &tensors(&["a"]))]);
        fs::write(dir.join("config.json"), config).unwrap();
        assert_refused!(dir, Error::Json { .. }, format!("config.json: {reason}"));
    }
    let dir = folder("config-bytes", &[(SINGLE, &tensors(&["a"]))]);
    fs::write(dir.join("config.json"), [0xff, 0xfe]).unwrap();
    assert_refused!(
        dir,
        Error::Io { .. },
        "config.json: stream did not contain valid UTF-8"
    );
}

#[test]
fn folders_without_weights() {
    for (name, other, reason) in [
        (
            "no-weights",
            "tokenizer.json",
            "neither model.safetensors nor model.safetensors.index.json is there",
        ),
        (
            "no-weights-bin",
            "pytorch_model.bin",
            "model.safetensors is missing; weights in other formats than safetensors are not read",
        ),
        (
            "no-weights-name",
            "model-00001-of-00002.safetensors",
            "it holds safetensors files, but neither model.safetensors nor model.safetensors.index.json",
        ),
    ] {
        let dir = folder(name, &[(other, b"")]);
        assert_refused!(
            dir,
            Error::NotACheckpoint { .. },
            format!("DIR is not a checkpoint: {reason}")
        );
    }
}

#[test]
fn truncated_files() {
    let whole = fs::read(dir("llama-channel-token").join(SINGLE)).unwrap();
    let header = u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    for (name, length, reason) in [
        ("cut-data", whole.len() - 1, "file not fully covered"),
        ("cut-all-data", header + 8, "file not fully covered"),
        ("cut-header", header, "invalid header length"),
        ("cut-to-length", 8, "invalid header length"),
        ("cut-in-length", 7, "header too small"),
        ("cut-to-nothing", 0, "header too small"),
    ] {
        assert_broken(name, &whole[..length], reason);
    }
    // A part of a download with something else behind it.
    assert_broken(
        "too-long",
        &[&whole[..], b"x"].concat(),
        "file not fully covered",
    );
}

#[test]
fn headers_that_lie() {
    let length = |length: u64| [&length.to_le_bytes()[..], b"{}"].concat();
    assert_broken("header-2-60", &length(1 << 60), "header too large");
    assert_broken("header-max", &length(u64::MAX), "header too large");
    assert_broken("header-longer", &length(3), "invalid header length");

    let one = |dtype: &str, shape: &str, end: u64| {
        format!(r#"{{"a":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[0,{end}]}}}}"#)
    };
    let far = 1u64 << 40;
    for (name, header, reason) in [
        (
            "header-words",
            "hello!!!".to_string(),
            "invalid JSON in header",
        ),
        ("header-list", "[]".to_string(), "invalid JSON in header"),
        (
            "header-dtype",
            one("F9", "[1]", 4),
            "invalid JSON in header",
        ),
        (
            "header-negative",
            one("F32", "[-1]", 4),
            "invalid JSON in header",
        ),
        (
            "header-dims",
            one("F8_E4M3", &format!("[{far},{far}]"), 4),
            "overflow computing buffer size",
        ),
        (
            "header-bits",
            one("F32", &format!("[{}]", u64::MAX / 4), 4),
            "overflow computing buffer size",
        ),
        (
            "header-shape",
            one("F32", "[2]", 4),
            "invalid shape, data type, or offset",
        ),
        (
            "header-end",
            one("F32", "[1099511627776]", 4 * far),
            "file not fully covered",
        ),
        (
            "header-order",
            one("F32", "[1]", 4).replace("[0,", "[9,"),
            "invalid offset for tensor `a`",
        ),
    ] {
        assert_broken(name, &file(&header, 4), reason);
    }
}

#[test]
fn a_name_twice_in_one_header() {
    let twice = file(
        r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[4,8]},
            "a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#,
        8,
    );
    assert_refused!(
        folder("twice", &[(SINGLE, &twice)]),
        Error::DuplicateTensor { .. },
        r#"tensor "a" is stored twice: in "model.safetensors" and in "model.safetensors""#
    );
}

fn shards(name: &str, index: &[u8]) -> PathBuf {
    let files: [(&str, &[u8]); 3] = [
        (INDEX, index),
        ("1.safetensors", &tensors(&["a", "b"])),
        ("2.safetensors", &tensors(&["b", "c"])),
    ];
    folder(name, &files)
}

#[test]
fn a_name_in_two_shards() {
    let both = index(&[("a", "1.safetensors"), ("c", "2.safetensors")]);
    assert_refused!(
        shards("two-shards", &both),
        Error::DuplicateTensor { .. },
        r#"tensor "b" is stored twice: in "1.safetensors" and in "2.safetensors""#
    );
}

#[test]
fn indexes_that_lie() {
    assert_refused!(
        shards(
            "missing-shard",
            &index(&[("a", "1.safetensors"), ("d", "3.safetensors")])
        ),
        Error::MissingShard { .. },
        r#"model.safetensors.index.json names the shard "3.safetensors", which is not there; download it again"#
    );
    for (name, tensor, file) in [
        ("missing-tensor", "d", "1.safetensors"),
        ("misplaced-tensor", "c", "1.safetensors"),
    ] {
        let entries = [("a", "1.safetensors"), (tensor, file)];
        assert_refused!(
            shards(name, &index(&entries)),
            Error::MissingTensor { .. },
            format!(
                "model.safetensors.index.json places tensor {tensor:?} in {file:?}, which does not hold it"
            )
        );
    }
}

#[test]
fn indexes_that_lead_elsewhere() {
    // The file is there: only the way to it is wrong.
    let outside = scratch("refusals-outside").join("1.safetensors");
    fs::write(&outside, tensors(&["a"])).unwrap();
    let absolute = outside.to_str().unwrap();
    for (name, file) in [
        ("traversal-up", "../refusals-outside/1.safetensors"),
        ("traversal-absolute", absolute),
        ("traversal-here", "./1.safetensors"),
        ("traversal-parent", ".."),
        ("traversal-empty", ""),
    ] {
        assert_refused!(
            shards(name, &index(&[("a", file)])),
            Error::Json { .. },
            format!("model.safetensors.index.json: {file:?} is not a plain file name")
        );
    }
}

#[test]
fn indexes_that_are_none() {
    for (name, index, reason) in [
        (
            "index-words",
            "weights",
            "expected value at line 1 column 1",
        ),
        ("index-empty", "{}", "weight_map is missing"),
        (
            "index-list",
            r#"{"weight_map": ["a"]}"#,
            "weight_map is missing",
        ),
        (
            "index-no-entry",
            r#"{"weight_map": {}}"#,
            "weight_map is empty",
        ),
        (
            "index-number",
            r#"{"weight_map": {"a": 1}}"#,
            "weight_map must map names to file names",
        ),
    ] {
        assert_refused!(
            shards(name, index.as_bytes()),
            Error::Json { .. },
            format!("model.safetensors.index.json: {reason}")
        );
    }
}

#[test]
fn a_shard_that_is_a_folder() {
    let dir = shards("folder-shard", &index(&[("a", "3.safetensors")]));
    fs::create_dir(dir.join(Path::new("3.safetensors"))).unwrap();
    assert_refused!(
        dir,
        Error::MissingShard { .. },
        r#"model.safetensors.index.json names the shard "3.safetensors", which is not there; download it again"#
    );
}
