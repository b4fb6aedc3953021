//! `Checkpoint::from_hub`, which takes everything from the environment: run in a child process, so that each case has an
//! environment of its own.

use std::process::Command;

use candle_compressed_tensors::Checkpoint;

use crate::fixture::{Folder, MODEL};
use crate::hub_server::HubServer;

/// Set for the child, which then is the program that opens this model.
const CHILD: &str = "CANDLE_FP8_TEST_MODEL";

/// Not a test of its own: the child of [`the_environment_decides`].
#[test]
fn child() {
    let Ok(model) = std::env::var(CHILD) else {
        return;
    };
    match Checkpoint::from_hub(&model, None) {
        Ok(checkpoint) => {
            let names: Vec<_> = checkpoint.names().collect();
            println!("<opened {names:?}>");
        }
        Err(error) => println!("<refused {error}>"),
    }
}

/// What the child prints under these variables.
fn open(vars: &[(&str, &str)]) -> String {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "from_hub::child", "--nocapture"]);
    for name in [
        "HF_TOKEN",
        "HF_HOME",
        "HF_HUB_CACHE",
        "HF_ENDPOINT",
        "HF_HUB_OFFLINE",
    ] {
        command.env_remove(name);
    }
    command.env(CHILD, MODEL).envs(vars.iter().copied());
    let output = command.output().unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// A safetensors file with one BF16 tensor `w` of shape [1, 2].
fn safetensors() -> Vec<u8> {
    let header = br#"{"w":{"dtype":"BF16","shape":[1,2],"data_offsets":[0,4]}}"#;
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header);
    file.extend([0x80, 0x3f, 0x00, 0x40]);
    file
}

#[test]
fn the_environment_decides() {
    let (server, home) = (HubServer::start(MODEL), Folder::new());
    let weights = safetensors();
    let config = br#"{"model_type": "llama"}"#;
    server.publish(
        "main",
        &[("config.json", config), ("model.safetensors", &weights)],
    );
    server.require_token("hf_right");
    let at = [
        ("HF_HOME", home.0.to_str().unwrap()),
        ("HF_ENDPOINT", server.endpoint()),
    ];
    let with = |more: &[(&'static str, &'static str)]| open(&[&at[..], more].concat());

    let refused = with(&[]);
    assert!(
        refused.contains("<refused") && refused.contains("no token was sent"),
        "{refused}"
    );
    let opened = with(&[("HF_TOKEN", "hf_right")]);
    assert!(opened.contains(r#"<opened ["w"]>"#), "{opened}");
    assert!(
        home.0
            .join("hub/models--owner--tiny-FP8/refs/main")
            .exists()
    );

    let before = server.requests().len();
    let offline = with(&[("HF_HUB_OFFLINE", "1")]);
    assert!(offline.contains(r#"<opened ["w"]>"#), "{offline}");
    let elsewhere = open(&[
        ("HF_HOME", "no/such/folder"),
        ("HF_HUB_OFFLINE", "1"),
        at[1],
    ]);
    assert!(
        elsewhere.contains("<refused") && elsewhere.contains("offline, and config.json"),
        "{elsewhere}"
    );
    assert_eq!(server.requests().len(), before);
}
