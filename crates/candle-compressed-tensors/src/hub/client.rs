//! Requests to one repository, retried and with their failures told in the repository's terms.

use std::time::Duration;

use hf_hub::api::RepoInfo;
use hf_hub::api::sync::{Api, ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};

use super::fault::Fault;
use super::{HubError, HubOptions, names};

pub(super) struct Client<'a> {
    pub(super) model_id: &'a str,
    /// As the user gave it, for messages.
    pub(super) revision: &'a str,
    pub(super) options: &'a HubOptions,
    api: Api,
}

impl<'a> Client<'a> {
    pub(super) fn new(
        model_id: &'a str,
        revision: &'a str,
        options: &'a HubOptions,
    ) -> Result<Self, HubError> {
        check_endpoint(&options.endpoint)?;
        // hf-hub's own retries are not used: they go on from position 0 of a part that was resumed.
        let api = ApiBuilder::from_cache(Cache::new(options.cache_dir.clone()))
            .with_endpoint(options.endpoint.clone())
            .with_token(options.token.clone())
            .with_progress(false)
            .with_user_agent(env!("CARGO_PKG_NAME"), env!("CARGO_PKG_VERSION"))
            .build()
            .map_err(|e| HubError::NotAHub {
                url: options.endpoint.clone(),
                reason: e.to_string(),
            })?;
        Ok(Self {
            model_id,
            revision,
            options,
            api,
        })
    }

    pub(super) fn repo(&self, revision: &str) -> ApiRepo {
        self.api.repo(Repo::with_revision(
            self.model_id.to_owned(),
            RepoType::Model,
            revision.to_owned(),
        ))
    }

    /// What the revision holds, and its commit.
    pub(super) fn list(&self) -> Result<RepoInfo, HubError> {
        let url = |revision: &str| {
            let Self {
                model_id, options, ..
            } = self;
            format!(
                "{}/api/models/{model_id}/revision/{revision}",
                options.endpoint
            )
        };
        // A hub that nobody answers for is not waited for: the cache may serve.
        let retry = |fault: &Fault| fault.is_passing() && !matches!(fault, Fault::Unreachable(_));
        let listing = match self.retried(retry, || self.repo(self.revision).info()) {
            Ok(listing) => listing,
            Err(Fault::Status(404)) => return Err(self.not_found()),
            Err(fault) => return Err(self.error(fault, url(self.revision))),
        };
        // It becomes the name of a folder.
        if !names::is_commit(&listing.sha) {
            return Err(HubError::NotAHub {
                url: url(self.revision),
                reason: format!("`{}` is not a commit", listing.sha),
            });
        }
        Ok(listing)
    }

    /// 404 for a revision: is the repository there at all?
    fn not_found(&self) -> HubError {
        let endpoint = self.options.endpoint.clone();
        let model_id = self.model_id.to_owned();
        if self.revision != "main" && self.repo("main").info().is_ok() {
            let revision = self.revision.to_owned();
            return HubError::RevisionNotFound {
                model_id,
                revision,
                endpoint,
            };
        }
        HubError::RepoNotFound { model_id, endpoint }
    }

    /// Size and content name of the file at `url`.
    pub(super) fn metadata(&self, url: &str) -> Result<hf_hub::api::sync::Metadata, Fault> {
        self.retried(Fault::is_passing, || self.api.metadata(url))
    }

    fn retried<T>(
        &self,
        retry: impl Fn(&Fault) -> bool,
        request: impl Fn() -> Result<T, ApiError>,
    ) -> Result<T, Fault> {
        let mut failures = 0;
        loop {
            match request().map_err(Fault::from) {
                Err(fault) if retry(&fault) && failures < self.options.retries => {
                    failures += 1;
                    wait(failures);
                }
                result => return result,
            }
        }
    }

    /// A fault that is not about a download's middle, and not a 404, which means something else at each place.
    pub(super) fn error(&self, fault: Fault, url: String) -> HubError {
        let model_id = self.model_id.to_owned();
        match fault {
            Fault::Status(401) => HubError::Unauthorized {
                model_id,
                url,
                had_token: self.options.token.is_some(),
            },
            Fault::Status(403) => HubError::Forbidden {
                page: format!("{}/{model_id}", self.options.endpoint),
                model_id,
                url,
            },
            Fault::Status(status) => HubError::Status { url, status },
            Fault::Unreachable(reason) | Fault::Dropped(reason) => {
                HubError::Connection { url, reason }
            }
            Fault::Restart => HubError::Status { url, status: 416 },
            Fault::Nonsense(reason) => HubError::NotAHub { url, reason },
            Fault::Locked(lock) => HubError::Locked { file: url, lock },
            Fault::Disk(source) => HubError::Disk {
                path: self.options.cache_dir.clone(),
                source,
            },
        }
    }
}

/// The pause before attempt `failures + 1`: 0.2 s, 0.4 s, … 6.4 s.
pub(super) fn wait(failures: u32) {
    std::thread::sleep(Duration::from_millis(100 << failures.min(6)));
}

fn check_endpoint(endpoint: &str) -> Result<(), HubError> {
    let host = endpoint
        .strip_prefix("https://")
        .or_else(|| endpoint.strip_prefix("http://"));
    let good = host.is_some_and(|host| {
        host.bytes()
            .all(|b| b.is_ascii_alphanumeric() || b".:-_/[]".contains(&b))
            && host.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '[')
            && !host.ends_with('/')
    });
    if good {
        return Ok(());
    }
    Err(HubError::InvalidEndpoint {
        endpoint: endpoint.to_owned(),
    })
}
