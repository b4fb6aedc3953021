//! What can go wrong between here and the hub.

use std::io;
use std::path::PathBuf;

/// Why a checkpoint could not be taken from the hub. Every text says what happened and what to do about it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HubError {
    /// The model id cannot be a repository's name.
    #[error(
        "`{model_id}` is not a model id: {reason}. Give `owner/name`, for example \
         `RedHatAI/Meta-Llama-3.1-8B-Instruct-FP8-dynamic`; to read a folder, open it as a folder"
    )]
    InvalidModelId {
        /// The id as given.
        model_id: String,
        /// What is wrong with it.
        reason: &'static str,
    },

    /// The revision cannot be the name of a branch, a tag or a commit.
    #[error(
        "`{revision}` is not a revision: {reason}. Give a branch, a tag or a commit of 40 digits"
    )]
    InvalidRevision {
        /// The revision as given.
        revision: String,
        /// What is wrong with it.
        reason: &'static str,
    },

    /// The hub's address is not one.
    #[error(
        "`{endpoint}` is not a hub's address. HF_ENDPOINT should look like `https://huggingface.co`, or be unset"
    )]
    InvalidEndpoint {
        /// The endpoint as given.
        endpoint: String,
    },

    /// 401: without a token, or with one that the hub does not know. The hub also answers so for a repository that does
    /// not exist, when the request carries no token.
    #[error(
        "{url} answered 401 (unauthorized): {model_id} is private or gated, or does not exist, and {}. Check the model \
         id, then set HF_TOKEN to a token of an account that may read it",
        if *.had_token { "the token that was sent is not valid for it" } else { "no token was sent" }
    )]
    Unauthorized {
        /// The repository.
        model_id: String,
        /// What was asked for.
        url: String,
        /// Whether a token was sent.
        had_token: bool,
    },

    /// 403: the account is known and may not read the repository.
    #[error(
        "{url} answered 403 (forbidden): {model_id} is gated. Accept its terms at {page} with your account, then set \
         HF_TOKEN to a token of that account which may read gated repositories"
    )]
    Forbidden {
        /// The repository.
        model_id: String,
        /// What was asked for.
        url: String,
        /// The repository's page, where access is asked for.
        page: String,
    },

    /// 404: no such repository.
    #[error(
        "there is no model `{model_id}` at {endpoint}, or it is private and invisible to you. Check the spelling; for \
         a private model set HF_TOKEN"
    )]
    RepoNotFound {
        /// The id as given.
        model_id: String,
        /// The hub that was asked.
        endpoint: String,
    },

    /// 404: the repository is there, the branch, tag or commit is not.
    #[error(
        "{model_id} has no revision `{revision}`. Look at the branches and tags on {endpoint}/{model_id}/tree/main, \
         or leave the revision out for `main`"
    )]
    RevisionNotFound {
        /// The repository.
        model_id: String,
        /// The revision as given.
        revision: String,
        /// The hub that was asked.
        endpoint: String,
    },

    /// The repository lacks a file that every checkpoint has.
    #[error(
        "{model_id} at `{revision}` has no {file}, so it is not a model in the transformers layout. Check the model \
         id and the revision"
    )]
    MissingFile {
        /// The repository.
        model_id: String,
        /// The revision as given.
        revision: String,
        /// The missing file.
        file: String,
    },

    /// The index names a file of weights that the repository does not have.
    #[error(
        "{model_id} at `{revision}`: {index} names {shard}, and the repository has no such file: the upload is not \
         complete. Try another revision, or ask whoever published it"
    )]
    MissingShard {
        /// The repository.
        model_id: String,
        /// The revision as given.
        revision: String,
        /// The index that names the shard.
        index: String,
        /// The missing file.
        shard: String,
    },

    /// The index is not one.
    #[error("{} is not an index of safetensors files: {reason}. If the file in the repository is right, delete this one \
             and run again", .path.display())]
    BadIndex {
        /// The index in the cache.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },

    /// A file name that would leave the snapshot folder, or that cannot be asked for.
    #[error(
        "{model_id} names a file `{file}`, which is refused: only plain relative paths are downloaded"
    )]
    UnsafeName {
        /// The repository.
        model_id: String,
        /// The name as found.
        file: String,
    },

    /// The repository has weights, if any, in other formats only.
    #[error(
        "{model_id} at `{revision}` has no safetensors weights (neither model.safetensors nor \
         model.safetensors.index.json){}. Choose a repository or a revision with safetensors files",
        found_instead(.found)
    )]
    NoSafetensors {
        /// The repository.
        model_id: String,
        /// The revision as given.
        revision: String,
        /// Files of weights that are there instead.
        found: Vec<String>,
    },

    /// The hub could not be reached at all.
    #[error(
        "cannot reach {url}: {reason}. Check the network, the proxy and HF_ENDPOINT; with HF_HUB_OFFLINE=1 the cache \
         alone is used"
    )]
    Connection {
        /// What was asked for.
        url: String,
        /// What the network said.
        reason: String,
    },

    /// A download stopped early, again and again.
    #[error(
        "{file} of {model_id} is not complete: {found} of {expected} bytes arrived in {attempts} attempts ({reason}). \
         They are kept: run again to go on from there"
    )]
    Truncated {
        /// The repository.
        model_id: String,
        /// The file.
        file: String,
        /// Its size in bytes, as the hub states it.
        expected: u64,
        /// The bytes that are here.
        found: u64,
        /// How many times it was tried.
        attempts: u32,
        /// What ended the last attempt.
        reason: String,
    },

    /// The server sends more bytes than the hub states, twice.
    #[error(
        "{file} of {model_id} should have {expected} bytes and the server sent {found}. The file was deleted; check \
         HF_ENDPOINT and the proxy, then run again"
    )]
    WrongSize {
        /// The repository.
        model_id: String,
        /// The file.
        file: String,
        /// Its size in bytes, as the hub states it.
        expected: u64,
        /// The bytes that came.
        found: u64,
    },

    /// Any other HTTP status.
    #[error(
        "{url} answered with HTTP status {status}{}",
        status_advice(*.status)
    )]
    Status {
        /// What was asked for.
        url: String,
        /// The status.
        status: u16,
    },

    /// The answer is not that of a hub.
    #[error(
        "{url} did not answer as a hub does: {reason}. Check HF_ENDPOINT, and whether a proxy or a login page answers \
         in its place"
    )]
    NotAHub {
        /// What was asked for.
        url: String,
        /// What was wrong with the answer.
        reason: String,
    },

    /// Offline, and the cache does not have the file.
    #[error(
        "offline, and {file} of {model_id} at `{revision}` is not in the cache {}. Run once without HF_HUB_OFFLINE, or \
         fetch it with `hf download {model_id} --revision {revision}` and copy the cache here", .cache_dir.display()
    )]
    NotCached {
        /// The repository.
        model_id: String,
        /// The revision as given.
        revision: String,
        /// The first file that is not there.
        file: String,
        /// The cache that was looked at.
        cache_dir: PathBuf,
    },

    /// Another program holds the lock of a file.
    #[error(
        "{file} is being downloaded by another program, which holds {}. Wait for it or end it, then run again", .lock.display()
    )]
    Locked {
        /// The file.
        file: String,
        /// The lock.
        lock: PathBuf,
    },

    /// The cache cannot be read or written.
    #[error("cannot use the cache at {}: {source}. Check the free space and the permissions, or set HF_HOME to a folder \
             elsewhere", .path.display())]
    Disk {
        /// Where.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

impl HubError {
    /// Whether the hub did not answer, or not sensibly enough to say that the cache is out of date.
    pub(super) fn is_unreachable(&self) -> bool {
        match self {
            Self::Connection { .. } => true,
            Self::Status { status, .. } => *status >= 500 || *status == 429,
            _ => false,
        }
    }
}

fn found_instead(found: &[String]) -> String {
    match found {
        [] => String::new(),
        found => format!("; it has {}, which are not read here", found.join(", ")),
    }
}

fn status_advice(status: u16) -> &'static str {
    match status {
        429 => ": too many requests. Wait a while, or set HF_TOKEN, then run again",
        500.. => ": the server is in trouble. Wait a while, then run again",
        _ => ". Check HF_ENDPOINT, the model id and the revision",
    }
}
