//! What is downloaded, from where, and how many files at a time.

use std::collections::BTreeSet;
use std::fs;

use candle_compressed_tensors::hub::{HubError, download};

use crate::fixture::{
    Folder, INDEX, MODEL, SHARDS, SINGLE, bytes, fails, index, says, sharded, single,
};
use crate::hub_server::{self, Fault, HubServer};

#[test]
fn a_single_file_checkpoint_with_what_belongs_to_it() {
    let (server, cache) = (HubServer::start(MODEL), Folder::new());
    let weights = bytes(1, 100_000);
    let commit = single(&server, &weights);

    let folder = download(MODEL, None, &cache.options(server.endpoint())).unwrap();

    assert_eq!(
        folder,
        cache
            .0
            .join("models--owner--tiny-FP8/snapshots")
            .join(&commit)
    );
    assert_eq!(fs::read(folder.join(SINGLE)).unwrap(), weights);
    let names = fs::read_dir(&folder)
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap());
    let expected = [
        "chat_template.jinja",
        "config.json",
        SINGLE,
        "tokenizer.json",
        "tokenizer_config.json",
    ];
    assert_eq!(
        names.collect::<BTreeSet<_>>(),
        expected.map(str::to_owned).into()
    );
    // The layout of every hub tool: a ref, and links to blobs named by their content.
    let repo = cache.0.join("models--owner--tiny-FP8");
    assert_eq!(fs::read_to_string(repo.join("refs/main")).unwrap(), commit);
    assert_eq!(
        fs::canonicalize(folder.join(SINGLE)).unwrap(),
        fs::canonicalize(repo.join("blobs").join(hub_server::etag(&weights))).unwrap()
    );
    // The configuration is the first file asked for: a wrong repository shows before any weight is downloaded.
    let requests = server.requests();
    assert!(
        requests[0]
            .path
            .starts_with("/api/models/owner/tiny-FP8/revision/main")
    );
    assert!(requests[1].path.ends_with("/config.json"), "{requests:?}");
    // Everything comes from the commit, not from a branch that may move.
    assert!(
        requests[1..].iter().all(|r| r.path.contains(&commit)),
        "{requests:?}"
    );
}

#[test]
fn shards_are_downloaded_at_the_same_time() {
    let (server, cache) = (HubServer::start(MODEL), Folder::new());
    let shards = sharded(&server, &SHARDS);
    for shard in SHARDS {
        server.fault(shard, Fault::WaitForOthers(2));
    }
    let folder = download(MODEL, None, &cache.options(server.endpoint())).unwrap();
    for (name, content) in &shards {
        assert_eq!(fs::read(folder.join(name)).unwrap(), *content, "{name}");
        assert_eq!(server.downloads(name).len(), 1, "{name}");
    }
    assert!(server.max_in_flight() >= 2);
}

#[test]
fn two_files_with_one_content_are_downloaded_once() {
    let (server, cache) = (HubServer::start(MODEL), Folder::new());
    let (index, weights) = (index(&SHARDS[..2]), bytes(2, 20_000));
    server.publish(
        "main",
        &[
            ("config.json", b"{}"),
            (INDEX, &index),
            (SHARDS[0], &weights),
            (SHARDS[1], &weights),
        ],
    );
    let folder = download(MODEL, None, &cache.options(server.endpoint())).unwrap();
    for shard in &SHARDS[..2] {
        assert_eq!(fs::read(folder.join(shard)).unwrap(), weights, "{shard}");
    }
    assert_eq!(
        server.downloads(SHARDS[0]).len() + server.downloads(SHARDS[1]).len(),
        1
    );
}

#[test]
fn one_connection_downloads_one_shard_at_a_time() {
    let (server, cache) = (HubServer::start(MODEL), Folder::new());
    sharded(&server, &SHARDS);
    for shard in SHARDS {
        server.fault(shard, Fault::Slow(100));
    }
    let mut options = cache.options(server.endpoint());
    options.connections = 1;
    download(MODEL, None, &options).unwrap();
    assert_eq!(server.max_in_flight(), 1);
}

#[test]
fn branches_tags_and_commits() {
    let (server, cache) = (HubServer::start(MODEL), Folder::new());
    let options = cache.options(server.endpoint());
    let mut commits = Vec::new();
    for (i, revision) in ["main", "v1.0", "refs/pr/1"].into_iter().enumerate() {
        commits.push(server.publish(
            revision,
            &[("config.json", b"{}"), (SINGLE, &bytes(i as u32 + 7, 500))],
        ));
    }
    let commit = commits[1].clone();
    for (i, revision) in [
        (1, "v1.0"),
        (2, "refs/pr/1"),
        (0, "main"),
        (1, commit.as_str()),
    ] {
        let folder = download(MODEL, Some(revision), &options).unwrap();
        assert!(folder.ends_with(&commits[i]), "{revision}");
        assert_eq!(
            fs::read(folder.join(SINGLE)).unwrap(),
            bytes(i as u32 + 7, 500),
            "{revision}"
        );
    }
    let (error, text) = fails(MODEL, Some("v9"), &options);
    assert!(matches!(error, HubError::RevisionNotFound { ref revision, .. } if revision == "v9"));
    says(
        &text,
        &[
            "owner/tiny-FP8 has no revision `v9`",
            "/owner/tiny-FP8/tree/main",
        ],
    );
}
