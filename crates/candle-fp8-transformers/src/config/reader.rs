//! Typed access to the keys of a JSON object, with errors that name the full path of the key.

use serde_json::Value;

use crate::{Error, Result};

/// Sizes above this are refused: they cannot be real, and products of two of them would overflow.
const LARGEST_SIZE: u64 = 1 << 31;

/// A JSON object, where it sits in config.json, and the class defaults that stand in for keys
/// which nested configs leave out.
#[derive(Clone, Copy)]
pub(crate) struct Reader<'a> {
    object: &'a Value,
    path: &'a str,
    architecture: &'a str,
    default: fn(&str) -> Option<u64>,
}

impl<'a> Reader<'a> {
    pub(crate) fn new(
        object: &'a Value,
        path: &'a str,
        architecture: &'a str,
        default: fn(&str) -> Option<u64>,
    ) -> Self {
        Self {
            object,
            path,
            architecture,
            default,
        }
    }

    /// The value of `key`; a JSON null counts as absent.
    pub(crate) fn get(&self, key: &str) -> Option<&'a Value> {
        self.object.get(key).filter(|value| !value.is_null())
    }

    /// Whether `key` is written at all, be it as null.
    pub(crate) fn has(&self, key: &str) -> bool {
        self.object.get(key).is_some()
    }

    pub(crate) fn path_of(&self, key: &str) -> String {
        if self.path.is_empty() {
            key.to_string()
        } else {
            format!("{}.{key}", self.path)
        }
    }

    pub(crate) fn invalid(&self, key: &str, expected: &str) -> Error {
        Error::InvalidValue {
            key: self.path_of(key),
            found: self.object.get(key).unwrap_or(&Value::Null).to_string(),
            expected: expected.to_string(),
        }
    }

    pub(crate) fn unsupported(&self, key: &str, supported: &str) -> Error {
        Error::Unsupported {
            key: self.path_of(key),
            found: self.object.get(key).unwrap_or(&Value::Null).to_string(),
            supported: supported.to_string(),
        }
    }

    pub(crate) fn missing(&self, key: &str) -> Error {
        Error::MissingKey {
            key: self.path_of(key),
            architecture: self.architecture.to_string(),
        }
    }

    /// A positive integer, if the key is there.
    pub(crate) fn size_opt(&self, key: &str) -> Result<Option<usize>> {
        let Some(value) = self.get(key) else {
            return Ok((self.default)(key).map(|size| size as usize));
        };
        match value.as_u64() {
            Some(size) if (1..=LARGEST_SIZE).contains(&size) => Ok(Some(size as usize)),
            _ => Err(self.invalid(key, "a positive integer up to 2^31")),
        }
    }

    /// A positive integer.
    pub(crate) fn size(&self, key: &str) -> Result<usize> {
        self.size_opt(key)?.ok_or_else(|| self.missing(key))
    }

    /// A finite number greater than zero, if the key is there.
    pub(crate) fn positive_opt(&self, key: &str) -> Result<Option<f64>> {
        match self.get(key) {
            None => Ok(None),
            Some(value) => match value.as_f64() {
                Some(number) if number.is_finite() && number > 0.0 => Ok(Some(number)),
                _ => Err(self.invalid(key, "a finite number greater than 0")),
            },
        }
    }

    /// A finite number greater than zero.
    pub(crate) fn positive(&self, key: &str) -> Result<f64> {
        self.positive_opt(key)?.ok_or_else(|| self.missing(key))
    }

    /// A boolean, if the key is there.
    pub(crate) fn flag_opt(&self, key: &str) -> Result<Option<bool>> {
        match self.get(key) {
            None => Ok(None),
            Some(value) => match value.as_bool() {
                Some(flag) => Ok(Some(flag)),
                None => Err(self.invalid(key, "true or false")),
            },
        }
    }

    /// A boolean, false when absent.
    pub(crate) fn flag(&self, key: &str) -> Result<bool> {
        Ok(self.flag_opt(key)?.unwrap_or(false))
    }

    /// Token ids: one integer, or a list of them. Empty when the key is absent.
    pub(crate) fn token_ids(&self, key: &str) -> Result<Vec<u32>> {
        let expected = "a token id or a list of token ids";
        let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
        match self.get(key) {
            None => Ok(Vec::new()),
            Some(Value::Array(list)) => list
                .iter()
                .map(|value| id(value).ok_or_else(|| self.invalid(key, expected)))
                .collect(),
            Some(value) => match id(value) {
                Some(id) => Ok(vec![id]),
                None => Err(self.invalid(key, expected)),
            },
        }
    }
}
