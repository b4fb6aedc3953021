//! The examples as a user runs them: the default run, the help, and what is said when something is wrong.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

const EXAMPLES: [&str; 2] = ["llama-fp8", "qwen-fp8"];

/// What an example printed and how it ended.
struct Run {
    stdout: String,
    stderr: String,
    code: Option<i32>,
}

/// `cargo test` builds the examples beside the tests.
fn binary(example: &str) -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let path = test.parent().unwrap().parent().unwrap();
    let path = path
        .join("examples")
        .join(format!("{example}{}", std::env::consts::EXE_SUFFIX));
    assert!(
        path.is_file(),
        "{} is not there: run `cargo build --examples`",
        path.display()
    );
    path
}

/// Runs an example where neither the network nor a hub cache is within reach.
fn run(example: &str, args: &[&str]) -> Run {
    let output = Command::new(binary(example))
        .args(args)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .env("HF_HUB_OFFLINE", "1")
        .env("HF_HOME", "/nonexistent")
        .env_remove("HF_HUB_CACHE")
        .env_remove("RUST_BACKTRACE")
        .output()
        .unwrap();
    Run {
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
        code: output.status.code(),
    }
}

/// Runs an example that must fail with exit code 1, say nothing on stdout, and name `words` on stderr, without a panic.
fn fails(example: &str, args: &[&str], words: &[&str]) -> String {
    let run = run(example, args);
    assert_eq!(run.code, Some(1), "{args:?}: {}", run.stderr);
    assert_eq!(run.stdout, "", "{args:?}");
    let error = run.stderr.lines().find(|line| line.starts_with("error: "));
    assert!(error.is_some(), "{args:?}: {}", run.stderr);
    for noise in ["panicked", "RUST_BACKTRACE", "stack backtrace"] {
        assert!(!run.stderr.contains(noise), "{args:?}: {}", run.stderr);
    }
    for word in words {
        assert!(
            run.stderr.contains(word),
            "{args:?} should say {word:?}: {}",
            run.stderr
        );
    }
    run.stderr
}

fn checkpoint(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/checkpoints")
        .join(name)
}

/// A copy of a checkpoint that a test may change; removed at the end.
struct Copy(PathBuf);

impl Copy {
    fn of(name: &str, purpose: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("{purpose}-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        for entry in fs::read_dir(checkpoint(name)).unwrap() {
            let path = entry.unwrap().path();
            fs::copy(&path, dir.join(path.file_name().unwrap())).unwrap();
        }
        Self(dir)
    }

    fn write(&self, file: &str, content: &str) {
        fs::write(self.0.join(file), content).unwrap();
    }

    fn path(&self) -> &str {
        self.0.to_str().unwrap()
    }
}

