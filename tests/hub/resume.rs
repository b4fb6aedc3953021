//! Connections that break, servers that ignore `Range`, files that never get complete.

use std::fs;

use candle_compressed_tensors::hub::{HubError, download};

use crate::fixture::{Folder, MODEL, SINGLE, bytes, fails, says, single};
use crate::hub_server::{self, Fault, HubServer};

#[test]
fn a_dropped_connection_goes_on_where_it_stopped() {
    let (server, cache) = (HubServer::start(MODEL), Folder::new());
    let weights = bytes(3, 60_000);
    single(&server, &weights);
    server.fault(SINGLE, Fault::DropOnce(25_000));
    let folder = download(MODEL, None, &cache.options(server.endpoint())).unwrap();
    assert_eq!(fs::read(folder.join(SINGLE)).unwrap(), weights);
    let ranges: Vec<_> = server.downloads(SINGLE).iter().map(|r| r.range).collect();
    assert_eq!(ranges, [Some(0), Some(25_000)]);
}

#[test]
fn a_bad_line_that_makes_headway_is_not_given_up() {
    let (server, cache) = (HubServer::start(MODEL), Folder::new());
    let weights = bytes(12, 5_000_000);
    single(&server, &weights);
    server.fault(SINGLE, Fault::DropAlways(1_200_000));
    let mut options = cache.options(server.endpoint());
    options.retries = 1;
    let folder = download(MODEL, None, &options).unwrap();
    assert!(fs::read(folder.join(SINGLE)).unwrap() == weights);
    assert_eq!(server.downloads(SINGLE).len(), 5);
}

#[test]
fn an_interrupted_program_goes_on_where_it_stopped() {
    let (server, cache) = (HubServer::start(MODEL), Folder::new());
    let weights = bytes(4, 60_000);
    single(&server, &weights);
    let options = cache.options(server.endpoint());
    let folder = cache.0.join("models--owner--tiny-FP8/blobs");
    let etag = hub_server::etag(&weights);
    let part = folder.join(&etag).with_extension("part");
    fs::create_dir_all(&folder).unwrap();
    // As a program leaves it that was ended in the middle, and one that was ended just before it renamed the part.
    for (kept, first) in [(&weights[..41_000], 41_000), (&weights[..], 59_999)] {
        fs::write(&part, kept).unwrap();
        let snapshot = download(MODEL, None, &options).unwrap();
        assert_eq!(fs::read(snapshot.join(SINGLE)).unwrap(), weights);
        assert_eq!(server.downloads(SINGLE).last().unwrap().range, Some(first));
        fs::remove_file(folder.join(&etag)).unwrap();
    }
    // Longer than the file: no beginning of it.
    fs::write(&part, [&weights[..], b"more"].concat()).unwrap();
    let snapshot = download(MODEL, None, &options).unwrap();
    assert_eq!(fs::read(snapshot.join(SINGLE)).unwrap(), weights);
    assert_eq!(server.downloads(SINGLE).last().unwrap().range, Some(0));
    assert!(!part.exists());
}

#[test]
fn a_server_that_ignores_range_does_not_spoil_the_file() {
    let (server, cache) = (HubServer::start(MODEL), Folder::new());
    let weights = bytes(5, 60_000);
    single(&server, &weights);
    server.fault(SINGLE, Fault::DropOnceThenIgnoreRange(20_000));
    let folder = download(MODEL, None, &cache.options(server.endpoint())).unwrap();
    assert_eq!(fs::read(folder.join(SINGLE)).unwrap(), weights);
    let ranges: Vec<_> = server.downloads(SINGLE).iter().map(|r| r.range).collect();
    assert_eq!(ranges, [Some(0), Some(20_000), Some(0)]);
}

#[test]
fn a_repeated_beginning_that_breaks_off_does_not_spoil_the_file() {
    let (server, cache) = (HubServer::start(MODEL), Folder::new());
    let weights = bytes(6, 60_000);
    single(&server, &weights);
    // 20,000 bytes, then the first 10,000 again: 30,000 in the part, of which a third is wrong.
    server.fault(SINGLE, Fault::DropThenRepeat(20_000, 10_000));
    let folder = download(MODEL, None, &cache.options(server.endpoint())).unwrap();
    assert!(fs::read(folder.join(SINGLE)).unwrap() == weights);
    let ranges: Vec<_> = server.downloads(SINGLE).iter().map(|r| r.range).collect();
    assert_eq!(ranges, [Some(0), Some(20_000), Some(20_000)]);
}

#[test]
fn a_file_that_never_gets_complete() {
    let weights = bytes(7, 60_000);
    for fault in [Fault::ShortAlways(30_000), Fault::DropAlways(0)] {
        let (server, cache) = (HubServer::start(MODEL), Folder::new());
        single(&server, &weights);
        server.fault(SINGLE, fault);
        let options = cache.options(server.endpoint());
        let (error, text) = fails(MODEL, None, &options);
        let arrived = if fault == Fault::DropAlways(0) {
            0
        } else {
            30_000
        };
        assert!(
            matches!(error, HubError::Truncated { ref file, expected: 60_000, found, attempts: 3, .. }
                if file == SINGLE && found == arrived),
            "{error:?}"
        );
        says(
            &text,
            &[
                SINGLE,
                &format!("{arrived} of 60000 bytes arrived in 3 attempts"),
                "run again to go on",
            ],
        );
        assert_eq!(server.downloads(SINGLE).len(), 3);
        // It did not become a file of the snapshot, and the branch was not recorded.
        let mut offline = options.clone();
        offline.offline = true;
        assert!(matches!(
            fails(MODEL, None, &offline).0,
            HubError::NotCached { .. }
        ));
        assert!(!cache.blobs().contains(&hub_server::etag(&weights)));
    }
}

#[test]
fn a_file_that_is_always_too_long() {
    let (server, cache) = (HubServer::start(MODEL), Folder::new());
    let weights = bytes(8, 5_000);
    single(&server, &weights);
    server.fault(SINGLE, Fault::TooLong);
    let (error, text) = fails(MODEL, None, &cache.options(server.endpoint()));
    assert!(
        matches!(
            error,
            HubError::WrongSize {
                expected: 5_000,
                found: 5_007,
                ..
            }
        ),
        "{error:?}"
    );
    says(
        &text,
        &[
            SINGLE,
            "should have 5000 bytes and the server sent 5007",
            "was deleted",
        ],
    );
    assert_eq!(server.downloads(SINGLE).len(), 2);
    assert!(
        !cache
            .blobs()
            .iter()
            .any(|name| name.starts_with(&hub_server::etag(&weights)))
    );
}

#[test]
fn a_busy_server_is_asked_again() {
    let (server, cache) = (HubServer::start(MODEL), Folder::new());
    let weights = bytes(9, 5_000);
    single(&server, &weights);
    server.fault(SINGLE, Fault::Busy);
    let mut options = cache.options(server.endpoint());
    options.retries = 0;
    let (error, text) = fails(MODEL, None, &options);
    assert!(
        matches!(error, HubError::Status { status: 503, .. }),
        "{error:?}"
    );
    says(&text, &["HTTP status 503", "Wait a while"]);
    options.retries = 2;
    let folder = download(MODEL, None, &options).unwrap();
    assert_eq!(fs::read(folder.join(SINGLE)).unwrap(), weights);
}
