//! Where to download from, where to, and as whom.

use std::fmt;
use std::path::{Path, PathBuf};

/// The public hub.
const ENDPOINT: &str = "https://huggingface.co";

/// How [`download`](super::download) talks to the hub. [`HubOptions::from_env`] reads the environment variables that
/// Python's `huggingface_hub` reads; nothing else does.
#[derive(Clone)]
pub struct HubOptions {
    /// The hub's address without a final slash: `https://huggingface.co`, or a mirror's.
    pub endpoint: String,
    /// The cache, that is, the folder that holds `models--owner--name` folders.
    pub cache_dir: PathBuf,
    /// Sent as `Authorization: Bearer …`, for private and gated repositories.
    pub token: Option<String>,
    /// Never make a request: take what the cache has.
    pub offline: bool,
    /// Draw a progress bar for each file of weights (on stderr, when it is a terminal).
    pub progress: bool,
    /// How many files of weights are downloaded at a time; at least one is.
    pub connections: usize,
    /// How many times in a row a request or a download that made no headway is tried again, after 0.2 s, 0.4 s, 0.8 s, …
    pub retries: u32,
}

impl HubOptions {
    /// The public hub without a token, online, 4 connections, 5 retries, with progress bars, into `cache_dir`.
    pub fn new(cache_dir: impl Into<PathBuf>) -> Self {
        Self {
            endpoint: ENDPOINT.to_owned(),
            cache_dir: cache_dir.into(),
            token: None,
            offline: false,
            progress: true,
            connections: 4,
            retries: 5,
        }
    }

    /// As the environment says:
    ///
    /// | variable | meaning |
    /// | --- | --- |
    /// | `HF_ENDPOINT` | the hub's address |
    /// | `HF_HUB_CACHE` | the cache; else `$HF_HOME/hub`, `$XDG_CACHE_HOME/huggingface/hub`, `~/.cache/huggingface/hub` |
    /// | `HF_TOKEN` | the token; else the file `HF_TOKEN_PATH`; else the file `token` of `HF_HOME`, where `hf auth login` leaves it |
    /// | `HF_HUB_OFFLINE` | `1`, `true`, `yes` or `on`: the cache alone |
    /// | `HF_HUB_DISABLE_PROGRESS_BARS` | the same values: no bars |
    pub fn from_env() -> Self {
        Self::from_vars(|name| std::env::var(name).ok(), std::env::home_dir())
    }

    /// [`HubOptions::from_env`] on any environment, so that it can be tested without touching the process's own.
    fn from_vars(var: impl Fn(&str) -> Option<String>, user: Option<PathBuf>) -> Self {
        let var = |name: &str| {
            var(name)
                .map(|value| value.trim().to_owned())
                .filter(|value| !value.is_empty())
        };
        let flag = |name: &str| var(name).is_some_and(|value| is_true(&value));
        let home = var("HF_HOME").map(PathBuf::from).unwrap_or_else(|| {
            let cache = var("XDG_CACHE_HOME").map(PathBuf::from);
            cache
                .unwrap_or_else(|| user.unwrap_or_default().join(".cache"))
                .join("huggingface")
        });
        let cache_dir = var("HF_HUB_CACHE").map(PathBuf::from);

        let mut options = Self::new(cache_dir.unwrap_or_else(|| home.join("hub")));
        if let Some(endpoint) = var("HF_ENDPOINT") {
            options.endpoint = endpoint.trim_end_matches('/').to_owned();
        }
        options.token = var("HF_TOKEN").or_else(|| {
            let path = var("HF_TOKEN_PATH").map(PathBuf::from);
            read_token(&path.unwrap_or_else(|| home.join("token")))
        });
        options.offline = flag("HF_HUB_OFFLINE");
        options.progress = !flag("HF_HUB_DISABLE_PROGRESS_BARS");
        options
    }
}

/// The token itself stays out of logs.
impl fmt::Debug for HubOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HubOptions")
            .field("endpoint", &self.endpoint)
            .field("cache_dir", &self.cache_dir)
            .field("token", &self.token.as_ref().map(|_| "…"))
            .field("offline", &self.offline)
            .field("progress", &self.progress)
            .field("connections", &self.connections)
            .field("retries", &self.retries)
            .finish()
    }
}

fn is_true(value: &str) -> bool {
    ["1", "true", "yes", "on"]
        .iter()
        .any(|word| value.eq_ignore_ascii_case(word))
}

/// A token file that cannot be read is no token: the hub then says whether one is needed.
fn read_token(path: &Path) -> Option<String> {
    let token = std::fs::read_to_string(path).ok()?;
    let token = token.trim();
    (!token.is_empty()).then(|| token.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(vars: &[(&str, &str)]) -> HubOptions {
        let find = |name: &str| vars.iter().find(|(key, _)| *key == name);
        HubOptions::from_vars(
            |name| find(name).map(|(_, value)| (*value).to_owned()),
            Some(PathBuf::from("/home/ferris")),
        )
    }

    #[test]
    fn an_empty_environment_means_the_public_hub() {
        let options = options(&[("HF_TOKEN", " "), ("HF_HOME", "")]);
        assert_eq!(options.endpoint, "https://huggingface.co");
        assert_eq!(
            options.cache_dir,
            Path::new("/home/ferris/.cache/huggingface/hub")
        );
        assert_eq!(options.token, None);
        assert!(!options.offline && options.progress);
    }

    #[test]
    fn the_cache_is_where_other_tools_keep_it() {
        let cache = |vars: &[(&str, &str)]| options(vars).cache_dir;
        assert_eq!(
            cache(&[("HF_HOME", "/hf"), ("XDG_CACHE_HOME", "/xdg")]),
            Path::new("/hf/hub")
        );
        assert_eq!(
            cache(&[("XDG_CACHE_HOME", "/xdg")]),
            Path::new("/xdg/huggingface/hub")
        );
        assert_eq!(
            cache(&[("HF_HUB_CACHE", "/big/disk"), ("HF_HOME", "/hf")]),
            Path::new("/big/disk")
        );
    }

    #[test]
    fn flags_endpoint_and_token() {
        for (value, offline) in [
            ("1", true),
            ("true", true),
            ("YES", true),
            ("on", true),
            ("0", false),
            ("false", false),
        ] {
            assert_eq!(
                options(&[("HF_HUB_OFFLINE", value)]).offline,
                offline,
                "{value}"
            );
        }
        let options = options(&[
            ("HF_ENDPOINT", "http://localhost:8080/"),
            ("HF_TOKEN", "hf_secret\n"),
            ("HF_HUB_DISABLE_PROGRESS_BARS", "1"),
        ]);
        assert_eq!(options.endpoint, "http://localhost:8080");
        assert_eq!(options.token.as_deref(), Some("hf_secret"));
        assert!(!options.progress);
        assert!(!format!("{options:?}").contains("secret"));
    }
}
