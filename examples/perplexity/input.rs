//! The text, as token ids.

use std::path::Path;

use anyhow::{Context, Result, anyhow, bail, ensure};
use candle_compressed_tensors::Checkpoint;
use tokenizers::Tokenizer;

/// The tokens of a text, special ones added as the tokenizer says.
pub(crate) fn read_text(path: &Path, checkpoint: &Checkpoint) -> Result<Vec<u32>> {
    let file = checkpoint.file("tokenizer.json").with_context(|| {
        let dir = checkpoint.dir().display();
        format!("{dir} has no tokenizer.json: give the text as token ids, with --ids")
    })?;
    let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    let named = |error| anyhow!("{}: {error}", file.display());
    let tokenizer = Tokenizer::from_file(&file).map_err(named)?;
    let encoding = tokenizer.encode_fast(text, true).map_err(named)?;
    Ok(encoding.get_ids().to_vec())
}

/// Ids separated by whitespace.
pub(crate) fn read_ids(path: &Path) -> Result<Vec<u32>> {
    let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    parse_ids(&text).with_context(|| path.display().to_string())
}

fn parse_ids(text: &str) -> Result<Vec<u32>> {
    let parse = |(index, word): (usize, &str)| {
        word.parse()
            .map_err(|_| anyhow!("entry {}: {word:?} is not a token id", index + 1))
    };
    text.split_whitespace().enumerate().map(parse).collect()
}

/// Errs unless every id is in the vocabulary and at least one token can be scored.
pub(crate) fn check_ids(ids: &[u32], vocab: usize, window: usize) -> Result<()> {
    ensure!(
        ids.len() >= 2,
        "{} token(s): at least 2 are needed, because the first one is not scored",
        ids.len()
    );
    ensure!(
        window >= 2,
        "--window {window}: at least 2, because the first token of a window is not scored"
    );
    if let Some(position) = ids.iter().position(|&id| id as usize >= vocab) {
        bail!(
            "token {position} is id {}, but the model's vocabulary has {vocab} entries",
            ids[position]
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_separated_by_any_whitespace() {
        assert_eq!(parse_ids("1 22\n\t333\r\n4 ").unwrap(), [1, 22, 333, 4]);
        assert!(parse_ids("").unwrap().is_empty());
        for bad in ["1 -2", "1 2.5", "1 4294967296", "1, 2"] {
            let error = parse_ids(bad).unwrap_err().to_string();
            assert!(
                error.contains("entry") && error.contains("not a token id"),
                "{error}"
            );
        }
    }

    #[test]
    fn what_cannot_be_scored_is_refused() {
        check_ids(&[1, 2], 3, 2).unwrap();
        let text =
            |ids: &[u32], vocab, window| check_ids(ids, vocab, window).unwrap_err().to_string();
        assert!(text(&[1], 3, 2).contains("at least 2"));
        assert!(text(&[1, 2], 3, 1).contains("--window 1"));
        assert!(text(&[1, 2, 3], 3, 2).contains("token 2 is id 3"));
    }
}
