//! Between text and tokens: a checkpoint's `tokenizer.json`, and text that grows token by token.

use anyhow::{Context, anyhow, bail};
use candle_compressed_tensors::Checkpoint;
use candle_fp8_transformers::ModelConfig;
use tokenizers::Tokenizer;

use crate::{chat::special_tokens, model::read_json};

/// The tokenizer of a checkpoint.
pub struct TextTokenizer {
    tokenizer: Tokenizer,
    /// Started with even where `tokenizer.json` itself adds nothing.
    bos: Option<u32>,
    eos: Option<u32>,
    vocab_size: usize,
}

impl TextTokenizer {
    /// Reads `tokenizer.json`, and of `tokenizer_config.json` the special tokens.
    ///
    /// # Errors
    /// There is no `tokenizer.json`, or it cannot be read.
    pub fn open(checkpoint: &Checkpoint, config: &ModelConfig) -> anyhow::Result<Self> {
        let Some(path) = checkpoint.file("tokenizer.json") else {
            let slow = checkpoint.file("tokenizer.model").is_some();
            bail!(
                "{} has no tokenizer.json, which turns text into tokens: {}",
                checkpoint.dir().display(),
                if slow {
                    "it has a tokenizer.model, which is not read; convert it with transformers \
                     (AutoTokenizer.from_pretrained(…).save_pretrained(…))"
                } else {
                    "copy it there from the model that the checkpoint was made from"
                }
            );
        };
        let tokenizer = Tokenizer::from_file(&path)
            .map_err(|error| anyhow!("{error}"))
            .with_context(|| format!("cannot read {}: fetch it again", path.display()))?;
        let json = read_json(checkpoint, "tokenizer_config.json")?.unwrap_or_default();
        let special = special_tokens(&json);
        let id = |name: &str| tokenizer.token_to_id(special.get(name)?);
        let add_bos = json.get("add_bos_token").and_then(|value| value.as_bool());
        Ok(Self {
            bos: id("bos_token").filter(|_| add_bos == Some(true)),
            eos: id("eos_token"),
            vocab_size: config.vocab_size,
            tokenizer,
        })
    }

    /// Tokens of a text, after the token that starts a text where the tokenizer adds one.
    ///
    /// # Errors
    /// The text has no tokens, or the tokenizer is another model's.
    pub fn encode(&self, text: &str) -> anyhow::Result<Vec<u32>> {
        let mut ids = self.ids(text, true)?;
        if let Some(bos) = self.bos.filter(|bos| ids.first() != Some(bos)) {
            ids.insert(0, bos);
        }
        self.check(ids)
    }

    /// Tokens of a text that already holds its special tokens, as a chat template's does.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub fn encode_chat(&self, text: &str) -> anyhow::Result<Vec<u32>> {
        self.check(self.ids(text, false)?)
    }

    fn ids(&self, text: &str, add_special_tokens: bool) -> anyhow::Result<Vec<u32>> {
        let encoding = self.tokenizer.encode(text, add_special_tokens);
        let encoding = encoding.map_err(|error| anyhow!("cannot tokenize the prompt: {error}"))?;
        Ok(encoding.get_ids().to_vec())
    }

    fn check(&self, ids: Vec<u32>) -> anyhow::Result<Vec<u32>> {
        if ids.is_empty() {
            bail!(
                "the prompt is empty, and this model has no token that starts a text: give a --prompt"
            );
        }
        match ids.iter().find(|&&id| id as usize >= self.vocab_size) {
            Some(id) => bail!(
                "the tokenizer gives token {id}, and the model has {} tokens: tokenizer.json belongs to another model",
                self.vocab_size
            ),
            None => Ok(ids),
        }
    }

    /// The token that ends a text, by `tokenizer_config.json`.
    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// The text that will follow `prompt`, token by token.
    pub fn follow(&self, prompt: &[u32]) -> TokenOutputStream<'_> {
        TokenOutputStream::new(&self.tokenizer, prompt)
    }
}

/// Text that grows token by token. A character that spans several tokens comes out when it is complete.
///
/// The last tokens are decoded together each time, and what was given out before is skipped: a token's text depends on the
/// tokens before it (spaces at the start of a word, bytes of one character).
pub struct TokenOutputStream<'t> {
    tokenizer: &'t Tokenizer,
    /// Tokens since the last point where text surely does not depend on earlier ones.
    window: Vec<u32>,
    /// Characters of the window's text that were given out.
    given: usize,
}

/// What a decoder writes for bytes that are no character, or not yet one.
const REPLACEMENT: char = char::REPLACEMENT_CHARACTER;

impl<'t> TokenOutputStream<'t> {
    /// The text that follows `prompt`, which itself is not given out.
    pub fn new(tokenizer: &'t Tokenizer, prompt: &[u32]) -> Self {
        // One token is enough to tell a decoder that the next one is not the first of a text.
        let window = prompt.last().map_or_else(Vec::new, |&last| vec![last]);
        let given = match tokenizer.decode(&window, true) {
            Ok(text) => text.chars().count(),
            Err(_) => 0,
        };
        Self {
            tokenizer,
            window,
            given,
        }
    }

