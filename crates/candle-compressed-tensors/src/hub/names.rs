//! Names that come from users and servers and end in URLs and paths: checked before they do.

use super::HubError;

/// The hub's own rules for repository names: one or two parts of letters, digits, `.`, `_` and `-`.
pub(super) fn check_model_id(model_id: &str) -> Result<(), HubError> {
    let refuse = |reason| {
        Err(HubError::InvalidModelId {
            model_id: model_id.to_owned(),
            reason,
        })
    };
    if model_id.is_empty() {
        return refuse("it is empty");
    }
    if model_id.len() > 193 {
        return refuse("it is longer than 96 characters a part");
    }
    let mut parts = 0;
    for part in model_id.split('/') {
        parts += 1;
        if part.is_empty() {
            return refuse("a part of it is empty");
        }
        if !part
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
        {
            return refuse(
                "a part of it has characters other than letters, digits, `.`, `_` and `-`",
            );
        }
        if part.starts_with(['.', '-']) || part.ends_with(['.', '-']) {
            return refuse("a part of it starts or ends with `.` or `-`");
        }
        // `--` is how the cache writes `/`.
        if part.contains("..") || part.contains("--") {
            return refuse("it contains `..` or `--`");
        }
    }
    if parts > 2 {
        return refuse("it has more than one `/`");
    }
    Ok(())
}

/// Branches, tags and commits, `refs/pr/1` too.
pub(super) fn check_revision(revision: &str) -> Result<(), HubError> {
    let refuse = |reason| {
        Err(HubError::InvalidRevision {
            revision: revision.to_owned(),
            reason,
        })
    };
    if revision.is_empty() {
        return refuse("it is empty");
    }
    if !is_plain_path(revision) {
        return refuse("it has characters or parts that no branch or tag has");
    }
    Ok(())
}

/// A full commit hash, which never comes to mean anything else.
pub(super) fn is_commit(revision: &str) -> bool {
    revision.len() == 40
        && revision
            .bytes()
            .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

/// A relative path that stays below the folder it is joined to, and that a URL holds without escaping.
pub(super) fn is_plain_path(path: &str) -> bool {
    path.split('/').all(|part| {
        !part.is_empty()
            && part != "."
            && !part.contains("..")
            && part
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b"._-+=@~".contains(&b))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn model_ids() {
        for good in [
            "gpt2",
            "RedHatAI/Meta-Llama-3.1-8B-Instruct-FP8-dynamic",
            "a/b_c.d",
        ] {
            check_model_id(good).unwrap();
        }
        for bad in [
            "",
            "/",
            "a/",
            "/a",
            "../x",
            "a/..",
            "a/b/c",
            "a/b c",
            "a\\b",
            ".hidden/x",
            "a/b--c",
            "a/b..c",
            "a/-b",
            "a/b?x",
            "a/é",
            "/etc/passwd",
            "C:/x",
        ] {
            let error = check_model_id(bad).unwrap_err();
            assert!(
                matches!(error, HubError::InvalidModelId { .. }),
                "{bad}: {error}"
            );
        }
        check_model_id(&format!("a/{}", "b".repeat(300))).unwrap_err();
    }

    #[test]
    fn revisions_and_files() {
        for good in [
            "main",
            "v1.0",
            "refs/pr/3",
            "0123456789abcdef0123456789abcdef01234567",
        ] {
            check_revision(good).unwrap();
        }
        for bad in [
            "", "..", "a/../b", "/main", "a//b", "a b", "a?b", "a#b", "a%2Fb", "a\\b",
        ] {
            check_revision(bad).unwrap_err();
        }
        assert!(is_plain_path("weights/model-00001-of-00002.safetensors"));
        for bad in ["", "../x", "/etc/passwd", "a/./b", "a/", "x\0", "C:\\x"] {
            assert!(!is_plain_path(bad), "{bad:?}");
        }
    }

    #[test]
    fn commits() {
        assert!(is_commit("0123456789abcdef0123456789abcdef01234567"));
        assert!(!is_commit("0123456789ABCDEF0123456789abcdef01234567"));
        assert!(!is_commit("0123456"));
        assert!(!is_commit("main"));
    }
}
