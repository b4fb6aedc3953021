//! Repositories, names and answers that are refused, by variant and text.

use std::fs;

use candle_compressed_tensors::hub::{HubError, download};

use crate::fixture::{
    Folder, INDEX, MODEL, SHARDS, SINGLE, bytes, fails, index, says, sharded, single,
};
use crate::hub_server::{Fault, HubServer};

#[test]
fn a_missing_shard_is_named_before_any_weight_is_downloaded() {
    let listed_but_gone = |server: &HubServer| {
        sharded(server, &SHARDS);
        server.fault(SHARDS[1], Fault::Missing);
    };
    let not_listed = |server: &HubServer| {
        sharded(server, &[SHARDS[0], SHARDS[2]]);
    };
    for (publish, asked) in [
        (&listed_but_gone as &dyn Fn(&HubServer), true),
        (&not_listed, false),
    ] {
        let (server, cache) = (HubServer::start(MODEL), Folder::new());
        publish(&server);
        let (error, text) = fails(MODEL, None, &cache.options(server.endpoint()));
        assert!(
            matches!(error, HubError::MissingShard { ref shard, ref index, .. } if shard == SHARDS[1] && index == INDEX),
            "{error:?}"
        );
        says(
            &text,
            &[
                INDEX,
                "names model-00002-of-00003.safetensors",
                "no such file",
            ],
        );
        let shards = |path: &str| SHARDS.iter().any(|shard| path.ends_with(shard));
        let requests = server.requests();
        // Sizes at most; when the listing lacks the shard, not even those.
        assert!(requests.iter().all(|r| r.probe || !shards(&r.path)));
        assert_eq!(requests.iter().any(|r| shards(&r.path)), asked);
    }
}

#[test]
fn an_index_that_is_none_or_that_leaves_the_folder() {
    let long = index(&["../../../outside.safetensors"]);
    for (content, reason) in [
        (&b"[]"[..], "no object `weight_map`"),
        (b"{", "not JSON"),
        (b"{\"weight_map\": {}}", "is empty"),
        (b"{\"weight_map\": {\"w\": 3}}", "no file name for `w`"),
        (&long, "../../../outside.safetensors"),
    ] {
        let (server, cache) = (HubServer::start(MODEL), Folder::new());
        server.publish(
            "main",
            &[
                ("config.json", b"{}"),
                (INDEX, content),
                ("../../../outside.safetensors", b"x"),
            ],
        );
        let (error, text) = fails(MODEL, None, &cache.options(server.endpoint()));
        let refused = matches!(
            error,
            HubError::BadIndex { .. } | HubError::UnsafeName { .. }
        );
        assert!(refused, "{error:?}");
        says(&text, &[reason]);
    }
}

#[test]
fn a_repository_without_safetensors_or_without_configuration() {
    let (server, cache) = (HubServer::start(MODEL), Folder::new());
    server.publish(
        "main",
        &[
            ("config.json", b"{}"),
            ("pytorch_model.bin", b"x"),
            ("README.md", b"x"),
        ],
    );
    let options = cache.options(server.endpoint());
    let (error, text) = fails(MODEL, None, &options);
    assert!(
        matches!(error, HubError::NoSafetensors { ref found, .. } if found == &["pytorch_model.bin"]),
        "{error:?}"
    );
    says(
        &text,
        &[
            "no safetensors weights",
            "it has pytorch_model.bin",
            "Choose a repository",
        ],
    );

    server.publish("data", &[(SINGLE, b"x")]);
    let (error, text) = fails(MODEL, Some("data"), &options);
    assert!(matches!(error, HubError::MissingFile { ref file, .. } if file == "config.json"));
    says(&text, &["owner/tiny-FP8 at `data` has no config.json"]);
}

#[test]
fn a_token_is_asked_for_and_sent() {
    let (server, cache) = (HubServer::start(MODEL), Folder::new());
    let weights = bytes(10, 5_000);
    single(&server, &weights);
    server.require_token("hf_right");
    let mut options = cache.options(server.endpoint());

    let (error, text) = fails(MODEL, None, &options);
    assert!(
        matches!(
            error,
            HubError::Unauthorized {
                had_token: false,
                ..
            }
        ),
        "{error:?}"
    );
    says(&text, &["401", MODEL, "no token was sent", "set HF_TOKEN"]);

    options.token = Some("hf_wrong".to_owned());
    let (error, text) = fails(MODEL, None, &options);
    assert!(
        matches!(
            error,
            HubError::Unauthorized {
                had_token: true,
                ..
            }
        ),
        "{error:?}"
    );
    says(
        &text,
        &["the token that was sent is not valid", "set HF_TOKEN"],
    );
    assert!(!text.contains("hf_wrong"), "{text}");
    // Not retried: a second try gets the same answer.
    assert_eq!(server.requests().len(), 2);

    options.token = Some("hf_right".to_owned());
    let folder = download(MODEL, None, &options).unwrap();
    assert_eq!(fs::read(folder.join(SINGLE)).unwrap(), weights);
}

#[test]
fn a_gated_repository_lists_its_files_and_refuses_them() {
    let (server, cache) = (HubServer::start(MODEL), Folder::new());
    single(&server, b"weights");
    server.gate();
    let mut options = cache.options(server.endpoint());
    options.token = Some("hf_stranger".to_owned());
    let (error, text) = fails(MODEL, None, &options);
    assert!(matches!(error, HubError::Forbidden { .. }), "{error:?}");
    says(
        &text,
        &[
            "403",
            "gated",
            &format!("Accept its terms at {}/{MODEL}", server.endpoint()),
            "HF_TOKEN",
        ],
    );
}

#[test]
fn a_repository_that_is_not_there() {
    let (server, cache) = (HubServer::start(MODEL), Folder::new());
    let options = cache.options(server.endpoint());
    for revision in [None, Some("v1")] {
        let (error, text) = fails("owner/typo", revision, &options);
        assert!(matches!(error, HubError::RepoNotFound { .. }), "{error:?}");
        says(
            &text,
            &[
                "no model `owner/typo`",
                server.endpoint(),
                "Check the spelling",
            ],
        );
    }
}

#[test]
fn names_and_addresses_are_checked_before_anything_is_asked() {
    let (server, cache) = (HubServer::start(MODEL), Folder::new());
    let mut options = cache.options(server.endpoint());
    for id in [
        "",
        "../x",
        "owner/..",
        "/etc/passwd",
        "a/b/c",
        "owner/na me",
        "owner\\name",
    ] {
        let (error, text) = fails(id, None, &options);
        assert!(
            matches!(error, HubError::InvalidModelId { .. }),
            "{id}: {error:?}"
        );
        says(&text, &[&format!("`{id}` is not a model id"), "owner/name"]);
    }
    for revision in ["", "../main", "a b", "main?x=1"] {
        let (error, text) = fails(MODEL, Some(revision), &options);
        assert!(
            matches!(error, HubError::InvalidRevision { .. }),
            "{revision}: {error:?}"
        );
        says(&text, &["is not a revision"]);
    }
    assert!(server.requests().is_empty());
    for endpoint in ["", "huggingface.co", "ftp://hub", "http://", "http://a b"] {
        options.endpoint = endpoint.to_owned();
        let (error, text) = fails(MODEL, None, &options);
        assert!(
            matches!(error, HubError::InvalidEndpoint { .. }),
            "{endpoint}: {error:?}"
        );
        says(&text, &["HF_ENDPOINT"]);
    }
}