    /// Adds a token; gives the characters that it completes, which may be none.
    ///
    /// # Errors
    /// The tokenizer cannot decode it.
    pub fn push(&mut self, token: u32) -> anyhow::Result<String> {
        self.window.push(token);
        let text = self.decode(&self.window)?;
        let complete = text.trim_end_matches(REPLACEMENT);
        let new = self.take(complete);
        if complete.len() == text.len() {
            let alone = self.decode(&[token])?;
            // A token that is whole characters starts a new window; the tail of a character would not decode the same alone.
            if !alone.contains(REPLACEMENT) {
                self.window = vec![token];
                self.given = alone.chars().count();
            }
        }
        Ok(new)
    }

    /// What is left at the end: the bytes of a character that was never completed, as replacement characters.
    ///
    /// # Errors
    /// The tokenizer cannot decode it.
    pub fn finish(mut self) -> anyhow::Result<String> {
        let text = self.decode(&self.window)?;
        Ok(self.take(&text))
    }

    fn decode(&self, tokens: &[u32]) -> anyhow::Result<String> {
        let text = self.tokenizer.decode(tokens, true);
        text.map_err(|error| anyhow!("cannot turn tokens into text: {error}"))
    }

    /// The characters of the window's text that were not given out yet.
    fn take(&mut self, text: &str) -> String {
        let new: String = text.chars().skip(self.given).collect();
        self.given += new.chars().count();
        new
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A byte-level tokenizer without merges: every byte of a text is a token.
    fn bytes() -> Tokenizer {
        // The printable stand-ins of bytes, as byte-level BPE has them.
        let printable = |b: u8| matches!(b, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
        let mut hidden = 0x100..;
        let vocab: serde_json::Map<_, _> = (0..=255u8)
            .map(|b| {
                let code = if printable(b) {
                    u32::from(b)
                } else {
                    hidden.next().unwrap()
                };
                (
                    char::from_u32(code).unwrap().to_string(),
                    u32::from(b).into(),
                )
            })
            .collect();
        tokenizer(serde_json::json!({
            "version": "1.0",
            "added_tokens": [{"id": 256, "content": "<eot>", "single_word": false, "lstrip": false, "rstrip": false,
                              "normalized": false, "special": true}],
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
            "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
            "model": {"type": "BPE", "vocab": vocab, "merges": []}
        }))
    }

    /// A tokenizer of words that carry their leading space, with bytes as a fallback, as Llama 2 has it.
    fn words() -> Tokenizer {
        let mut vocab = serde_json::json!({"<unk>": 0, "▁a": 1, "▁story": 2, ".": 3});
        for b in 0..=255u32 {
            vocab[format!("<0x{b:02X}>")] = (b + 4).into();
        }
        tokenizer(serde_json::json!({
            "version": "1.0", "added_tokens": [],
            "decoder": {"type": "Sequence", "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"}, {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
            "model": {"type": "BPE", "vocab": vocab, "merges": [], "byte_fallback": true, "unk_token": "<unk>"}
        }))
    }

    fn tokenizer(json: serde_json::Value) -> Tokenizer {
        Tokenizer::from_bytes(json.to_string()).unwrap()
    }

    /// The pieces of text that tokens give, one by one, and what was left.
    fn pieces(tokenizer: &Tokenizer, prompt: &[u32], tokens: &[u32]) -> (Vec<String>, String) {
        let mut stream = TokenOutputStream::new(tokenizer, prompt);
        let pieces = tokens.iter().map(|&t| stream.push(t).unwrap()).collect();
        (pieces, stream.finish().unwrap())
    }

    #[test]
    fn split_characters_come_out_whole() {
        let tokenizer = bytes();
        let text = "aé€🙂🙂 zß\n";
        let tokens: Vec<u32> = text.bytes().map(u32::from).collect();
        let (pieces, rest) = pieces(&tokenizer, &[], &tokens);
        assert_eq!(pieces.concat(), text);
        assert_eq!(rest, "");
        assert!(pieces.iter().all(|piece| piece.chars().count() <= 1));
        assert_eq!(pieces[..6], ["a", "", "é", "", "", "€"]);
    }

    #[test]
    fn bytes_that_are_no_character_do_not_hold_text_back() {
        let tokenizer = bytes();
        let tokens = [b'a', 0xff, b'b', 0xe2, b'c', 0xe2, 0x82].map(u32::from);
        let (pieces, rest) = pieces(&tokenizer, &[], &tokens);
        assert_eq!(pieces.concat(), "a\u{fffd}b\u{fffd}c");
        assert_eq!(rest, "\u{fffd}");
    }

    #[test]
    fn special_tokens_are_not_text() {
        let tokenizer = bytes();
        let (pieces, rest) = pieces(&tokenizer, &[256], &[b'a'.into(), 256, b'b'.into()]);
        assert_eq!((pieces.concat().as_str(), rest.as_str()), ("ab", ""));
    }

    #[test]
    fn spaces_between_words_survive() {
        let tokenizer = words();
        let fresh = pieces(&tokenizer, &[], &[1, 2, 3, 1]);
        assert_eq!(fresh.0, ["a", " story", ".", " a"]);
        let after = pieces(&tokenizer, &[3], &[1, 2]);
        assert_eq!(after.0, [" a", " story"]);
        let euro = "€".bytes().map(|b| u32::from(b) + 4);
        let tokens: Vec<u32> = [1]
            .into_iter()
            .chain(euro.clone())
            .chain(euro)
            .chain([2])
            .collect();
        assert_eq!(pieces(&tokenizer, &[], &tokens).0.concat(), "a€€ story");
    }
}
