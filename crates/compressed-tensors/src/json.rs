//! A JSON value that knows where it sits, so that every error can say so. Null counts as absent: old files carry
//! explicit nulls.

use crate::Error;
use serde_json::{Map, Value};

/// A value and its dotted path in config.json.
#[derive(Clone)]
pub(crate) struct Node<'a> {
    pub(crate) path: String,
    pub(crate) value: &'a Value,
}

impl<'a> Node<'a> {
    pub(crate) fn new(path: impl Into<String>, value: &'a Value) -> Self {
        Self {
            path: path.into(),
            value,
        }
    }

    /// The value under `key`; `None` if it is absent or null, or if this is no object.
    pub(crate) fn child(&self, key: &str) -> Option<Node<'a>> {
        let value = self.value.get(key).filter(|value| !value.is_null())?;
        Some(Node::new(self.path_of(key), value))
    }

    pub(crate) fn path_of(&self, key: &str) -> String {
        if self.path.is_empty() {
            key.to_string()
        } else {
            format!("{}.{key}", self.path)
        }
    }

    pub(crate) fn object(&self) -> Result<&'a Map<String, Value>, Error> {
        self.value
            .as_object()
            .ok_or_else(|| self.malformed("an object"))
    }

    pub(crate) fn string(&self) -> Result<&'a str, Error> {
        self.value
            .as_str()
            .ok_or_else(|| self.malformed("a string"))
    }

    pub(crate) fn boolean(&self) -> Result<bool, Error> {
        self.value
            .as_bool()
            .ok_or_else(|| self.malformed("true or false"))
    }

    /// A whole number; `8.0` counts as one, as it does upstream.
    pub(crate) fn integer(&self) -> Result<i64, Error> {
        let exact = |value: f64| value.fract() == 0.0 && value.abs() <= (1u64 << 53) as f64;
        self.value
            .as_i64()
            .or_else(|| {
                self.value
                    .as_f64()
                    .filter(|value| exact(*value))
                    .map(|value| value as i64)
            })
            .ok_or_else(|| self.malformed("a whole number"))
    }

    pub(crate) fn strings(&self) -> Result<Vec<String>, Error> {
        let items = self
            .value
            .as_array()
            .ok_or_else(|| self.malformed("a list of strings"))?;
        items
            .iter()
            .map(|item| {
                item.as_str()
                    .map(str::to_string)
                    .ok_or_else(|| self.malformed("a list of strings"))
            })
            .collect()
    }

    /// A block's rows and columns: `[128, 128]`, or the old string `"128x128"`.
    pub(crate) fn block(&self) -> Result<[usize; 2], Error> {
        let error = || self.malformed("two positive whole numbers, [rows, cols]");
        let sizes: Vec<i64> = if let Some(text) = self.value.as_str() {
            text.split('x')
                .map(|size| size.trim().parse().map_err(|_| error()))
                .collect::<Result<_, _>>()?
        } else {
            let items = self.value.as_array().ok_or_else(error)?;
            items
                .iter()
                .map(|item| Node::new("", item).integer().map_err(|_| error()))
                .collect::<Result<_, _>>()?
        };
        let positive = |size: i64| {
            usize::try_from(size)
                .ok()
                .filter(|size| *size > 0)
                .ok_or_else(error)
        };
        match sizes[..] {
            [rows, cols] => Ok([positive(rows)?, positive(cols)?]),
            _ => Err(error()),
        }
    }

    /// Refuses every key which is not in `allowed`.
    pub(crate) fn allow_only(&self, allowed: &[&str]) -> Result<(), Error> {
        match self
            .object()?
            .keys()
            .find(|key| !allowed.contains(&key.as_str()))
        {
            None => Ok(()),
            Some(key) => Err(Error::UnknownKey {
                path: self.path.clone(),
                key: key.clone(),
                allowed: allowed.join(", "),
            }),
        }
    }

    /// The entry of `table` whose word this string is, in any case.
    pub(crate) fn word<T: Copy>(&self, table: &[(&str, T)]) -> Result<T, Error> {
        let found = self.string()?;
        let word = found.to_lowercase();
        table
            .iter()
            .find(|(name, _)| *name == word)
            .map(|(_, value)| *value)
            .ok_or_else(|| Error::UnknownValue {
                path: self.path.clone(),
                found: shorten(found),
                allowed: table
                    .iter()
                    .map(|(name, _)| *name)
                    .collect::<Vec<_>>()
                    .join(", "),
            })
    }

    pub(crate) fn malformed(&self, expected: impl Into<String>) -> Error {
        Error::Malformed {
            path: self.path.clone(),
            expected: expected.into(),
            found: shorten(&self.value.to_string()),
        }
    }

    pub(crate) fn invalid(&self, reason: impl Into<String>) -> Error {
        Error::InvalidArgs {
            path: self.path.clone(),
            reason: reason.into(),
        }
    }
}

/// A hostile value may be megabytes long; an error message should not be.
fn shorten(text: &str) -> String {
    const LIMIT: usize = 120;
    match text.char_indices().nth(LIMIT) {
        None => text.to_string(),
        Some((end, _)) => format!("{}…", &text[..end]),
    }
}
