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

/// The bandwidth of a streaming read, after a look at everything else that is said of the machine.
fn read_gb_s(report: &Value) -> f64 {
    let machine = &report["machine"];
    let fields = [
        "threads",
        "instruction_set",
        "read_gb_s",
        "multiply_gflop_s",
    ];
    assert_eq!(keys(machine), fields);
    assert!(number(&machine["threads"]) >= 1.);
    assert!(machine["instruction_set"].is_string());
    assert!(number(&machine["multiply_gflop_s"]) > 0.);
    let rate = number(&machine["read_gb_s"]);
    assert!(rate > 0.1, "{rate} GB/s are no memory");
    rate
}

/// Bytes of the linears of a layer: q, k, v, o; gate, up, down. A byte a weight and an F32 scale a row.
fn layer() -> usize {
    let linears = [
        (2048, 2048),
        (512, 2048),
        (512, 2048),
        (2048, 2048),
        (8192, 2048),
        (8192, 2048),
        (2048, 8192),
    ];
    linears.iter().map(|(n, k)| n * k + 4 * n).sum()
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
        "machine",
        "lm_head",
        "weight_bytes",
        "prefill",
        "decode",
    ];
    assert_eq!(keys(&report), top);
    assert_eq!(report["shape"], "llama-1b");
    assert_eq!(report["device"], "cpu");
    assert_eq!(report["dtype"], "f32");
    assert_eq!(report["lm_head"], "bf16");
    read_gb_s(&report);

    // Norms in F32, embedding and output projection in BF16.
    let linears = layer();
    let norms = 4 * 3 * 2048;
    let matrix = 2 * 32000 * 2048;
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
            "read_gb_s",
            "read_percent",
        ];
        assert_eq!(keys(run), fields);
        assert_eq!((&run["batch"], &run["context"]), (&batch.into(), &4.into()));
        assert_eq!(run["tokens"], 3);
        // Steps see 5, 6 and 7 positions of 8 heads of 64, keys and values in F32.
        let cache = batch * 6 * 2 * 8 * 64 * 4;
        let step = linears + norms + matrix + batch * 2 * 2048 + cache;
        let bytes = number(&run["bytes_per_token"]);
        assert!(
            (bytes - step as f64 / batch as f64).abs() < 1e-3,
            "{bytes}, {step}"
        );
        let rate = number(&run["tok_s"]) * bytes / 1e9;
        assert!((number(&run["gb_s"]) / rate - 1.).abs() < 1e-9);
        let share = 100. * rate / number(&run["read_gb_s"]);
        assert!((number(&run["read_percent"]) / share - 1.).abs() < 1e-9);
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
fn an_fp8_head_is_named_and_counted() {
    let args = "--layers 1 --prefill 0 --decode 1 --context 1 --batch 1 --lm-head fp8 --cpu";
    let args: Vec<&str> = args.split(' ').collect();
    let said = succeed("bench", &args);
    assert!(said.stdout.contains("lm_head in fp8, "), "{}", said.stdout);
    let report = succeed("bench", &[&args[..], &["--json"]].concat()).json();
    assert_eq!(report["lm_head"], "fp8");
    let head = 32000 * 2048 + 4 * 32000;
    let (norms, embedding) = (4 * 3 * 2048, 2 * 32000 * 2048);
    assert_eq!(report["weight_bytes"], layer() + norms + embedding + head);
    // One step sees two positions in F32.
    let step = layer() + norms + head + 2 * 2048 + 2 * 2 * 8 * 64 * 4;
    assert_eq!(number(&report["decode"][0]["bytes_per_token"]), step as f64);
}

