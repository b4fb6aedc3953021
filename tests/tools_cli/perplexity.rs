//! `perplexity` against the references, and its windows.

use std::path::{Path, PathBuf};

use candle_core::Device;

use crate::run::{run, succeed};
use crate::support::{Reference, dir, max_difference, rows, scratch};

/// A file of ids in a scratch folder.
fn ids_file(folder: &Path, ids: &[u32]) -> String {
    let path = folder.join(format!("{}-ids.txt", ids.len()));
    let text: Vec<String> = ids.iter().map(u32::to_string).collect();
    // Any whitespace separates.
    std::fs::write(&path, text.join("\n ") + "\n").expect("ids");
    path.display().to_string()
}

struct Scored {
    mean_nll: f64,
    json: serde_json::Value,
    logits: Vec<Vec<f64>>,
}

fn score(fixture: &str, folder: &Path, ids: &[u32], flags: &[&str]) -> Scored {
    let (model, ids, out) = (
        dir(fixture).display().to_string(),
        ids_file(folder, ids),
        folder.join("logits.safetensors"),
    );
    let path = out.display().to_string();
    let mut args = vec!["--model", &model, "--ids", &ids, "--logits-out", &path];
    args.extend(["--dtype", "f32", "--cpu", "--json"]);
    args.extend(flags);
    let json = succeed("perplexity", &args).json();
    let file = candle_core::safetensors::load(&out, &Device::Cpu).expect("logits");
    assert_eq!(file.len(), 1);
    assert_eq!(file["logits"].dtype(), candle_core::DType::F32);
    Scored {
        mean_nll: json["mean_nll"].as_f64().expect("a number"),
        logits: rows(&file["logits"]),
        json,
    }
}

/// Mean over all tokens but the first.
fn mean_nll(logits: &[Vec<f64>], ids: &[u32]) -> f64 {
    let nll = |(row, &target): (&Vec<f64>, &u32)| {
        let sum: f64 = row.iter().map(|logit| logit.exp()).sum();
        sum.ln() - row[target as usize]
    };
    let sum: f64 = logits.iter().zip(&ids[1..]).map(nll).sum();
    sum / (ids.len() - 1) as f64
}

#[test]
fn each_mode_agrees_with_its_own_reference() {
    for fixture in ["llama-tensor-static", "qwen3-moe-channel", "llama-kv"] {
        let folder = scratch(&format!("perplexity-{fixture}"));
        let reference = Reference::open(fixture);
        let ids = reference.ids("input_ids");
        let modes = ["as_checkpoint", "per_token", "full"];
        let expected = modes.map(|mode| rows(reference.get(&format!("logits.{mode}"))));
        for (own, mode) in modes.iter().enumerate() {
            let mode = mode.replace('_', "-");
            let found = score(fixture, &folder, &ids, &["--activations", &mode]);
            assert_eq!(found.json["activations"], mode.as_str());
            let errors: Vec<f64> = expected
                .iter()
                .map(|expected| max_difference(&found.logits, expected))
                .collect();
            for (other, error) in errors.iter().enumerate() {
                let same = max_difference(&expected[own], &expected[other]) == 0.;
                assert!(
                    same || 3. * errors[own] < *error,
                    "{fixture} {mode}: {errors:?}"
                );
            }
            // A logit that moves by d moves a log-softmax by 2d at most.
            let wanted = mean_nll(&expected[own], &ids);
            assert!(
                (found.mean_nll - wanted).abs() <= 2. * errors[own] + 1e-12,
                "{fixture} {mode}: {} and {wanted}",
                found.mean_nll
            );
        }
    }
}

#[test]
fn the_numbers_follow_from_the_logits() {
    let fixture = "llama-channel-token";
    let folder = scratch("perplexity-numbers");
    let reference = Reference::open(fixture);
    let ids = reference.ids("input_ids");
    let found = score(fixture, &folder, &ids, &["--dequantize"]);

    let expected = rows(reference.get("logits.dequantized"));
    let largest = expected
        .iter()
        .flatten()
        .fold(0., |max: f64, x| max.max(x.abs()));
    assert!(max_difference(&found.logits, &expected) < 1e-4 * largest);

    let wanted = mean_nll(&found.logits, &ids);
    assert!(
        (found.mean_nll - wanted).abs() < 1e-12,
        "{}",
        found.mean_nll
    );
    let perplexity = found.json["perplexity"].as_f64().expect("a number");
    assert!((perplexity / wanted.exp() - 1.).abs() < 1e-12);
    assert_eq!(found.json["tokens"], ids.len());
    assert_eq!(found.json["scored_tokens"], ids.len() - 1);
    assert_eq!(found.json["fp8"], false);

    let (model, ids) = (dir(fixture).display().to_string(), ids_file(&folder, &ids));
    let args = ["--model", &model, "--ids", &ids, "--dequantize"];
    let text = succeed("perplexity", &args).stdout;
    for (label, wanted) in [
        ("mean negative log-likelihood", wanted),
        ("perplexity", wanted.exp()),
    ] {
        let line = text.lines().find_map(|line| line.strip_prefix(label));
        let printed: f64 = line.and_then(|line| line.trim().parse().ok()).expect(&text);
        assert!((printed / wanted - 1.).abs() < 1e-12, "{text}");
    }
}

