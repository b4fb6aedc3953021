//! The download of one file: resumed where it stopped, checked for its size.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, ErrorKind, Read, Seek, SeekFrom};
use std::path::Path;

use super::HubError;
use super::client::wait;
use super::fault::Fault;
use super::progress::Bar;
use super::snapshot::Snapshot;

/// A file that the snapshot does not have yet.
pub(super) struct Remote {
    /// Path within the repository.
    pub(super) file: String,
    /// The name of its content.
    pub(super) etag: String,
    /// Bytes.
    pub(super) size: u64,
}

/// An attempt that brought this many bytes starts the count of failures anew: a long download over a bad line ends.
const HEADWAY: u64 = 1 << 20;

/// Downloads `remote` into the snapshot, or links it there when the cache has the content from another commit.
pub(super) fn fetch(snapshot: &Snapshot<'_>, remote: &Remote, bar: Bar) -> Result<(), HubError> {
    let result = Download { snapshot, remote }.run(&bar);
    match result {
        Ok(()) => bar.done(),
        Err(_) => bar.failed(),
    }
    result
}

struct Download<'a> {
    snapshot: &'a Snapshot<'a>,
    remote: &'a Remote,
}

impl Download<'_> {
    fn run(&self, bar: &Bar) -> Result<(), HubError> {
        let Self { snapshot, remote } = self;
        let cache = snapshot.cache;
        let blob = cache.blob(&remote.etag);
        if len(&blob) == Some(remote.size) {
            return cache.link(snapshot.commit(), &remote.file, &remote.etag);
        }
        let part = cache.part(&remote.etag);
        let retries = snapshot.client.options.retries;
        let (mut failures, mut attempts, mut restarted) = (0, 0, false);
        loop {
            let prepared = self.locked(|| prepare(&part, remote.size));
            let before = match prepared.map_err(|e| cache.disk(e))? {
                Some(before) => before,
                None => len(&part).unwrap_or(0),
            };
            attempts += 1;
            let reason = match self.attempt(&part, before, bar)? {
                Outcome::Complete => return Ok(()),
                Outcome::TooLong(found) if restarted => {
                    return Err(HubError::WrongSize {
                        model_id: snapshot.client.model_id.to_owned(),
                        file: remote.file.clone(),
                        expected: remote.size,
                        found,
                    });
                }
                Outcome::TooLong(_) => {
                    restarted = true;
                    continue;
                }
                Outcome::Short(reason) => reason,
            };
            let found = len(&part).unwrap_or(0);
            if found >= before + HEADWAY {
                failures = 0;
            }
            failures += 1;
            if failures > retries {
                return Err(HubError::Truncated {
                    model_id: snapshot.client.model_id.to_owned(),
                    file: remote.file.clone(),
                    expected: remote.size,
                    found,
                    attempts,
                    reason,
                });
            }
            wait(failures);
        }
    }

    /// Runs `change` under the lock that hf-hub takes for this content. When another program holds it, the part is that
    /// program's and nothing is changed: hf-hub then waits for it, or gives up.
    fn locked<T>(&self, change: impl FnOnce() -> io::Result<T>) -> io::Result<Option<T>> {
        let path = self
            .snapshot
            .cache
            .blob(&self.remote.etag)
            .with_extension("lock");
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder)?;
        }
        let file = File::create(path)?;
        match file.try_lock() {
            Ok(()) => change().map(Some),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(e)) => Err(e),
        }
    }

    /// One request. hf-hub appends whatever comes to the part and then makes it the blob, whatever its size.
    fn attempt(&self, part: &Path, before: u64, bar: &Bar) -> Result<Outcome, HubError> {
        let Self { snapshot, remote } = self;
        let disk = |e| snapshot.cache.disk(e);
        let url = || snapshot.repo.url(&remote.file);
        match snapshot
            .repo
            .download_with_progress(&remote.file, bar.clone())
        {
            Ok(pointer) => {
                let blob = snapshot.cache.blob(&remote.etag);
                let found = len(&blob).unwrap_or(0);
                if found == remote.size {
                    return Ok(Outcome::Complete);
                }
                fs::remove_file(&pointer).map_err(disk)?;
                if found > remote.size {
                    fs::remove_file(&blob).map_err(disk)?;
                    return Ok(Outcome::TooLong(found));
                }
                fs::rename(&blob, part).map_err(disk)?;
                Ok(Outcome::Short("the reply ended early".to_owned()))
            }
            Err(error) => match Fault::from(error) {
                Fault::Restart => {
                    let found = len(part).unwrap_or(0);
                    self.locked(|| remove(part)).map_err(disk)?;
                    Ok(Outcome::TooLong(found))
                }
                Fault::Status(404) => Err(snapshot.missing(&remote.file)),
                Fault::Locked(lock) => Err(HubError::Locked {
                    file: remote.file.clone(),
                    lock,
                }),
                fault if fault.is_passing() => {
                    self.locked(|| undo_repeat(part, before)).map_err(disk)?;
                    Ok(Outcome::Short(match fault {
                        Fault::Unreachable(reason) | Fault::Dropped(reason) => reason,
                        Fault::Status(status) => format!("HTTP status {status}"),
                        fault => format!("{fault:?}"),
                    }))
                }
                fault => Err(snapshot.client.error(fault, url())),
            },
        }
    }
}

enum Outcome {
    Complete,
    /// Some bytes, then an end, for this reason.
    Short(String),
    /// More bytes than the file has; the part is gone.
    TooLong(u64),
}

/// Leaves a part from which the server can go on to `size` bytes, and tells its length.
fn prepare(part: &Path, size: u64) -> io::Result<u64> {
    match len(part) {
        None => Ok(0),
        // Whole, but not yet renamed: hf-hub asks for what follows, and nothing does. One byte less, and it fits.
        Some(len) if len == size && len > 0 => {
            let file = OpenOptions::new().write(true).open(part)?;
            file.set_len(len - 1)?;
            Ok(len - 1)
        }
        Some(len) => Ok(len),
    }
}

/// A server that ignores `Range` sends the file from its beginning, and hf-hub appends that to the part. When such a
/// reply breaks off, the size does not give it away: what follows `before` then repeats the beginning and is cut off.
fn undo_repeat(part: &Path, before: u64) -> io::Result<()> {
    let appended = len(part).unwrap_or(0).saturating_sub(before);
    if before == 0 || appended == 0 {
        return Ok(());
    }
    let mut file = OpenOptions::new().read(true).write(true).open(part)?;
    let count = before.min(appended).min(4096);
    if read_at(&mut file, 0, count)? == read_at(&mut file, before, count)? {
        file.set_len(before)?;
    }
    Ok(())
}

fn read_at(file: &mut File, start: u64, count: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.seek(SeekFrom::Start(start))?;
    file.take(count).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn len(path: &Path) -> Option<u64> {
    fs::metadata(path).ok().map(|metadata| metadata.len())
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_repeated_beginning_is_cut_off_and_a_continuation_is_kept() {
        let folder = std::env::temp_dir().join(format!("hub-part-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let part = folder.join("x.part");
        for (content, kept) in [("abcdefabc", 6), ("abcdefghi", 9), ("abcdefabcdefabc", 6)] {
            fs::write(&part, content).unwrap();
            undo_repeat(&part, 6).unwrap();
            assert_eq!(len(&part), Some(kept), "{content}");
        }
        fs::write(&part, "abcdef").unwrap();
        undo_repeat(&part, 6).unwrap();
        undo_repeat(&part, 0).unwrap();
        assert_eq!(len(&part), Some(6));
        fs::remove_dir_all(&folder).unwrap();
    }
}
