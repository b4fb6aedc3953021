//! What is in the cache is used; offline, nothing else is.

use std::fs;
use std::net::{Ipv4Addr, TcpListener, TcpStream};

use candle_compressed_tensors::hub::{HubError, download};

use crate::fixture::{Folder, MODEL, SHARDS, SINGLE, bytes, fails, says, sharded, single};
use crate::hub_server::{self, HubServer};

#[test]
fn what_is_cached_is_not_downloaded_again() {
    let (server, cache) = (HubServer::start(MODEL), Folder::new());
    let commit = single(&server, &bytes(1, 10_000));
    let options = cache.options(server.endpoint());
    let folder = download(MODEL, None, &options).unwrap();
    let before = server.requests().len();

    // A branch: one request, to see whether it has moved.
    assert_eq!(download(MODEL, None, &options).unwrap(), folder);
    assert_eq!(server.requests().len(), before + 1);
    assert_eq!(server.downloads(SINGLE).len(), 1);
    // A commit cannot move.
    assert_eq!(download(MODEL, Some(&commit), &options).unwrap(), folder);
    assert_eq!(server.requests().len(), before + 1);
}

#[test]
fn a_moved_branch_brings_what_changed_and_links_the_rest() {
    let (server, cache) = (HubServer::start(MODEL), Folder::new());
    let weights = bytes(1, 10_000);
    server.publish("main", &[("config.json", b"{}"), (SINGLE, &weights)]);
    let options = cache.options(server.endpoint());
    let old = download(MODEL, None, &options).unwrap();

    server.publish(
        "main",
        &[("config.json", b"{\"new\": 1}"), (SINGLE, &weights)],
    );
    let new = download(MODEL, None, &options).unwrap();
    assert_ne!(old, new);
    assert_eq!(fs::read(new.join("config.json")).unwrap(), b"{\"new\": 1}");
    assert_eq!(fs::read(new.join(SINGLE)).unwrap(), weights);
    assert_eq!(server.downloads(SINGLE).len(), 1);
    assert_eq!(fs::read(old.join("config.json")).unwrap(), b"{}");
}

#[test]
fn offline_takes_the_cache_and_never_asks() {
    let (server, cache) = (HubServer::start(MODEL), Folder::new());
    let shards = sharded(&server, &SHARDS);
    let mut options = cache.options(server.endpoint());
    options.offline = true;

    // Nothing is there yet.
    let (error, text) = fails(MODEL, None, &options);
    assert!(
        matches!(error, HubError::NotCached { ref file, .. } if file == "config.json"),
        "{error:?}"
    );
    says(
        &text,
        &[
            "offline",
            "config.json of owner/tiny-FP8 at `main`",
            "HF_HUB_OFFLINE",
            "hf download owner/tiny-FP8",
        ],
    );
    assert!(server.requests().is_empty());

    options.offline = false;
    let folder = download(MODEL, None, &options).unwrap();
    let before = server.requests().len();
    options.offline = true;
    assert_eq!(download(MODEL, None, &options).unwrap(), folder);
    let commit = folder.file_name().unwrap().to_str().unwrap();
    assert_eq!(download(MODEL, Some(commit), &options).unwrap(), folder);
    // Another revision was never fetched.
    assert!(matches!(
        fails(MODEL, Some("v1"), &options).0,
        HubError::NotCached { .. }
    ));
    // One shard is gone.
    fs::remove_file(folder.join(&shards[2].0)).unwrap();
    let (error, text) = fails(MODEL, None, &options);
    assert!(
        matches!(error, HubError::NotCached { ref file, .. } if file == SHARDS[2]),
        "{error:?}"
    );
    says(&text, &[SHARDS[2]]);
    assert_eq!(server.requests().len(), before);

    // Online again, only that one is fetched (its content is still among the blobs, so it is linked).
    options.offline = false;
    download(MODEL, None, &options).unwrap();
    assert_eq!(server.downloads(SHARDS[2]).len(), 1);
    // The content is deleted, the link is left: fetched once more.
    fs::remove_file(fs::canonicalize(folder.join(SHARDS[0])).unwrap()).unwrap();
    download(MODEL, None, &options).unwrap();
    assert_eq!(server.downloads(SHARDS[0]).len(), 2);
    assert_eq!(fs::read(folder.join(SHARDS[0])).unwrap(), shards[0].1);
}

/// The address of a port that nobody listens on, and what keeps it from being given to anybody else: it is the near end
/// of a connection.
fn closed_endpoint() -> (String, TcpListener, TcpStream) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let endpoint = format!("http://{}", stream.local_addr().unwrap());
    (endpoint, listener, stream)
}

#[test]
fn a_hub_that_cannot_be_reached() {
    let cache = Folder::new();
    let (endpoint, _listener, _stream) = closed_endpoint();
    let options = cache.options(&endpoint);
    let (error, text) = fails(MODEL, None, &options);
    assert!(matches!(error, HubError::Connection { .. }), "{error:?}");
    says(
        &text,
        &[
            "cannot reach",
            &options.endpoint,
            "refused",
            "HF_ENDPOINT",
            "HF_HUB_OFFLINE=1",
        ],
    );

    // With a complete copy in the cache, that one is used.
    let server = HubServer::start(MODEL);
    single(&server, b"weights");
    let folder = download(MODEL, None, &cache.options(server.endpoint())).unwrap();
    assert_eq!(download(MODEL, None, &options).unwrap(), folder);
    // Not for a revision that was never there.
    let (error, _) = fails(MODEL, Some("v2"), &options);
    assert!(matches!(error, HubError::Connection { .. }), "{error:?}");
}

#[cfg(unix)]
#[test]
fn a_cache_that_cannot_be_written() {
    let (server, cache) = (HubServer::start(MODEL), Folder::new());
    single(&server, b"weights");
    let mut options = cache.options(server.endpoint());
    // A file where the cache's folder should be: no user, not even root, can make a folder below it.
    options.cache_dir = cache.0.join("file");
    fs::write(&options.cache_dir, b"").unwrap();
    let (error, text) = fails(MODEL, None, &options);
    assert!(matches!(error, HubError::Disk { .. }), "{error:?}");
    says(&text, &["cannot use the cache at", "free space", "HF_HOME"]);
}

#[cfg(unix)]
#[test]
fn a_lock_that_another_program_holds() {
    let (server, cache) = (HubServer::start(MODEL), Folder::new());
    let weights = bytes(11, 500);
    single(&server, &weights);
    let blobs = cache.0.join("models--owner--tiny-FP8/blobs");
    fs::create_dir_all(&blobs).unwrap();
    let path = blobs
        .join(hub_server::etag(&weights))
        .with_extension("lock");
    let lock = fs::File::create(&path).unwrap();
    lock.lock().unwrap();
    let options = cache.options(server.endpoint());
    let (error, text) = fails(MODEL, None, &options);
    assert!(
        matches!(error, HubError::Locked { ref file, .. } if file == SINGLE),
        "{error:?}"
    );
    says(
        &text,
        &[
            SINGLE,
            "another program",
            path.to_str().unwrap(),
            "run again",
        ],
    );
    lock.unlock().unwrap();
    download(MODEL, None, &options).unwrap();
}