impl Drop for Copy {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// The one line of figures: `key: value | …`.
fn figures(run: &Run) -> Vec<&str> {
    let lines: Vec<_> = run
        .stderr
        .lines()
        .filter(|line| line.starts_with("prompt: "))
        .collect();
    assert_eq!(lines.len(), 1, "{}", run.stderr);
    lines[0].split(" | ").collect()
}

/// `203 tokens at 74.6 tokens/s …`: the two numbers.
fn rate(text: &str) -> (usize, f64) {
    let (count, rest) = text.split_once(' ').unwrap();
    let rate = rest
        .split_once(" at ")
        .unwrap()
        .1
        .split_once(" tokens/s")
        .unwrap()
        .0;
    (
        count.replace(',', "").parse().unwrap(),
        rate.parse().unwrap(),
    )
}

#[test]
fn llama_without_arguments_tells_a_story() {
    let run = run("llama-fp8", &[]);
    assert_eq!(run.code, Some(0), "{}", run.stderr);
    assert!(
        run.stdout.starts_with("Once upon a time, there was a "),
        "{}",
        run.stdout
    );
    assert!(
        run.stdout.ends_with(".\n") || run.stdout.ends_with("\"\n"),
        "{}",
        run.stdout
    );
    let words = run.stdout.split_whitespace().count();
    assert!((60..400).contains(&words), "{words} words: {}", run.stdout);

    let figures = figures(&run);
    let (prompt, prompt_rate) = rate(figures[0].strip_prefix("prompt: ").unwrap());
    let (generated, generated_rate) = rate(figures[1].strip_prefix("generated: ").unwrap());
    assert!(prompt == 5 && prompt_rate > 0.0, "{figures:?}");
    assert!(
        generated >= words - 4 && generated_rate > 0.0,
        "{figures:?}"
    );
    // The story ends by itself.
    assert!(!figures[1].contains("stopped by"), "{figures:?}");
    assert_eq!(figures[3], "28 of 28 linears in FP8");
    assert_eq!(figures[4], "cpu, f32, activations as-checkpoint");
    let loading = figures[5].strip_prefix("loaded in ").unwrap();
    let seconds = loading.split(" s").next().unwrap();
    assert!(seconds.parse::<f64>().unwrap() < 60.0, "{figures:?}");
    // 28 linears of 2.75 million parameters at a byte each, and 0.26 million embeddings in BF16, as they are stored.
    let mib = figures[2].strip_prefix("weights: ").unwrap();
    let mib: f64 = mib.strip_suffix(" MiB").unwrap().parse().unwrap();
    assert!((3.0..3.4).contains(&mib), "{figures:?}");
}

#[test]
fn qwen_without_arguments_answers_with_a_story() {
    let run = run("qwen-fp8", &[]);
    assert_eq!(run.code, Some(0), "{}", run.stderr);
    // The answer alone: neither the question nor the template's marks.
    assert!(run.stdout.starts_with("Once upon a time"), "{}", run.stdout);
    assert!(
        run.stdout.contains("Lily") && run.stdout.contains("ball"),
        "{}",
        run.stdout
    );
    assert!(
        !run.stdout.contains("<|") && !run.stdout.contains("Tell me"),
        "{}",
        run.stdout
    );
    let figures = figures(&run);
    assert!(!figures[1].contains("stopped by"), "{figures:?}");
    // Attention is in FP8; routers, the head and the merged experts are not.
    assert!(figures[3].starts_with("16 of "), "{figures:?}");
    assert!(
        run.stderr.contains("merged experts are dequantized"),
        "{}",
        run.stderr
    );
}

#[test]
fn options_change_what_runs() {
    let setting = |args: &[&str]| {
        let run = run("llama-fp8", &[args, &["-n", "4"]].concat());
        assert_eq!(run.code, Some(0), "{}", run.stderr);
        let figures = figures(&run);
        assert!(
            figures[1].ends_with("(stopped by --sample-len)"),
            "{figures:?}"
        );
        [figures[3], figures[4]].join(", ")
    };
    assert_eq!(
        setting(&["--activations", "full", "--dtype", "bf16", "--cpu"]),
        "28 of 28 linears in FP8, cpu, bf16, activations full"
    );
    assert_eq!(
        setting(&["--dequantize"]),
        "0 of 28 linears in FP8, cpu, f32, dequantized"
    );
}

#[test]
fn sampling_depends_on_the_seed_alone() {
    let text = |seed: &str| {
        let flags = [
            "-n",
            "48",
            "--temperature",
            "1.5",
            "--top-p",
            "0.99",
            "--seed",
            seed,
        ];
        run("llama-fp8", &flags).stdout
    };
    assert_eq!(text("1"), text("1"));
    assert_ne!(text("1"), text("2"));
}

#[test]
fn a_raw_prompt_is_continued() {
    for flag in ["--raw", "--no-chat-template"] {
        let run = run(
            "qwen-fp8",
            &[
                flag,
                "--prompt",
                "Once upon a time, there was a girl",
                "-n",
                "8",
            ],
        );
        assert_eq!(run.code, Some(0), "{}", run.stderr);
        assert!(
            run.stdout
                .starts_with("Once upon a time, there was a girl named "),
            "{}",
            run.stdout
        );
    }
}

#[test]
fn the_text_stops_at_the_context_length() {
    let short = run("llama-fp8", &["--max-seq", "9"]);
    assert!(
        figures(&short)[1].starts_with("generated: 4 tokens"),
        "{}",
        short.stderr
    );
    assert!(
        short.stderr.contains("stopped by --max-seq"),
        "{}",
        short.stderr
    );
    fails(
        "llama-fp8",
        &["--max-seq", "5"],
        &["the prompt has 5 tokens", "--max-seq is 5"],
    );
    let long = "and then ".repeat(600);
    fails(
        "llama-fp8",
        &["--prompt", &long],
        &["context length is 512", "Shorten the prompt"],
    );
}

#[test]
fn help_names_every_flag_and_default() {
    for (example, prompt) in EXAMPLES
        .into_iter()
        .zip(["Once upon a time", "Tell me a story"])
    {
        let run = run(example, &["--help"]);
        assert_eq!(run.code, Some(0));
        for flag in [
            "--model <DIR>",
            "--model-id <OWNER/NAME>",
            "--revision <REVISION>",
            "--dequantize",
            "--activations <MODE>",
            "as-checkpoint, per-token, full",
            "--dtype <DTYPE>",
            "--cpu",
            "--prompt <TEXT>",
            "--raw",
            "-n, --sample-len <TOKENS>",
            "--max-seq <TOKENS>",
            "--temperature <NUMBER>",
            "--top-p <PROBABILITY>",
            "--top-k <TOKENS>",
            "--seed <INTEGER>",
            "--repeat-penalty <FACTOR>",
            "--repeat-last-n <TOKENS>",
            "[default: 299792458]",
            prompt,
            "RedHatAI/",
        ] {
            assert!(
                run.stdout.contains(flag),
                "{example} --help lacks {flag}:\n{}",
                run.stdout
            );
        }
        // A flag that takes a value says what happens without it.
        let mut lines = run.stdout.lines().map(str::trim).peekable();
        while let Some(line) = lines.next() {
            if !(line.starts_with('-') && line.ends_with('>')) {
                continue;
            }
            let mut text = String::new();
            while let Some(next) =
                lines.next_if(|next| !next.starts_with("--") && !next.starts_with("-n"))
            {
                text.push_str(next);
            }
            let optional = ["--model-id"].iter().any(|flag| line.contains(flag));
            assert!(
                optional || text.contains("[default: "),
                "{example}: {line} has no default: {text}"
            );
        }
    }
}

#[test]
fn wrong_models_are_refused_with_advice() {
    let path = |name: &str| checkpoint(name).to_str().unwrap().to_string();
    fails(
        "llama-fp8",
        &["--model", "no/such/folder"],
        &["no/such/folder", "no such folder"],
    );
    fails("llama-fp8", &["--model", "Cargo.toml"], &["config.json"]);
    fails(
        "llama-fp8",
        &["--model", &path("qwen2-channel-token")],
        &["Qwen2ForCausalLM", "qwen-fp8 does"],
    );
    fails(
        "qwen-fp8",
        &["--model", &path("llama-channel-token")],
        &["LlamaForCausalLM", "llama-fp8 does"],
    );
    fails(
        "llama-fp8",
        &["--model", &path("llama-channel-token")],
        &["no tokenizer.json", "copy it there"],
    );
    fails(
        "llama-fp8",
        &["--model", &path("llama-fp8-int4")],
        &["cannot load", "INT4"],
    );
}

#[test]
#[cfg(feature = "hub")]
fn the_hub_is_asked_for_by_model_id() {
    let model = "RedHatAI/Meta-Llama-3.1-8B-Instruct-FP8-dynamic";
    fails(
        "llama-fp8",
        &["--model-id", model],
        &["offline", model, "HF_HUB_OFFLINE"],
    );
    fails(
        "llama-fp8",
        &["--model-id", "tests"],
        &["is a folder", "--model"],
    );
    fails("llama-fp8", &["--model-id", "a b"], &["owner/name"]);
}

#[test]
fn chat_templates_that_cannot_be_used_say_how_to_do_without() {
    let copy = Copy::of("stories-llama-fp8-dynamic", "chat-template");
    copy.write("chat_template.jinja", "{% nonsense %}");
    fails(
        "llama-fp8",
        &["--model", copy.path()],
        &["--raw", "nonsense"],
    );
    copy.write(
        "chat_template.jinja",
        "{{ raise_exception('only for poems') }}",
    );
    fails(
        "llama-fp8",
        &["--model", copy.path()],
        &["--raw", "only for poems"],
    );
    let raw = run("llama-fp8", &["--model", copy.path(), "--raw", "-n", "2"]);
    assert_eq!(raw.code, Some(0), "{}", raw.stderr);

    // A template is used when it can be: this one makes a story's beginning of a name.
    let template = "{{ bos_token }}Once upon a time, there was a girl named {{ messages[0].content.strip() }}.";
    copy.write("chat_template.jinja", template);
    let chat = run(
        "llama-fp8",
        &["--model", copy.path(), "--prompt", " Mia ", "-n", "64"],
    );
    assert!(chat.stdout.contains("Mia"), "{}", chat.stdout);
    assert!(!chat.stdout.contains("Once upon"), "{}", chat.stdout);
}

#[test]
fn damaged_tokenizers_are_refused() {
    let copy = Copy::of("stories-llama-fp8-dynamic", "tokenizer");
    copy.write("tokenizer.json", "{");
    fails(
        "llama-fp8",
        &["--model", copy.path()],
        &["cannot read", "tokenizer.json"],
    );
    copy.write("tokenizer_config.json", "[");
    fs::copy(
        checkpoint("stories-llama-fp8-dynamic").join("tokenizer.json"),
        copy.0.join("tokenizer.json"),
    )
    .unwrap();
    fails(
        "llama-fp8",
        &["--model", copy.path()],
        &["tokenizer_config.json", "not JSON"],
    );
}

#[test]
fn command_lines_that_make_no_sense_are_explained() {
    for (args, word) in [
        (&["--temperature", "-1"][..], "0 or more"),
        (&["--temperature", "nan"], "0 or more"),
        (&["--top-p", "1.5"], "at most 1"),
        (&["--repeat-penalty", "0"], "above 0"),
        (&["--activations", "int4"], "per-token"),
        (&["--dtype", "fp8"], "bf16"),
        (&["--revision", "main"], "--model-id"),
        (&["--model", "a", "--model-id", "b"], "cannot be used with"),
        (
            &["--dequantize", "--activations", "full"],
            "cannot be used with",
        ),
        (&["--max-seq", "0"], "--max-seq"),
        (&["--xpu", "--cpu"], "cannot be used with"),
        (&["--xpu", "first"], "invalid value"),
    ] {
        let run = run("llama-fp8", args);
        assert_eq!(run.code, Some(2), "{args:?}: {}", run.stderr);
        assert!(
            run.stderr.contains(word),
            "{args:?} should say {word:?}: {}",
            run.stderr
        );
    }
}

#[test]
#[cfg(not(feature = "xpu"))]
fn an_xpu_needs_its_feature() {
    fails("llama-fp8", &["--xpu"], &["--features xpu"]);
}

/// On every OpenCL device that there is; and what is said where there is none.
#[test]
#[cfg(feature = "xpu")]
fn an_xpu_tells_the_story_of_the_cpu() {
    use std::io::Write;

    let story = ["-n", "100", "--temperature", "0"];
    let expected = run("llama-fp8", &[&story[..], &["--cpu"]].concat());
    assert_eq!(expected.code, Some(0), "{}", expected.stderr);
    let devices = candle_compressed_tensors::xpu::XpuDevice::list().unwrap_or_default();
    for (index, device) in devices.iter().enumerate() {
        let found = run(
            "llama-fp8",
            &[&story[..], &["--xpu", &index.to_string()]].concat(),
        );
        assert_eq!(found.code, Some(0), "{}", found.stderr);
        assert_eq!(found.stdout, expected.stdout, "on {}", device.name);
        let linears = format!("linears on {}", device.name);
        for said in [&linears[..], "copie"] {
            assert!(found.stderr.contains(said), "{said}: {}", found.stderr);
        }
        // Past what captures the output of tests. If it cannot be said, the test is as good.
        let figures = found.stderr.lines().last().unwrap_or_default();
        // In one piece, as other tests write as well.
        let line = format!("TESTED: llama-fp8 --xpu {index}: {figures}\n");
        let _ = std::io::stderr().write_all(line.as_bytes());
    }
    let no_such = fails("llama-fp8", &["--xpu", "1000"], &["error: "]);
    let (no_library, no_device) = ("no OpenCL library", "no XPU device 1000");
    assert!(
        no_such.contains(no_library) || no_such.contains(no_device),
        "{no_such}"
    );
    fails(
        "llama-fp8",
        &["--xpu", "--dequantize"],
        &["take one of the two"],
    );
}

/// Nothing is on stdout then, which an error would be glued to.
#[test]
fn a_prompt_that_fails_leaves_no_text() {
    let copy = Copy::of("stories-llama-fp8-dynamic", "not-finite");
    let path = copy.0.join("model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let json: serde_json::Value = serde_json::from_slice(&bytes[8..8 + header]).unwrap();
    let norm = &json["model.norm.weight"];
    assert_eq!(norm["dtype"], "BF16");
    let start = 8 + header + norm["data_offsets"][0].as_u64().unwrap() as usize;
    bytes[start..start + 2].copy_from_slice(&0x7fc0u16.to_le_bytes());
    fs::write(&path, bytes).unwrap();
    fails(
        "llama-fp8",
        &["--model", copy.path()],
        &["after 5 positions", "not finite", "--dtype"],
    );
}

/// As in `llama-fp8 | head -c 20`.
#[test]
fn a_reader_may_stop_reading() {
    let mut child = Command::new(binary("llama-fp8"))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(0), "{stderr}");
    assert!(
        !stderr.contains("panicked") && !stderr.contains("error"),
        "{stderr}"
    );
}
