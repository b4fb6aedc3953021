//! Logits as a safetensors file, written as they come.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use candle_core::Tensor;

/// A safetensors file of one F32 tensor, `logits` `[tokens, vocab]`, whose rows are never in memory together.
///
/// Written under another name beside it, and renamed when complete: half a file is not left under the name asked for.
pub(crate) struct LogitsFile {
    path: PathBuf,
    part: PathBuf,
    file: BufWriter<File>,
    rows: usize,
    shape: (usize, usize),
}

impl LogitsFile {
    /// Opens the file and writes its header.
    pub(crate) fn create(path: &Path, tokens: usize, vocab: usize) -> Result<Self> {
        let part = PathBuf::from(format!("{}.part", path.display()));
        let bytes = 4 * tokens as u64 * vocab as u64;
        let mut header = serde_json::json!({
            "logits": {"dtype": "F32", "shape": [tokens, vocab], "data_offsets": [0, bytes]},
        })
        .to_string();
        // The data starts at a multiple of 8.
        header.push_str(&" ".repeat(header.len().next_multiple_of(8) - header.len()));
        let file = File::create(&part).with_context(|| part.display().to_string())?;
        let mut logits = Self {
            path: path.into(),
            part,
            file: BufWriter::new(file),
            rows: 0,
            shape: (tokens, vocab),
        };
        logits.write(&(header.len() as u64).to_le_bytes())?;
        logits.write(header.as_bytes())?;
        Ok(logits)
    }

    /// Appends rows `[n, vocab]`.
    pub(crate) fn append(&mut self, logits: &Tensor) -> Result<()> {
        let (rows, vocab) = logits.dims2()?;
        ensure!(
            vocab == self.shape.1 && self.rows + rows <= self.shape.0,
            "logits {:?} do not fit after row {} of {:?}",
            logits.dims(),
            self.rows,
            self.shape
        );
        for row in logits.to_vec2::<f32>()? {
            let bytes: Vec<u8> = row.iter().flat_map(|value| value.to_le_bytes()).collect();
            self.write(&bytes)?;
        }
        self.rows += rows;
        Ok(())
    }

    /// Completes the file.
    pub(crate) fn finish(mut self) -> Result<()> {
        ensure!(
            self.rows == self.shape.0,
            "{} of {} rows were written",
            self.rows,
            self.shape.0
        );
        let name = self.path.display().to_string();
        self.file.flush().with_context(|| name.clone())?;
        std::fs::rename(&self.part, &self.path).context(name)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let written = self.file.write_all(bytes);
        written.with_context(|| self.part.display().to_string())
    }
}

impl Drop for LogitsFile {
    fn drop(&mut self) {
        // After `finish` it is not there any more.
        let _ = std::fs::remove_file(&self.part);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn rows_come_back_and_half_a_file_is_not_left() {
        let dir = std::env::temp_dir().join(format!("logits-file-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let path = dir.join("logits.safetensors");
        let rows = |from: f32, n: usize| {
            Tensor::arange(from, from + 5. * n as f32, &Device::Cpu)
                .and_then(|rows| rows.reshape((n, 5)))
                .unwrap()
        };

        let mut file = LogitsFile::create(&path, 3, 5).unwrap();
        file.append(&rows(0., 2)).unwrap();
        assert!(file.append(&rows(0., 2)).is_err());
        assert!(file.finish().is_err());
        assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 0);

        let mut file = LogitsFile::create(&path, 3, 5).unwrap();
        file.append(&rows(0., 2)).unwrap();
        file.append(&rows(10., 1)).unwrap();
        file.finish().unwrap();
        let loaded = candle_core::safetensors::load(&path, &Device::Cpu).unwrap();
        let expected = rows(0., 3).to_vec2::<f32>().unwrap();
        assert_eq!(loaded["logits"].to_vec2::<f32>().unwrap(), expected);
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