#[test]
fn the_parts_of_a_profile_make_up_the_step() {
    let args = "--layers 1 --prefill 9 --decode 3 --context 2 --batch 2 --profile --cpu";
    let args: Vec<&str> = args.split(' ').collect();
    let report = succeed("bench", &[&args[..], &["--json"]].concat()).json();
    let runs = report["profile"].as_array().expect("a list");
    let names: Vec<_> = runs.iter().map(|run| &run["run"]).collect();
    assert_eq!(names, ["prefill", "decode"]);
    for (run, (batch, context, tokens)) in runs.iter().zip([(1, 0, 9), (2, 2, 1)]) {
        let shape = ["batch", "context", "tokens"].map(|key| run[key].as_u64());
        assert_eq!(shape, [Some(batch), Some(context), Some(tokens)]);
        let parts = run["parts"].as_array().expect("a list");
        let names: Vec<_> = parts
            .iter()
            .filter_map(|part| part["part"].as_str())
            .collect();
        let expected = [
            "embed_tokens",
            "positions",
            "norms",
            "qkv_proj",
            "rope",
            "kv_cache",
            "attention",
            "o_proj",
            "gate_up_proj",
            "silu_mul",
            "down_proj",
            "lm_head",
            "sampling",
            "rest",
        ];
        assert_eq!(names, expected);
        let step = number(&run["step_us"]);
        let sum = |key: &str| parts.iter().map(|part| number(&part[key])).sum::<f64>();
        assert!((sum("us") / step - 1.).abs() < 1e-6, "{run}");
        assert!((sum("percent") - 100.).abs() < 1e-4, "{run}");
        // Linears are most of it, and what no part accounts for is little.
        let us = |name: &str| {
            let part = parts.iter().find(|part| part["part"] == name);
            number(&part.unwrap_or_else(|| panic!("no {name}"))["us"])
        };
        assert!(us("rest") < 0.3 * step, "{run}");
        for (name, weights, bytes, rows) in [
            ("qkv_proj", 3072 * 2048, 3072 * (2048 + 4), batch * tokens),
            ("down_proj", 2048 * 8192, 2048 * (8192 + 4), batch * tokens),
            ("lm_head", 32000 * 2048, 2 * 32000 * 2048, batch),
        ] {
            let part = parts.iter().find(|part| part["part"] == name);
            let part = part.unwrap_or_else(|| panic!("no {name}"));
            let near = |key: &str, value: f64| {
                let found = number(&part[key]);
                assert!(
                    (found / value - 1.).abs() < 1e-6,
                    "{key}: {value} in {part}"
                );
            };
            near("gflop_s", 2. * (weights * rows) as f64 / us(name) / 1e3);
            near("gb_s", f64::from(bytes) / us(name) / 1e3);
        }
    }
    let said = succeed("bench", &args);
    for head in [
        "prefill of 9 ",
        "decode, batch 2, context 2 ",
        "gate_up_proj ",
        "step ",
    ] {
        let lines = said.stdout.lines().filter(|line| line.starts_with(head));
        assert!(
            lines.count() > 0,
            "{head:?} starts no line of {}",
            said.stdout
        );
    }
}

#[test]
fn single_linears_are_compared_with_the_machine_and_with_candle() {
    let args = "--linears --shape llama-1b --rows 1,3 --rotate 1 --cpu";
    let args: Vec<&str> = args.split(' ').collect();
    let report = succeed("bench", &[&args[..], &["--json"]].concat()).json();
    assert_eq!(
        keys(&report),
        ["shape", "device", "dtype", "machine", "linears"]
    );
    let machine_read = read_gb_s(&report);
    let machine_multiply = number(&report["machine"]["multiply_gflop_s"]);
    let lines = report["linears"].as_array().expect("a list");
    let shapes = [
        ("qkv_proj", "fp8", 2048 + 2 * 512, 2048),
        ("o_proj", "fp8", 2048, 2048),
        ("gate_up_proj", "fp8", 2 * 8192, 2048),
        ("down_proj", "fp8", 2048, 8192),
        ("lm_head", "fp8", 32000, 2048),
        ("lm_head", "bf16", 32000, 2048),
    ];
    assert_eq!(lines.len(), 2 * shapes.len());
    let expected = shapes.iter().flat_map(|shape| [(shape, 1), (shape, 3)]);
    for (line, (&(name, weight, n, k), m)) in lines.iter().zip(expected) {
        assert_eq!(
            (&line["linear"], &line["weight"]),
            (&name.into(), &weight.into())
        );
        let sizes = ["n", "k", "m"].map(|key| line[key].as_u64());
        assert_eq!(sizes, [Some(n), Some(k), Some(m)]);
        let bytes = if weight == "fp8" {
            n * k + 4 * n
        } else {
            2 * n * k
        };
        let (us, flop) = (number(&line["us"]), (2 * m * n * k) as f64);
        let near = |key: &str, value: f64| {
            let found = number(&line[key]);
            assert!(
                (found / value - 1.).abs() < 1e-6,
                "{key}: {value} in {line}"
            );
        };
        near("gb_s", bytes as f64 / us / 1e3);
        near("gflop_s", flop / us / 1e3);
        let (read, multiply) = (bytes as f64 / machine_read, flop / machine_multiply);
        near("peak_percent", 100. * read.max(multiply) / us / 1e3);
        assert_eq!(
            line["bound"],
            if read >= multiply { "read" } else { "multiply" }
        );
        near("times_candle", number(&line["candle_us"]) / us);
    }
}

