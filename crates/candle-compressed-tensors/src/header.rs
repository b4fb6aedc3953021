//! A check that the safetensors reader does not make: no name twice in one header.

use std::{collections::HashSet, fs::File, io::Read, path::Path};

use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};

use crate::Error;

/// The reader's own limit, in bytes: a longer header is its error to report.
const MAX_HEADER: u64 = 100_000_000;

/// Errs if the header of `path` names one tensor twice. A header that cannot be read is left to the reader, which says
/// what is wrong with it.
pub(crate) fn check_unique(path: &Path, file: &str) -> Result<(), Error> {
    let mut reader = File::open(path).map_err(Error::io(path))?;
    let mut length = [0; 8];
    if reader.read_exact(&mut length).is_err() || u64::from_le_bytes(length) > MAX_HEADER {
        return Ok(());
    }
    let mut header = Vec::new();
    reader
        .take(u64::from_le_bytes(length))
        .read_to_end(&mut header)
        .map_err(Error::io(path))?;
    let mut json = serde_json::Deserializer::from_slice(&header);
    match json.deserialize_map(Names) {
        Ok(Some(tensor)) => Err(Error::DuplicateTensor {
            tensor,
            first: file.into(),
            second: file.into(),
        }),
        Ok(None) | Err(_) => Ok(()),
    }
}

/// Visits a map's keys and gives the first that comes twice.
struct Names;

impl<'de> Visitor<'de> for Names {
    type Value = Option<String>;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a map of tensor names")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let (mut seen, mut twice) = (HashSet::new(), None);
        while let Some((name, IgnoredAny)) = map.next_entry::<String, IgnoredAny>()? {
            if let Some(name) = seen.replace(name) {
                twice.get_or_insert(name);
            }
        }
        Ok(twice)
    }
}
