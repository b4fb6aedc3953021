//! A `re:` pattern, which upstream runs through Python's `re.match`: anchored at the start of the name, not at its end.
//!
//! The `regex` crate reads nearly the same language. Where it would silently read something else than Python does,
//! the pattern is rewritten, or refused if there is nothing to rewrite it to.

use crate::Error;
use regex::{Regex, RegexBuilder};

/// Compiled size that one pattern may take. Patterns of real checkpoints take a few kilobytes.
const SIZE_LIMIT: usize = 10 << 20;

/// A compiled pattern with the semantics of `re.match`.
#[derive(Debug, Clone)]
pub(crate) struct Pattern(Regex);

impl Pattern {
    /// `pattern` without its `re:`; `path` is the list that it stands in, for the error.
    pub(crate) fn new(pattern: &str, path: &str) -> Result<Self, Error> {
        let refuse = |reason: String| Error::Pattern {
            path: path.to_string(),
            pattern: pattern.to_string(),
            reason,
        };
        let translated = translate(pattern).map_err(|reason| refuse(reason.to_string()))?;
        match RegexBuilder::new(&translated)
            .size_limit(SIZE_LIMIT)
            .build()
        {
            Ok(regex) => Ok(Self(regex)),
            Err(regex::Error::CompiledTooBig(limit)) => Err(Error::PatternTooBig {
                path: path.to_string(),
                pattern: pattern.to_string(),
                limit,
            }),
            Err(error) => {
                // The crate draws the pattern over several lines; its last one says what is wrong.
                let text = error.to_string();
                let last = text.lines().last().unwrap_or_default();
                Err(refuse(
                    last.strip_prefix("error: ").unwrap_or(last).to_string(),
                ))
            }
        }
    }

    /// Whether the pattern matches from the first character on. The leftmost match is the only one that can start
    /// there, so that no anchor has to be wrapped around a pattern whose parentheses or flags may not be closed.
    pub(crate) fn matches(&self, name: &str) -> bool {
        self.0.find(name).is_some_and(|found| found.start() == 0)
    }
}

const LOOKAROUND: &str = "lookaround, (?=…) (?!…) (?<=…) (?<!…), is not supported; list the module names, or write \
                          the pattern without it";
const BACKREFERENCE: &str =
    "backreferences are not supported; list the module names, or write the pattern without them";
const POSSESSIVE: &str =
    "a quantifier after a quantifier is possessive or an error in Python and is not supported";
const SET_DIFFERENCE: &str = "`--` in a character class is not supported; write `\\-`";

/// Python's spelling → the regex crate's.
fn translate(pattern: &str) -> Result<String, &'static str> {
    let mut out = String::with_capacity(pattern.len() + 8);
    let mut rest = pattern;
    // A quantifier was just read: `Some(true)` if it may still be made lazy by a `?`.
    let mut quantified: Option<bool> = None;
    while let Some(next) = rest.chars().next() {
        let before = quantified.take();
        let mut taken = next.len_utf8();
        match next {
            '\\' => {
                let escaped = rest[1..].chars().next();
                taken += escaped.map_or(0, char::len_utf8);
                match escaped {
                    Some('1'..='9') => return Err(BACKREFERENCE),
                    Some('Z') => out.push_str("\\z"),
                    // Word boundaries in the regex crate.
                    Some(angle @ ('<' | '>')) => out.push(angle),
                    _ => out.push_str(&rest[..taken]),
                }
            }
            '[' => {
                let (class, length) = translate_class(rest)?;
                out.push_str(&class);
                taken = length;
            }
            '(' => {
                if ["(?=", "(?!", "(?<=", "(?<!"]
                    .iter()
                    .any(|look| rest.starts_with(look))
                {
                    return Err(LOOKAROUND);
                }
                if rest.starts_with("(?P=") {
                    return Err(BACKREFERENCE);
                }
                // Neither the `?` of `(?:` is a quantifier, nor what follows it.
                if rest.starts_with("(?") {
                    taken = 2;
                }
                out.push_str(&rest[..taken]);
            }
            '{' => match braces(rest) {
                Some((low, length)) => {
                    if before.is_some() {
                        return Err(POSSESSIVE);
                    }
                    // `{,3}` is `{0,3}`.
                    out.push_str(if low.is_empty() { "{0" } else { "{" });
                    out.push_str(&rest[1..length]);
                    taken = length;
                    quantified = Some(true);
                }
                // Not a quantifier: Python takes the brace as it is.
                None => out.push_str("\\{"),
            },
            '*' | '+' | '?' => {
                quantified = match before {
                    None => Some(true),
                    Some(true) if next == '?' => Some(false),
                    Some(_) => return Err(POSSESSIVE),
                };
                out.push(next);
            }
            other => out.push(other),
        }
        rest = &rest[taken..];
    }
    Ok(out)
}

/// `{2}`, `{2,}`, `{,3}`, `{2,3}` at the start of `text`: the lower bound's digits and the length in bytes.
fn braces(text: &str) -> Option<(&str, usize)> {
    let end = text.find('}')?;
    let inside = &text[1..end];
    let (low, high) = inside.split_once(',').unwrap_or((inside, ""));
    let digits = |bound: &str| bound.bytes().all(|byte| byte.is_ascii_digit());
    (!inside.is_empty() && digits(low) && digits(high)).then_some((low, end + 1))
}

/// A character class at the start of `text`, and its length in bytes. In Python `[`, `&&` and `~~` inside it are plain
/// characters; in the regex crate they nest and combine sets.
fn translate_class(text: &str) -> Result<(String, usize), &'static str> {
    let mut out = String::from("[");
    let mut at = 1;
    if text[at..].starts_with('^') {
        out.push('^');
        at += 1;
    }
    let first = at;
    while let Some(next) = text[at..].chars().next() {
        let start = at;
        at += next.len_utf8();
        match next {
            ']' if start > first => {
                out.push(']');
                return Ok((out, at));
            }
            '\\' => {
                at += text[at..].chars().next().map_or(0, char::len_utf8);
                out.push_str(&text[start..at]);
            }
            '-' if text[at..].starts_with('-') => return Err(SET_DIFFERENCE),
            ']' | '[' | '&' | '~' => {
                out.push('\\');
                out.push(next);
            }
            other => out.push(other),
        }
    }
    // Unclosed; the regex crate says so.
    Ok((out, text.len()))
}
