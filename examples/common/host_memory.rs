//! How much memory of the host a piece of work takes.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;
use std::{fs, sync::Arc, thread};

/// Between two looks.
const PAUSE: Duration = Duration::from_millis(2);

/// Looks at this process's memory in a thread of its own, until it is asked what it saw.
pub(crate) struct Watch {
    done: Arc<AtomicBool>,
    start: Option<u64>,
    thread: Option<JoinHandle<u64>>,
}

impl Watch {
    /// Starts to look.
    pub(crate) fn start() -> Self {
        let done = Arc::new(AtomicBool::new(false));
        let thread = thread::spawn({
            let done = done.clone();
            move || {
                let mut peak = 0;
                while !done.load(Ordering::Relaxed) {
                    peak = peak.max(own_bytes().unwrap_or(0));
                    thread::sleep(PAUSE);
                }
                peak
            }
        });
        let start = own_bytes();
        Self {
            done,
            start,
            thread: Some(thread),
        }
    }

    /// The most bytes that there were beyond those at the start, but for mapped files. `None` where the system does not
    /// tell.
    pub(crate) fn stop(mut self) -> Option<u64> {
        self.done.store(true, Ordering::Relaxed);
        let peak = self.thread.take().and_then(|thread| thread.join().ok());
        let peak = peak.unwrap_or(0);
        let end = own_bytes().unwrap_or(0);
        self.start.map(|start| peak.max(end).saturating_sub(start))
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.done.store(true, Ordering::Relaxed);
    }
}

/// Bytes of this process that are in memory and no part of a file, on Linux.
fn own_bytes() -> Option<u64> {
    anonymous(&fs::read_to_string("/proc/self/status").ok()?)
}

/// `RssAnon` of `/proc/self/status`.
fn anonymous(status: &str) -> Option<u64> {
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_of_files_do_not_count() {
        let status = "VmRSS:\t 900 kB\nRssAnon:\t     300 kB\nRssFile:\t 600 kB\n";
        assert_eq!(anonymous(status), Some(300 * 1024));
        assert_eq!(anonymous(""), None);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn what_was_taken_and_given_back_is_seen() {
        const BYTES: usize = 256 << 20;
        let watch = Watch::start();
        let memory = std::hint::black_box(vec![1u8; BYTES]);
        thread::sleep(20 * PAUSE);
        drop(memory);
        let peak = watch.stop().expect("Linux tells");
        assert!(peak >= BYTES as u64 * 9 / 10, "{peak}");
    }
}
