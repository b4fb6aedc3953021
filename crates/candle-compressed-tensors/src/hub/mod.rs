//! Downloads a checkpoint from the Hugging Face hub into the hub's usual cache.
//!
//! [`download`] asks the hub once what a revision holds, fetches `config.json`, then the other small files, then the
//! safetensors shards a few at a time, and returns the snapshot folder, which
//! [`Checkpoint::open`](crate::Checkpoint::open) reads. The cache is the one of Python's `huggingface_hub` and of
//! Candle's own examples: nothing that lies there is downloaded a second time.
//!
//! * The revision is resolved to a commit first, and every file is taken from that commit: a branch that moves during a
//!   download does not mix two checkpoints.
//! * A broken connection is retried from where it stopped; an interrupted program goes on from there when it is run again.
//! * The size of each file is compared with the one the hub states.
//! * A commit whose files are all in the cache needs no request; a branch or a tag needs one, which finds out whether it
//!   has moved. When the hub cannot be reached, the last complete snapshot is used, with a line on stderr that says so.
//! * [`HubOptions::offline`] makes no request at all.
//!
//! ```
//! use candle_compressed_tensors::hub::{self, HubError, HubOptions};
//!
//! // Everything is explicit here; `HubOptions::from_env()` reads HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE.
//! let mut options = HubOptions::new("no/such/cache");
//! options.offline = true;
//! let error = hub::download("RedHatAI/Meta-Llama-3.1-8B-Instruct-FP8-dynamic", None, &options).unwrap_err();
//! assert!(matches!(error, HubError::NotCached { .. }));
//! ```

mod cache;
mod client;
mod error;
mod fault;
mod fetch;
mod index;
mod names;
mod options;
mod progress;
mod snapshot;

use std::path::PathBuf;

pub use error::HubError;
pub use options::HubOptions;

use cache::RepoCache;
use client::Client;
use snapshot::Snapshot;

use crate::warning;

/// The model's configuration: the one file that every checkpoint has.
pub(crate) const CONFIG: &str = "config.json";
/// Names the shard of every tensor, in a sharded checkpoint.
pub(crate) const INDEX: &str = "model.safetensors.index.json";
/// The weights of a checkpoint that is not sharded.
pub(crate) const SINGLE: &str = "model.safetensors";

/// Taken when the repository lists them.
const OPTIONAL: [&str; 6] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
];

/// Of those, the ones without which a cached commit is not taken as complete before the hub was asked: another program
/// may have fetched the weights alone.
const EXPECTED: [&str; 2] = ["tokenizer.json", "tokenizer_config.json"];

/// Makes sure that the checkpoint `model_id` at `revision` is in the cache and returns its snapshot folder.
///
/// `model_id` is `owner/name`; `revision` is a branch, a tag or a commit, `main` when it is `None`. The folder holds
/// `config.json`, `model.safetensors` or `model.safetensors.index.json` with its shards, and those of the tokenizer, chat
/// template and generation files that the repository has.
///
/// Blocks until everything is there. A connection that stays open without sending anything is waited for.
///
/// # Errors
///
/// See [`HubError`]: each variant says what happened and what to do. What had arrived before an error stays in the cache
/// and the next call goes on from there.
pub fn download(
    model_id: &str,
    revision: Option<&str>,
    options: &HubOptions,
) -> Result<PathBuf, HubError> {
    let revision = revision.unwrap_or("main");
    names::check_model_id(model_id)?;
    names::check_revision(revision)?;
    let cache = RepoCache::new(&options.cache_dir, model_id);

    if options.offline {
        return cache.require(revision);
    }
    if names::is_commit(revision) {
        let folder = cache.snapshot(revision);
        let expected = EXPECTED.iter().all(|file| folder.join(file).exists());
        if expected && let Ok(folder) = cache.require(revision) {
            return Ok(folder);
        }
    }

    let client = Client::new(model_id, revision, options)?;
    let listing = match client.list() {
        Ok(listing) => listing,
        Err(error) if error.is_unreachable() => {
            let Ok(folder) = cache.require(revision) else {
                return Err(error);
            };
            warning::print(&error);
            warning::print(&format_args!(
                "using the copy of {model_id} in the cache, which may be older than `{revision}` on the hub: {}",
                folder.display()
            ));
            return Ok(folder);
        }
        Err(error) => return Err(error),
    };

    let snapshot = Snapshot::new(&client, &cache, listing)?;
    snapshot.fetch_small(&[CONFIG])?;
    let weights = snapshot.weights()?;
    snapshot.fetch_small(&OPTIONAL)?;
    snapshot.fetch_weights(&weights)?;
    // Last, so that the cache never names a commit whose files are not all there.
    cache.write_ref(revision, snapshot.commit())?;
    Ok(cache.snapshot(snapshot.commit()))
}