#[test]
fn peers_run_the_same_and_their_columns_are_the_quotients() {
    let args =
        "--layers 1 --prefill 4 --decode 9 --context 3 --batch 1 --peer dequantized,candle --cpu";
    let args: Vec<&str> = args.split(' ').collect();
    let report = succeed("bench", &[&args[..], &["--json"]].concat()).json();
    let prefill = report["prefill"].as_array().expect("a list");
    let decode = report["decode"].as_array().expect("a list");
    assert_eq!((prefill.len(), decode.len()), (1, 1));
    for (run, tokens) in prefill.iter().zip([4]).chain(decode.iter().zip([8])) {
        let peers = run["peers"].as_array().expect("a list");
        let names: Vec<_> = peers.iter().map(|peer| &peer["name"]).collect();
        assert_eq!(names, ["dequantized", "candle"]);
        for peer in peers {
            assert_eq!(keys(peer), ["name", "tokens", "tok_s", "times"]);
            assert_eq!(peer["tokens"], tokens, "at most eight steps");
            let times = number(&run["tok_s"]) / number(&peer["tok_s"]);
            assert!((number(&peer["times"]) / times - 1.).abs() < 1e-9, "{run}");
        }
    }
    let args = "--layers 1 --prefill 0 --decode 1 --context 1 --batch 1 --peer candle --cpu";
    let said = succeed("bench", &args.split(' ').collect::<Vec<_>>());
    let head = said.stdout.lines().find(|line| line.starts_with("run "));
    let head = head.expect("a table");
    assert!(
        head.ends_with("read GB/s  % of read  candle tokens/s  × candle"),
        "{head}"
    );
}

#[test]
fn what_makes_no_sense_is_refused_before_anything_is_made() {
    run("bench", &["--layers", "17"]).assert_refused(&["--layers 17", "16 layers"]);
    run("bench", &["--layers", "0"]).assert_refused(&["--layers 0"]);
    run("bench", &["--batch", "0"]).assert_refused(&["--batch"]);
    run("bench", &["--shape", "gpt"]).assert_refused(&["llama-8b", "qwen3-30b-a3b"]);
    run("bench", &["--shape", "qwen3-30b-a3b", "--peer", "candle"])
        .assert_refused(&["--peer candle"]);
    run("bench", &["--linears", "--rows", "0"]).assert_refused(&["--rows"]);
    run("bench", &["--linears", "--layers", "1"]).assert_refused(&["--layers"]);
    run("bench", &["--rows", "1"]).assert_refused(&["--linears"]);
    // What is written has the checkpoint's dtypes, and is made on the CPU.
    run("bench", &["--save", "no/such", "--dtype", "f16"]).assert_refused(&["--dtype"]);
    run("bench", &["--save", "no/such", "--xpu"]).assert_refused(&["--xpu"]);
    let most = usize::MAX.to_string();
    run("bench", &["--linears", "--rotate", &most]).assert_refused(&["smaller --rotate"]);
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
