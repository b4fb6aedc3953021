//! What the tests publish, where they download it to, and how they look at errors.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use candle_compressed_tensors::hub::{HubError, HubOptions, download};

use crate::hub_server::HubServer;

pub(crate) const MODEL: &str = "owner/tiny-FP8";
pub(crate) const SINGLE: &str = "model.safetensors";
pub(crate) const INDEX: &str = "model.safetensors.index.json";
pub(crate) const SHARDS: [&str; 3] = [
    "model-00001-of-00003.safetensors",
    "model-00002-of-00003.safetensors",
    "model-00003-of-00003.safetensors",
];

/// A folder for one test's cache, removed at its end.
pub(crate) struct Folder(pub(crate) PathBuf);

impl Folder {
    pub(crate) fn new() -> Self {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("hub-{}-{count}", std::process::id());
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    pub(crate) fn options(&self, endpoint: &str) -> HubOptions {
        let mut options = HubOptions::new(&self.0);
        options.endpoint = endpoint.to_owned();
        options.progress = false;
        options.retries = 2;
        options
    }

    /// Files in `blobs`, without the locks.
    pub(crate) fn blobs(&self) -> BTreeSet<String> {
        let folder = self.0.join("models--owner--tiny-FP8/blobs");
        let names = fs::read_dir(folder).into_iter().flatten();
        let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter(|name| !name.ends_with(".lock")).collect()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// `len` bytes that differ from place to place.
pub(crate) fn bytes(seed: u32, len: usize) -> Vec<u8> {
    let mut x = seed.wrapping_mul(2_654_435_761) | 1;
    let mut next = || {
        x ^= x << 13;
        x ^= x >> 17;
        x ^= x << 5;
        (x >> 8) as u8
    };
    (0..len).map(|_| next()).collect()
}

pub(crate) fn index(shards: &[&str]) -> Vec<u8> {
    let entries = shards.iter().enumerate();
    let map: serde_json::Map<String, serde_json::Value> = entries
        .map(|(i, shard)| (format!("t{i}"), (*shard).into()))
        .collect();
    serde_json::json!({ "metadata": {}, "weight_map": map })
        .to_string()
        .into_bytes()
}

pub(crate) fn single(server: &HubServer, weights: &[u8]) -> String {
    server.publish(
        "main",
        &[
            ("config.json", b"{\"model_type\": \"llama\"}"),
            (SINGLE, weights),
            ("tokenizer.json", b"{}"),
            ("tokenizer_config.json", b"{\"a\": 1}"),
            ("chat_template.jinja", b"{{ messages }}"),
            ("README.md", b"not taken"),
            ("pytorch_model.bin", b"not taken either"),
        ],
    )
}

pub(crate) fn sharded(server: &HubServer, files: &[&str]) -> Vec<(String, Vec<u8>)> {
    let shards: Vec<_> = (1..)
        .zip(files)
        .map(|(i, name)| ((*name).to_owned(), bytes(i, 40_000)))
        .collect();
    let index = index(&SHARDS);
    let mut all: Vec<(&str, &[u8])> = vec![("config.json", b"{}"), (INDEX, &index)];
    all.extend(
        shards
            .iter()
            .map(|(name, bytes)| (name.as_str(), bytes.as_slice())),
    );
    server.publish("main", &all);
    shards
}

/// The error of a download that must fail, with its text.
pub(crate) fn fails(
    model_id: &str,
    revision: Option<&str>,
    options: &HubOptions,
) -> (HubError, String) {
    let error = download(model_id, revision, options).unwrap_err();
    let text = error.to_string();
    (error, text)
}

#[track_caller]
pub(crate) fn says(text: &str, words: &[&str]) {
    for word in words {
        assert!(text.contains(word), "`{word}` is not in: {text}");
    }
}
