//! One bar for one file.

use hf_hub::api::Progress;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use super::fetch::Remote;

/// What hf-hub reports bytes to. Clones draw the same bar: each attempt of a download gets one.
#[derive(Clone)]
pub(super) struct Bar(ProgressBar);

impl Bar {
    /// Draws nothing.
    pub(super) fn none() -> Self {
        Self(ProgressBar::hidden())
    }

    /// A line below the others, at 0 of the file's size.
    pub(super) fn new(bars: &MultiProgress, remote: &Remote) -> Self {
        let bar = bars.add(ProgressBar::new(remote.size));
        let template =
            "{wide_msg} [{bar:24}] {bytes:>10}/{total_bytes} {binary_bytes_per_sec:>12} {eta:>4}";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style.progress_chars("=> "));
        }
        bar.set_message(remote.file.clone());
        Self(bar)
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
