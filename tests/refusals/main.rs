//! Bad input: each refusal by its variant and its text, raised before a model is built. Never a panic.

// Each test binary uses its part of the shared module.
#[allow(dead_code, unreachable_pub)]
#[path = "../support/mod.rs"]
mod support;

mod configs;
mod experts;
mod files;
mod kv_cache;
mod mutations;
mod scales;
mod tensors;
mod warnings;

use std::path::Path;

use candle_compressed_tensors::{Checkpoint, Error, LoadOptions, Plan, QuantizerCompressedTensors};

/// Opens a checkpoint and makes its quantizer: all that may refuse.
fn load(dir: &Path, options: LoadOptions) -> Result<QuantizerCompressedTensors, Error> {
    QuantizerCompressedTensors::new(&Checkpoint::open(dir)?, options)
}

/// The error of a checkpoint that must be refused in every mode.
fn refused(dir: &Path) -> Error {
    let found = support::Mode::ALL.map(|mode| match load(dir, mode.options()) {
        Ok(_) => panic!("{}: loads in mode {mode:?}", dir.display()),
        Err(error) => error,
    });
    let [first, others @ ..] = found;
    for other in others {
        assert_eq!(first.to_string(), other.to_string(), "by mode");
    }
    first
}

/// The text of an error, with the checkpoint's folder left out.
fn text(error: &Error, dir: &Path) -> String {
    error
        .to_string()
        .replace(&format!("{}/", dir.display()), "")
        .replace(&dir.display().to_string(), "DIR")
}

/// The texts of everything that is wrong with a checkpoint that opens.
fn problems(dir: &Path) -> Vec<String> {
    let plan = Plan::new(&Checkpoint::open(dir).unwrap(), &LoadOptions::default());
    plan.problems().iter().map(Error::to_string).collect()
}

/// The checkpoint in that folder is refused in every mode, by this variant and with this text.
macro_rules! assert_refused {
    ($dir:expr, $variant:pat, $text:expr $(,)?) => {{
        let dir = std::path::PathBuf::from(&$dir);
        let error = crate::refused(&dir);
        assert!(matches!(error, $variant), "{error:?}");
        assert_eq!(crate::text(&error, &dir), $text);
    }};
}
pub(crate) use assert_refused;
