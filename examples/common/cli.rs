//! How an example starts and fails.

use std::{
    io::{ErrorKind, Write},
    process::ExitCode,
};

/// Runs an example. An error is printed on stderr, its causes below it, and the exit code is 1.
///
/// A reader that has seen enough (`… | head -3`) is not an error.
pub fn run(example: impl FnOnce() -> anyhow::Result<()>) -> ExitCode {
    match example() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if is_closed_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            // There is nowhere left to report a stderr that is closed.
            let _ = std::io::stderr().write_all(report(&error).as_bytes());
            ExitCode::FAILURE
        }
    }
}

/// Writes a line for the user to stderr: what an example has to say beside its output.
///
/// Unlike `eprintln!` it does not panic when nobody reads stderr.
pub fn note(line: impl std::fmt::Display) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// `error: …` and a line for each cause that says something new.
fn report(error: &anyhow::Error) -> String {
    let mut report = String::new();
    let mut said = String::new();
    for cause in error.chain() {
        let text = cause.to_string();
        let text = text.trim();
        // Wrappers often repeat what they wrap.
        if said.contains(text) {
            continue;
        }
        let label = if report.is_empty() {
            "error"
        } else {
            "  because"
        };
        report.push_str(&format!("{label}: {text}\n"));
        said = text.to_string();
    }
    report
}

fn is_closed_pipe(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        cause
            .downcast_ref::<std::io::Error>()
            .is_some_and(|error| error.kind() == ErrorKind::BrokenPipe)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::{Context, anyhow};

    #[test]
    fn causes_are_listed_once() {
        let error = Err::<(), _>(anyhow!("no such file"))
            .context("reading a: no such file")
            .context("cannot load")
            .unwrap_err();
        assert_eq!(
            report(&error),
            "error: cannot load\n  because: reading a: no such file\n"
        );
    }

    #[test]
    fn a_closed_pipe_is_recognized_below_a_context() {
        let closed = std::io::Error::from(ErrorKind::BrokenPipe);
        assert!(is_closed_pipe(
            &anyhow::Error::from(closed).context("writing")
        ));
        assert!(!is_closed_pipe(&anyhow!("broken pipe")));
    }
}
