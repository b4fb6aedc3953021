//! hf-hub's errors, sorted by what can be done about them.

use std::io::{self, ErrorKind};
use std::path::PathBuf;

use hf_hub::api::sync::ApiError;

/// One failed attempt.
#[derive(Debug)]
pub(super) enum Fault {
    /// Nobody answered.
    Unreachable(String),
    /// An answer began and broke off.
    Dropped(String),
    /// An HTTP status that is an error.
    Status(u16),
    /// The file on disk and the server disagree about where to go on.
    Restart,
    /// Another program holds this lock.
    Locked(PathBuf),
    /// The cache's disk.
    Disk(io::Error),
    /// An answer that is none.
    Nonsense(String),
}

impl Fault {
    /// Whether the same request may succeed a moment later.
    pub(super) fn is_passing(&self) -> bool {
        match self {
            Self::Unreachable(_) | Self::Dropped(_) => true,
            Self::Status(status) => matches!(status, 408 | 429 | 500..),
            Self::Restart | Self::Locked(_) | Self::Disk(_) | Self::Nonsense(_) => false,
        }
    }
}

impl From<ApiError> for Fault {
    fn from(error: ApiError) -> Self {
        match error {
            ApiError::RequestError(error) => {
                // The error's type is ureq's, which hf-hub does not hand out: the status is in the text alone.
                let text = error.to_string();
                match text.strip_prefix("http status: ").map(str::parse) {
                    Some(Ok(416)) => Self::Restart,
                    Some(Ok(status)) => Self::Status(status),
                    _ => from_request(error.into_io(), text),
                }
            }
            ApiError::IoError(error) => from_copy(error),
            ApiError::InvalidResume => Self::Restart,
            ApiError::LockAcquisition(path) => Self::Locked(path),
            ApiError::TooManyRetries(error) => Self::from(*error),
            error => Self::Nonsense(error.to_string()),
        }
    }
}

/// A request that got no answer.
fn from_request(error: io::Error, text: String) -> Fault {
    if is_broken(error.kind()) {
        return Fault::Dropped(text);
    }
    // What is not the socket's is ureq's own, wrapped: a body that is no JSON, a URL, a header.
    let own = error.kind() == ErrorKind::Other && error.raw_os_error().is_none();
    let network = [
        "host not found",
        "connection failed",
        "timeout",
        "tls",
        "rustls",
        "proxy",
    ];
    if own
        && !network
            .iter()
            .any(|word| text.to_ascii_lowercase().contains(word))
    {
        return Fault::Nonsense(text);
    }
    Fault::Unreachable(text)
}

/// The copy from the socket to the file: both sides report `io::Error`.
fn from_copy(error: io::Error) -> Fault {
    // An error that is not the system's comes from the HTTP reader.
    let http = error.get_ref().is_some();
    if http || is_broken(error.kind()) {
        Fault::Dropped(error.to_string())
    } else {
        Fault::Disk(error)
    }
}

fn is_broken(kind: ErrorKind) -> bool {
    matches!(
        kind,
        ErrorKind::UnexpectedEof
            | ErrorKind::ConnectionReset
            | ErrorKind::ConnectionAborted
            | ErrorKind::BrokenPipe
            | ErrorKind::NotConnected
            | ErrorKind::TimedOut
            | ErrorKind::WouldBlock
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_disk_and_the_network_are_told_apart() {
        // ENOSPC on every Unix; ERROR_DISK_FULL is another number, and an error of the system's all the same.
        let full = ApiError::IoError(io::Error::from_raw_os_error(28));
        assert!(matches!(Fault::from(full), Fault::Disk(_)));
        let denied = ApiError::IoError(ErrorKind::PermissionDenied.into());
        assert!(matches!(Fault::from(denied), Fault::Disk(_)));
        let reset = ApiError::IoError(ErrorKind::ConnectionReset.into());
        assert!(matches!(Fault::from(reset), Fault::Dropped(_)));
        let reader = ApiError::IoError(io::Error::other("chunk ended early"));
        assert!(matches!(Fault::from(reader), Fault::Dropped(_)));
    }

    #[test]
    fn only_what_may_pass_is_tried_again() {
        for status in [408, 429, 500, 502, 503] {
            assert!(Fault::Status(status).is_passing(), "{status}");
        }
        for status in [400, 401, 403, 404, 416] {
            assert!(!Fault::Status(status).is_passing(), "{status}");
        }
        assert!(Fault::Dropped(String::new()).is_passing());
        assert!(!Fault::Disk(ErrorKind::StorageFull.into()).is_passing());
        assert!(!Fault::Restart.is_passing());
    }
}
