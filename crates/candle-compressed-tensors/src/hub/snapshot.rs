//! The files of one commit, brought into the cache.

use std::collections::HashSet;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use hf_hub::api::RepoInfo;
use hf_hub::api::sync::ApiRepo;

use super::cache::RepoCache;
use super::client::Client;
use super::fault::Fault;
use super::fetch::{self, Remote};
use super::progress::{Bar, Bars};
use super::{CONFIG, HubError, INDEX, SINGLE, index, names};

pub(super) struct Snapshot<'a> {
    pub(super) client: &'a Client<'a>,
    pub(super) cache: &'a RepoCache,
    /// The repository at this very commit.
    pub(super) repo: ApiRepo,
    commit: String,
    listed: HashSet<String>,
}

impl<'a> Snapshot<'a> {
    pub(super) fn new(
        client: &'a Client<'a>,
        cache: &'a RepoCache,
        listing: RepoInfo,
    ) -> Result<Self, HubError> {
        Ok(Self {
            client,
            cache,
            repo: client.repo(&listing.sha),
            listed: listing.siblings.into_iter().map(|s| s.rfilename).collect(),
            commit: listing.sha,
        })
    }

    pub(super) fn commit(&self) -> &str {
        &self.commit
    }

    /// Fetches those of `files` that the repository lists; without the configuration there is no checkpoint.
    pub(super) fn fetch_small(&self, files: &[&str]) -> Result<(), HubError> {
        if files.contains(&CONFIG) && !self.listed.contains(CONFIG) {
            return Err(self.missing(CONFIG));
        }
        let listed = files.iter().filter(|file| self.listed.contains(**file));
        let listed: Vec<String> = listed.map(|file| (*file).to_owned()).collect();
        self.fetch_all(&listed, |_| Bar::none())
    }

    /// The names of the files of weights: the index's, or the single file's.
    pub(super) fn weights(&self) -> Result<Vec<String>, HubError> {
        if !self.listed.contains(INDEX) {
            if self.listed.contains(SINGLE) {
                return Ok(vec![SINGLE.to_owned()]);
            }
            return Err(self.no_safetensors());
        }
        self.fetch_small(&[INDEX])?;
        let shards = index::shards(&self.cache.snapshot(&self.commit).join(INDEX))?;
        for shard in &shards {
            if !names::is_plain_path(shard) {
                return Err(HubError::UnsafeName {
                    model_id: self.client.model_id.to_owned(),
                    file: shard.clone(),
                });
            }
            if !self.listed.contains(shard) {
                return Err(self.missing(shard));
            }
        }
        Ok(shards)
    }

    /// Fetches the files of weights, each with a bar.
    pub(super) fn fetch_weights(&self, files: &[String]) -> Result<(), HubError> {
        let bars = Bars::new(self.client.options.progress);
        self.fetch_all(files, |remote| bars.add(remote))
    }

    /// Fetches `files` a few at a time. All are looked up before the first is downloaded, so that a missing shard or a
    /// refused token shows at once.
    fn fetch_all(
        &self,
        files: &[String],
        bar: impl Fn(&Remote) -> Bar + Sync,
    ) -> Result<(), HubError> {
        let threads = self.client.options.connections;
        let remotes = parallel(threads, files, |file| self.locate(file))?;
        // Two files with one content share a blob: the second is linked when the first is there.
        let mut contents = HashSet::new();
        let (first, again): (Vec<Remote>, Vec<Remote>) = remotes
            .into_iter()
            .flatten()
            .partition(|remote| contents.insert(remote.etag.clone()));
        let fetch = |remote: &Remote| fetch::fetch(self, remote, bar(remote));
        parallel(threads, &first, fetch)?;
        again.iter().try_for_each(fetch)
    }

    /// What the hub says about `file`, or `None` when the snapshot has it.
    fn locate(&self, file: &str) -> Result<Option<Remote>, HubError> {
        let pointer = self.cache.snapshot(&self.commit).join(file);
        if pointer.exists() {
            return Ok(None);
        }
        let url = self.repo.url(file);
        let metadata = match self.client.metadata(&url) {
            Ok(metadata) => metadata,
            Err(Fault::Status(404)) => return Err(self.missing(file)),
            Err(fault) => return Err(self.client.error(fault, url)),
        };
        // Both become parts of paths.
        let (commit, etag) = (metadata.commit_hash(), metadata.etag());
        if commit != self.commit || !names::is_plain_path(etag) {
            return Err(HubError::NotAHub {
                url,
                reason: format!("it gave commit `{commit}` and etag `{etag}`"),
            });
        }
        Ok(Some(Remote {
            file: file.to_owned(),
            etag: etag.to_owned(),
            size: metadata.size() as u64,
        }))
    }

    /// The repository lacks `file`: one that every checkpoint has, or one that the index names.
    pub(super) fn missing(&self, file: &str) -> HubError {
        let model_id = self.client.model_id.to_owned();
        let revision = self.client.revision.to_owned();
        if self.listed.contains(INDEX) && file != INDEX && file.ends_with(".safetensors") {
            return HubError::MissingShard {
                model_id,
                revision,
                index: INDEX.to_owned(),
                shard: file.to_owned(),
            };
        }
        HubError::MissingFile {
            model_id,
            revision,
            file: file.to_owned(),
        }
    }

    fn no_safetensors(&self) -> HubError {
        const OTHERS: [&str; 6] = [".bin", ".pt", ".pth", ".gguf", ".h5", ".onnx"];
        let is_weights = |file: &&String| OTHERS.iter().any(|end| file.ends_with(end));
        let mut found: Vec<String> = self.listed.iter().filter(is_weights).cloned().collect();
        found.sort();
        found.truncate(4);
        HubError::NoSafetensors {
            model_id: self.client.model_id.to_owned(),
            revision: self.client.revision.to_owned(),
            found,
        }
    }
}

/// `work` on every item, on at most `threads` threads; results in the items' order. After an error no further item is
/// begun; the ones under way end first, so that their bytes stay usable, and the first error in time is returned.
fn parallel<T: Sync, R: Send>(
    threads: usize,
    items: &[T],
    work: impl Fn(&T) -> Result<R, HubError> + Sync,
) -> Result<Vec<R>, HubError> {
    let next = AtomicUsize::new(0);
    let failed = AtomicBool::new(false);
    let failure = Mutex::new(None);
    let results = Mutex::new(Vec::with_capacity(items.len()));
    std::thread::scope(|scope| {
        for _ in 0..threads.clamp(1, items.len().max(1)) {
            scope.spawn(|| {
                while !failed.load(Ordering::Relaxed) {
                    let i = next.fetch_add(1, Ordering::Relaxed);
                    let Some(item) = items.get(i) else { break };
                    match work(item) {
                        Ok(result) => lock(&results).push((i, result)),
                        Err(error) => {
                            failed.store(true, Ordering::Relaxed);
                            lock(&failure).get_or_insert(error);
                        }
                    }
                }
            });
        }
    });
    if let Some(error) = lock(&failure).take() {
        return Err(error);
    }
    let mut results = std::mem::take(&mut *lock(&results));
    results.sort_by_key(|(i, _)| *i);
    Ok(results.into_iter().map(|(_, result)| result).collect())
}

/// A panic elsewhere leaves these values whole.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner())
}
