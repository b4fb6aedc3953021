//! PyTorch's products of the same shapes, timed by a script that waits for shapes on its input.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use crate::device::Failed;

pub(crate) struct Peer {
    process: Child,
    ask: ChildStdin,
    answers: BufReader<ChildStdout>,
}

/// Seconds of a product.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Times {
    /// FP8, scales of rows.
    pub(crate) row: f64,
    /// FP8, one scale.
    pub(crate) tensor: f64,
    pub(crate) bf16: f64,
}

impl Peer {
    pub(crate) fn start(command: &str) -> Result<Self, Failed> {
        let mut words = command.split_whitespace();
        let program = words.next().ok_or("--peer is empty")?;
        let mut process = Command::new(program)
            .args(words)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|error| format!("--peer {command}: {error}"))?;
        let ask = process.stdin.take().expect("piped");
        let answers = BufReader::new(process.stdout.take().expect("piped"));
        let mut peer = Self {
            process,
            ask,
            answers,
        };
        println!("peer: {}", peer.line()?);
        Ok(peer)
    }

    fn line(&mut self) -> Result<String, Failed> {
        let mut line = String::new();
        if self.answers.read_line(&mut line)? == 0 {
            return Err(format!("the peer stopped: {}", self.process.wait()?).into());
        }
        Ok(line.trim().to_string())
    }

    pub(crate) fn time(&mut self, m: usize, n: usize, k: usize) -> Result<Times, Failed> {
        writeln!(self.ask, "{m} {n} {k}")?;
        self.ask.flush()?;
        let line = self.line()?;
        let micros: Vec<f64> = line
            .split_whitespace()
            .map(str::parse)
            .collect::<Result<_, _>>()
            .map_err(|_| format!("the peer said: {line}"))?;
        let [row, tensor, bf16] = micros[..] else {
            return Err(format!("the peer said: {line}").into());
        };
        Ok(Times {
            row: row / 1e6,
            tensor: tensor / 1e6,
            bf16: bf16 / 1e6,
        })
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // It may be gone already.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
