//! `bench` on one layer of the smallest shape.

use serde_json::Value;

use crate::run::{run, succeed};

fn keys(value: &Value) -> Vec<&str> {
    let object = value
        .as_object()
        .unwrap_or_else(|| panic!("{value} is no object"));
    object.keys().map(String::as_str).collect()
}

fn number(value: &Value) -> f64 {
    value
        .as_f64()
        .unwrap_or_else(|| panic!("{value} is no number"))
}

#[test]
fn the_json_is_one_object_and_its_bytes_are_those_of_the_shape() {
    let said = succeed(
        "bench",
        &[
            "--shape",
            "llama-1b",
            "--layers",
            "1",
            "--prefill",
            "3,5",
            "--decode",
            "3",
            "--context",
            "4",
            "--batch",
            "1,2",
            "--cpu",
            "--dtype",
            "f32",
            "--json",
        ],
    );
    let report = said.json();
    let top = [
        "shape",
        "device",
        "dtype",
        "weight_bytes",
        "prefill",
        "decode",
    ];
    assert_eq!(keys(&report), top);
    assert_eq!(report["shape"], "llama-1b");
    assert_eq!(report["device"], "cpu");
    assert_eq!(report["dtype"], "f32");

    // q, k, v, o; gate, up, down: a byte a weight and an F32 scale a row. Norms, embedding and output projection in F32.
    let linears: usize = [
        (2048, 2048),
        (512, 2048),
        (512, 2048),
        (2048, 2048),
        (8192, 2048),
        (8192, 2048),
        (2048, 8192),
    ]
    .iter()
    .map(|(n, k)| n * k + 4 * n)
    .sum();
    let norms = 4 * 3 * 2048;
    let matrix = 4 * 32000 * 2048;
    assert_eq!(report["weight_bytes"], linears + norms + 2 * matrix);

    let prefill = report["prefill"].as_array().expect("a list");
    assert_eq!(prefill.len(), 2);
    for (run, tokens) in prefill.iter().zip([3, 5]) {
        assert_eq!(keys(run), ["tokens", "tok_s"]);
        assert_eq!(run["tokens"], tokens);
        assert!(number(&run["tok_s"]) > 0.);
    }
    let decode = report["decode"].as_array().expect("a list");
    assert_eq!(decode.len(), 2);
    for (run, batch) in decode.iter().zip([1, 2]) {
        let fields = [
            "batch",
            "context",
            "tokens",
            "tok_s",
            "bytes_per_token",
            "gb_s",
        ];
        assert_eq!(keys(run), fields);
        assert_eq!((&run["batch"], &run["context"]), (&batch.into(), &4.into()));
        assert_eq!(run["tokens"], 3);
        // Steps see 5, 6 and 7 positions of 8 heads of 64, keys and values in F32.
        let cache = batch * 6 * 2 * 8 * 64 * 4;
        let step = linears + norms + matrix + batch * 4 * 2048 + cache;
        let bytes = number(&run["bytes_per_token"]);
        assert!(
            (bytes - step as f64 / batch as f64).abs() < 1e-3,
            "{bytes}, {step}"
        );
        let rate = number(&run["tok_s"]) * bytes / 1e9;
        assert!((number(&run["gb_s"]) / rate - 1.).abs() < 1e-9);
    }
    assert!(said.stderr.contains("prefill: 5 tokens"), "{}", said.stderr);
    assert!(
        said.stderr.contains("decode: 3 steps of 2, context 4"),
        "{}",
        said.stderr
    );
}

#[test]
fn the_table_has_a_row_for_each_run() {
    let said = succeed(
        "bench",
        &[
            "--layers",
            "1",
            "--prefill",
            "0",
            "--decode",
            "2",
            "--context",
            "1,2",
            "--batch",
            "1",
            "--dtype",
            "bf16",
        ],
    );
    assert!(
        said.stdout
            .starts_with("llama-1b on cpu in bf16, 1 of 16 layers, "),
        "{}",
        said.stdout
    );
    let row = |line: &&str| line.starts_with("decode ");
    assert_eq!(
        said.stdout.lines().filter(row).count(),
        2,
        "{}",
        said.stdout
    );
    assert!(!said.stdout.contains("prefill"), "{}", said.stdout);
}

#[test]
fn what_makes_no_sense_is_refused_before_anything_is_made() {
    run("bench", &["--layers", "17"]).assert_refused(&["--layers 17", "16 layers"]);
    run("bench", &["--layers", "0"]).assert_refused(&["--layers 0"]);
    run("bench", &["--batch", "0"]).assert_refused(&["--batch"]);
    run("bench", &["--shape", "gpt"]).assert_refused(&["llama-8b", "qwen3-30b-a3b"]);
    let most = usize::MAX.to_string();
    run("bench", &["--context", &most]).assert_refused(&["too large"]);
    run("bench", &["--prefill", &most]).assert_refused(&["--prefill"]);
}

/// Free memory is known on Linux.
#[cfg(target_os = "linux")]
#[test]
fn what_does_not_fit_is_refused_before_it_is_made() {
    let said = run(
        "bench",
        &[
            "--layers",
            "1",
            "--batch",
            "1000000",
            "--context",
            "1000000",
        ],
    );
    said.assert_refused(&["do not fit", "GB that are free", "smaller batches"]);
}