#[test]
fn windows_do_not_see_each_other() {
    let fixture = "llama-channel-token";
    let folder = scratch("perplexity-windows");
    let ids = Reference::open(fixture).ids("input_ids");
    assert_eq!(ids.len(), 12);
    let found = score(fixture, &folder, &ids, &["--window", "5"]);
    assert_eq!(found.json["window"], 5);
    assert_eq!(found.json["scored_tokens"], 4 + 4 + 1);
    assert_eq!(found.logits.len(), 12);

    let mut sum = 0.;
    for window in [0..5, 5..10, 10..12] {
        let alone = score(fixture, &folder, &ids[window.clone()], &[]);
        assert!(max_difference(&alone.logits, &found.logits[window.clone()]) < 1e-5);
        sum += alone.mean_nll * (window.len() - 1) as f64;
    }
    assert!((found.mean_nll - sum / 9.).abs() < 1e-5);
    let whole = score(fixture, &folder, &ids, &[]);
    assert!(max_difference(&whole.logits[5..10], &found.logits[5..10]) > 1e-3);
}

#[test]
fn a_text_goes_through_the_tokenizer_of_the_checkpoint() {
    let fixture = "llama-channel-token";
    let folder = scratch("perplexity-text");
    for file in ["config.json", "model.safetensors"] {
        std::fs::copy(dir(fixture).join(file), folder.join(file)).expect("a copy");
    }
    let text = folder.join("text.txt");
    std::fs::write(&text, "the fox saw the owl").expect("a text");
    let args = |model: PathBuf| {
        let model = model.display().to_string();
        let text = text.display().to_string();
        [
            "--model".into(),
            model,
            "--text".into(),
            text,
            "--json".into(),
        ]
    };
    fn strs(args: &[String]) -> Vec<&str> {
        args.iter().map(String::as_str).collect()
    }
    run("perplexity", &strs(&args(dir(fixture)))).assert_refused(&["tokenizer.json", "--ids"]);

    let tokenizer = serde_json::json!({
        "version": "1.0",
        "added_tokens": [], "normalizer": null, "post_processor": null, "decoder": null,
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {
            "type": "WordLevel", "unk_token": "?",
            "vocab": {"?": 0, "the": 3, "fox": 7, "owl": 11, "saw": 13},
        },
    });
    std::fs::write(folder.join("tokenizer.json"), tokenizer.to_string()).expect("a tokenizer");
    let by_text = succeed("perplexity", &strs(&args(folder.clone()))).json();
    let by_ids = score(fixture, &folder, &[3, 7, 13, 3, 11], &[]);
    assert_eq!(by_text["tokens"], 5);
    assert_eq!(by_text["mean_nll"], by_ids.json["mean_nll"]);
}

#[test]
fn what_cannot_be_scored_is_refused_and_leaves_no_file() {
    let folder = scratch("perplexity-refused");
    let model = dir("llama-channel-token").display().to_string();
    let out = folder.join("logits.safetensors").display().to_string();
    let refused = |ids: &str, flags: &[&str], words: &[&str]| {
        let path = folder.join("ids.txt");
        std::fs::write(&path, ids).expect("ids");
        let path = path.display().to_string();
        let mut args = vec!["--model", &model, "--ids", &path, "--logits-out", &out];
        args.extend(flags);
        run("perplexity", &args).assert_refused(words);
        assert_eq!(std::fs::read_dir(&folder).expect("a folder").count(), 1);
    };
    refused("", &[], &["at least 2"]);
    refused("5", &[], &["at least 2"]);
    refused("5 x 7", &[], &["entry 2", "\"x\""]);
    refused("5 6 999999", &[], &["token 2 is id 999999", "vocabulary"]);
    refused("5 6 7", &["--window", "1"], &["--window 1"]);
    refused("5 6 7", &["--text", "a.txt"], &["--text", "--ids"]);
    refused("5 6 7", &["--dtype", "f64"], &["f64", "bf16"]);
    run("perplexity", &["--model", &model]).assert_refused(&["--text", "--ids"]);
    run("perplexity", &["--model", &model, "--ids", "no-such-file"])
        .assert_refused(&["no-such-file"]);
}
