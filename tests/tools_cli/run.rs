//! Examples as processes.

use std::path::PathBuf;
use std::process::Command;

use serde_json::Value;

/// What an example said.
#[derive(Debug)]
pub(crate) struct Said {
    pub(crate) success: bool,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Said {
    /// The JSON on stdout.
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// Asserts that it failed, with nothing on stdout, and that stderr says all of `words`.
    pub(crate) fn assert_refused(&self, words: &[&str]) {
        assert!(!self.success && self.stdout.is_empty(), "{self:?}");
        for word in words {
            assert!(self.stderr.contains(word), "{word:?} is not in {self:?}");
        }
    }
}

/// Runs an example. It may fail, but not panic.
pub(crate) fn run(example: &str, args: &[&str]) -> Said {
    // …/target/debug/deps/tools_cli-<hash> → …/target/debug/examples/<example>
    let test = std::env::current_exe().expect("the path of this test");
    let profile = test.parent().and_then(|deps| deps.parent());
    let mut path: PathBuf = profile.expect("a target folder").join("examples");
    path.push(format!("{example}{}", std::env::consts::EXE_SUFFIX));
    assert!(
        path.is_file(),
        "{} is not built: run `cargo test --workspace`, or build the examples first",
        path.display()
    );
    let output = Command::new(&path).args(args).output();
    let output = output.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("UTF-8");
    let said = Said {
        success: output.status.success(),
        stdout: text(output.stdout),
        stderr: text(output.stderr),
    };
    // A panic's exit code; a signal has none.
    assert!(
        output.status.code().is_some_and(|code| code != 101) && !said.stderr.contains("panicked"),
        "{example} {args:?} panicked: {said:?}"
    );
    said
}

/// As [`run`], which has to succeed.
pub(crate) fn succeed(example: &str, args: &[&str]) -> Said {
    let said = run(example, args);
    assert!(said.success, "{example} {args:?}: {said:?}");
    said
}
