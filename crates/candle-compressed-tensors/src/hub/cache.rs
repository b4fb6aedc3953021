//! One repository's folder in the cache: `refs/<revision>` holds a commit, `snapshots/<commit>/<file>` are links to
//! `blobs/<etag>`.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use hf_hub::{Cache, CacheRepo, Repo, RepoType};

use super::{CONFIG, HubError, INDEX, SINGLE, index, names};

pub(super) struct RepoCache {
    cache_dir: PathBuf,
    model_id: String,
}

impl RepoCache {
    pub(super) fn new(cache_dir: &Path, model_id: &str) -> Self {
        Self {
            cache_dir: cache_dir.to_owned(),
            model_id: model_id.to_owned(),
        }
    }

    fn repo(&self, revision: &str) -> Repo {
        Repo::with_revision(self.model_id.clone(), RepoType::Model, revision.to_owned())
    }

    fn hub(&self, revision: &str) -> CacheRepo {
        Cache::new(self.cache_dir.clone()).repo(self.repo(revision))
    }

    /// The folder of a commit's files.
    pub(super) fn snapshot(&self, commit: &str) -> PathBuf {
        self.hub(commit).pointer_path(commit)
    }

    /// Where the content named `etag` lies when it is complete.
    pub(super) fn blob(&self, etag: &str) -> PathBuf {
        self.hub("main").blob_path(etag)
    }

    /// Where the content named `etag` lies while it is downloaded (hf-hub's naming).
    pub(super) fn part(&self, etag: &str) -> PathBuf {
        self.blob(etag).with_extension("part")
    }

    /// The commit that `revision` meant when it was last looked up.
    fn read_ref(&self, revision: &str) -> Option<String> {
        if names::is_commit(revision) {
            return Some(revision.to_owned());
        }
        let folder = self.cache_dir.join(self.repo(revision).folder_name());
        let commit = fs::read_to_string(folder.join("refs").join(revision)).ok()?;
        let commit = commit.trim();
        names::is_commit(commit).then(|| commit.to_owned())
    }

    pub(super) fn write_ref(&self, revision: &str, commit: &str) -> Result<(), HubError> {
        self.hub(revision)
            .create_ref(commit)
            .map_err(|source| self.disk(source))
    }

    /// The snapshot folder of `revision` if it holds the configuration and all weights; else the error names the first
    /// file that is not there.
    pub(super) fn require(&self, revision: &str) -> Result<PathBuf, HubError> {
        let missing = |file: &str| HubError::NotCached {
            model_id: self.model_id.clone(),
            revision: revision.to_owned(),
            file: file.to_owned(),
            cache_dir: self.cache_dir.clone(),
        };
        let commit = self.read_ref(revision).ok_or_else(|| missing(CONFIG))?;
        let folder = self.snapshot(&commit);
        if !folder.join(CONFIG).exists() {
            return Err(missing(CONFIG));
        }
        let index = folder.join(INDEX);
        let weights = if index.exists() {
            index::shards(&index)?
        } else {
            vec![SINGLE.to_owned()]
        };
        // A name that leaves the folder is no cached file, whatever lies there.
        match weights
            .iter()
            .find(|file| !names::is_plain_path(file) || !folder.join(file).exists())
        {
            Some(file) => Err(missing(file)),
            None => Ok(folder),
        }
    }

    /// Makes `snapshots/<commit>/<file>` point to the complete content `etag`.
    pub(super) fn link(&self, commit: &str, file: &str, etag: &str) -> Result<(), HubError> {
        let pointer = self.snapshot(commit).join(file);
        let blob = self.blob(etag);
        // From the pointer's folder up to the repository's, then down to the blob.
        let mut relative: PathBuf = file.split('/').map(|_| "..").collect();
        relative.push("..");
        relative.push("blobs");
        relative.push(etag);
        let made = pointer
            .parent()
            .map_or(Ok(()), fs::create_dir_all)
            .and_then(|()| link(&relative, &blob, &pointer));
        match made {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => Err(self.disk(e)),
            _ => Ok(()),
        }
    }

    pub(super) fn disk(&self, source: io::Error) -> HubError {
        HubError::Disk {
            path: self.cache_dir.clone(),
            source,
        }
    }
}

#[cfg(unix)]
fn link(relative: &Path, _blob: &Path, pointer: &Path) -> io::Result<()> {
    std::os::unix::fs::symlink(relative, pointer)
}

/// Symbolic links need a privilege elsewhere; hard links do not.
#[cfg(not(unix))]
fn link(_relative: &Path, blob: &Path, pointer: &Path) -> io::Result<()> {
    fs::hard_link(blob, pointer)
}
