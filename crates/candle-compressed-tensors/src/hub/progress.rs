//! One bar for each file of weights.

use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};

use hf_hub::api::Progress;
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::fetch::Remote;

/// The bars of one download, on stderr. Nothing is drawn when that is no terminal.
pub(super) struct Bars {
    bars: MultiProgress,
    drawn: AtomicBool,
}

impl Bars {
    pub(super) fn new(shown: bool) -> Self {
        let target = if shown {
            ProgressDrawTarget::stderr()
        } else {
            ProgressDrawTarget::hidden()
        };
        Self {
            bars: MultiProgress::with_draw_target(target),
            drawn: AtomicBool::new(false),
        }
    }

    /// A line below the others, at 0 of the file's size.
    pub(super) fn add(&self, remote: &Remote) -> Bar {
        self.drawn.store(true, Ordering::Relaxed);
        let bar = self.bars.add(ProgressBar::new(remote.size));
        // A shard's name has 32 characters: all of them fit into a terminal of 80 columns.
        let template =
            "{msg} {wide_bar} {bytes:>10}/{total_bytes} {binary_bytes_per_sec:>12} {eta:>3}";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style.progress_chars("=>-"));
        }
        bar.set_message(remote.file.clone());
        Bar(bar)
    }
}

/// The last bar leaves the cursor at its end.
impl Drop for Bars {
    fn drop(&mut self) {
        if self.drawn.load(Ordering::Relaxed) && !self.bars.is_hidden() {
            let _ = writeln!(std::io::stderr());
        }
    }
}

/// What hf-hub reports bytes to. Clones draw the same bar: each attempt of a download gets one.
#[derive(Clone)]
pub(super) struct Bar(ProgressBar);

impl Bar {
    /// Draws nothing.
    pub(super) fn none() -> Self {
        Self(ProgressBar::hidden())
    }

    pub(super) fn done(&self) {
        self.0.finish();
    }

    pub(super) fn failed(&self) {
        self.0.abandon();
    }
}

impl Progress for Bar {
    /// Comes before each attempt, followed by one `update` for the bytes that are there already.
    fn init(&mut self, size: usize, _file: &str) {
        self.0.set_length(size as u64);
        self.0.set_position(0);
        self.0.reset_eta();
    }

    fn update(&mut self, bytes: usize) {
        self.0.inc(bytes as u64);
    }

    /// The end of a reply, which need not be the end of the file.
    fn finish(&mut self) {}
}
