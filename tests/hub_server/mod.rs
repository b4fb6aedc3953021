//! A small hub on 127.0.0.1: the routes, headers and redirects that a hub's client relies on, and faults on request.
//!
//! `/api/models/{id}/revision/{revision}` lists a commit; `/{id}/resolve/{revision}/{file}` sends safetensors on to `/cdn/…`
//! with an absolute address and other files to `/api/resolve-cache/…` with a relative one, as the public hub does. One request a connection. The server ends when it is
//! dropped, after a minute, or after 400 requests, whichever comes first.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const MAX_REQUESTS: usize = 400;
const MAX_LIFE: Duration = Duration::from_secs(60);

/// What goes wrong with one file's content. Probes (`bytes=0-0`) are always answered as they should be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Fault {
    /// The first reply breaks off after this many bytes.
    DropOnce(usize),
    /// Every reply breaks off after this many bytes; 0: at once.
    DropAlways(usize),
    /// The first reply breaks off after this many bytes, and `Range` is ignored afterwards: 200 and the whole file.
    DropOnceThenIgnoreRange(usize),
    /// The first reply breaks off after `.0` bytes, the second ignores `Range` and breaks off after `.1`.
    DropThenRepeat(usize, usize),
    /// Every reply has 7 bytes too many.
    TooLong,
    /// Every reply ends properly after this many bytes, short of what the probe promised.
    ShortAlways(usize),
    /// Listed, but 404.
    Missing,
    /// 503 for the first two requests.
    Busy,
    /// The content takes this many milliseconds.
    Slow(u64),
    /// The content waits (up to 5 s) until this many contents are being sent at the same time.
    WaitForOthers(usize),
}

/// One request, as it came.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) path: String,
    /// The first byte asked for.
    pub(crate) range: Option<usize>,
    /// `bytes=0-0`: asks for headers only.
    pub(crate) probe: bool,
    pub(crate) token: Option<String>,
}

struct Commit {
    hash: String,
    files: BTreeMap<String, Vec<u8>>,
}

#[derive(Default)]
struct State {
    model_id: String,
    commits: Vec<Commit>,
    revisions: BTreeMap<String, String>,
    token: Option<String>,
    gated: bool,
    faults: BTreeMap<String, Fault>,
    sent: BTreeMap<String, usize>,
    requests: Vec<Request>,
    in_flight: usize,
    max_in_flight: usize,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    stop: AtomicBool,
}

/// A hub with one repository.
pub(crate) struct HubServer {
    endpoint: String,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl HubServer {
    pub(crate) fn start(model_id: &str) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        listener.set_nonblocking(true).unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                model_id: model_id.to_owned(),
                ..State::default()
            }),
            changed: Condvar::new(),
            stop: AtomicBool::new(false),
        });
        let thread = std::thread::spawn({
            let (shared, endpoint) = (shared.clone(), endpoint.clone());
            move || accept(&listener, &shared, &endpoint)
        });
        Self {
            endpoint,
            shared,
            thread: Some(thread),
        }
    }

    pub(crate) fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// Makes `revision` a new commit with these files; its hash is returned.
    pub(crate) fn publish(&self, revision: &str, files: &[(&str, &[u8])]) -> String {
        let mut state = self.shared.state.lock().unwrap();
        let hash = format!("{:040x}", 0xc0ffee + state.commits.len());
        state.commits.push(Commit {
            hash: hash.clone(),
            files: files
                .iter()
                .map(|(name, bytes)| ((*name).to_owned(), bytes.to_vec()))
                .collect(),
        });
        state.revisions.insert(revision.to_owned(), hash.clone());
        hash
    }

    pub(crate) fn fault(&self, file: &str, fault: Fault) {
        let mut state = self.shared.state.lock().unwrap();
        state.faults.insert(file.to_owned(), fault);
    }

    /// Answers 401 to whoever does not send this token.
    pub(crate) fn require_token(&self, token: &str) {
        self.shared.state.lock().unwrap().token = Some(token.to_owned());
    }

    /// Answers 403 for every file.
    pub(crate) fn gate(&self) {
        self.shared.state.lock().unwrap().gated = true;
    }

    pub(crate) fn requests(&self) -> Vec<Request> {
        self.shared.state.lock().unwrap().requests.clone()
    }

    /// Requests for a file's content, probes left out, in order.
    pub(crate) fn downloads(&self, file: &str) -> Vec<Request> {
        let end = format!("/{file}");
        let content =
            |r: &Request| !r.probe && !r.path.starts_with("/api/") && r.path.ends_with(&end);
        // A redirected file is asked for twice: the one on the CDN brings the bytes.
        let redirected = file.ends_with(".safetensors");
        let requests = self.requests();
        let counted = requests
            .iter()
            .filter(|r| content(r) && (!redirected || r.path.starts_with("/cdn/")));
        counted.cloned().collect()
    }

    /// How many contents were being sent at the same time, at most.
    pub(crate) fn max_in_flight(&self) -> usize {
        self.shared.state.lock().unwrap().max_in_flight
    }
}

impl Drop for HubServer {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A panic there has failed the test already: its request got no answer.
            let _ = thread.join();
        }
    }
}

fn accept(listener: &TcpListener, shared: &Arc<Shared>, endpoint: &str) {
    let end = Instant::now() + MAX_LIFE;
    let mut connections = 0;
    while !shared.stop.load(Ordering::Relaxed) && Instant::now() < end && connections < MAX_REQUESTS
    {
        let Ok((stream, _)) = listener.accept() else {
            std::thread::sleep(Duration::from_millis(2));
            continue;
        };
        connections += 1;
        let (shared, endpoint) = (shared.clone(), endpoint.to_owned());
        std::thread::spawn(move || {
            // The client's side of a broken connection is what the tests look at.
            let _ = serve(stream, &shared, &endpoint);
        });
    }
}

struct Reply {
    status: &'static str,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
    /// Break off after this many bytes of the body.
    cut: Option<usize>,
}

impl Reply {
    fn error(status: &'static str) -> Self {
        Self {
            status,
            headers: Vec::new(),
            body: status.as_bytes().to_vec(),
            cut: None,
        }
    }
}

fn serve(stream: TcpStream, shared: &Shared, endpoint: &str) -> std::io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    stream.set_write_timeout(Some(Duration::from_secs(5)))?;
    let request = read_request(&stream)?;
    let reply = {
        let mut state = shared.state.lock().unwrap();
        state.requests.push(request.clone());
        answer(&mut state, &request, endpoint)
    };
    let content = request.path.starts_with("/cdn/") && !request.probe;
    if content {
        begin_content(shared, &request);
    }
    let result = write_reply(&stream, &reply);
    if content {
        shared.state.lock().unwrap().in_flight -= 1;
    }
    result
}

fn begin_content(shared: &Shared, request: &Request) {
    let mut state = shared.state.lock().unwrap();
    state.in_flight += 1;
    state.max_in_flight = state.max_in_flight.max(state.in_flight);
    shared.changed.notify_all();
    let file = request.path.rsplit('/').next().unwrap();
    match state.faults.get(file).copied() {
        Some(Fault::WaitForOthers(count)) => {
            let enough = |state: &mut State| state.max_in_flight < count;
            let wait = Duration::from_secs(5);
            drop(
                shared
                    .changed
                    .wait_timeout_while(state, wait, enough)
                    .unwrap(),
            );
        }
        Some(Fault::Slow(ms)) => {
            drop(state);
            std::thread::sleep(Duration::from_millis(ms));
        }
        _ => {}
    }
}

fn read_request(stream: &TcpStream) -> std::io::Result<Request> {
    // A request has a few short lines; whatever is longer is cut.
    let mut lines = BufReader::new(stream.take(16 << 10));
    let mut line = String::new();
    lines.read_line(&mut line)?;
    let path = line.split(' ').nth(1).unwrap_or_default().to_owned();
    let (mut range, mut probe, mut token) = (None, false, None);
    loop {
        line.clear();
        if lines.read_line(&mut line)? == 0 || line.trim().is_empty() {
            break;
        }
        let Some((name, value)) = line.split_once(':') else {
            continue;
        };
        let value = value.trim();
        if name.eq_ignore_ascii_case("range") {
            probe = value == "bytes=0-0";
            let start = value
                .strip_prefix("bytes=")
                .and_then(|r| r.split('-').next());
            range = start.and_then(|start| start.parse().ok());
        } else if name.eq_ignore_ascii_case("authorization") {
            token = value.strip_prefix("Bearer ").map(str::to_owned);
        }
    }
    Ok(Request {
        path,
        range,
        probe,
        token,
    })
}

fn write_reply(mut stream: &TcpStream, reply: &Reply) -> std::io::Result<()> {
    let mut head = format!("HTTP/1.1 {}\r\nConnection: close\r\n", reply.status);
    head.push_str(&format!("Content-Length: {}\r\n", reply.body.len()));
    for (name, value) in &reply.headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    head.push_str("\r\n");
    stream.write_all(head.as_bytes())?;
    let end = reply
        .cut
        .map_or(reply.body.len(), |cut| cut.min(reply.body.len()));
    stream.write_all(&reply.body[..end])?;
    stream.flush()?;
    stream.shutdown(std::net::Shutdown::Both)
}

fn answer(state: &mut State, request: &Request, endpoint: &str) -> Reply {
    if let Some(path) = request.path.strip_prefix("/cdn/") {
        // The CDN's links are signed: it asks for no token.
        let Some((hash, file)) = path.split_once('/') else {
            return Reply::error("404 Not Found");
        };
        return content(state, hash, file, request);
    }
    if state.token.is_some() && request.token != state.token {
        return Reply::error("401 Unauthorized");
    }
    let api = format!("/api/models/{}/revision/", state.model_id);
    if let Some(revision) = request.path.strip_prefix(&api) {
        return list(state, revision);
    }
    let cached = format!("/api/resolve-cache/models/{}/", state.model_id);
    if let Some((hash, file)) = request
        .path
        .strip_prefix(&cached)
        .and_then(|path| path.split_once('/'))
    {
        return content(state, hash, file, request);
    }
    let resolve = format!("/{}/resolve/", state.model_id);
    let Some((revision, file)) = request
        .path
        .strip_prefix(&resolve)
        .and_then(|path| path.split_once('/'))
    else {
        return Reply::error("404 Not Found");
    };
    if state.gated {
        return Reply::error("403 Forbidden");
    }
    let Some(commit) = find(state, revision) else {
        return Reply::error("404 Not Found");
    };
    let hash = commit.hash.clone();
    let Some(bytes) = commit.files.get(file) else {
        return Reply::error("404 Not Found");
    };
    let (etag, size) = (etag(bytes), bytes.len());
    if state.faults.get(file) == Some(&Fault::Missing) {
        return Reply::error("404 Not Found");
    }
    if !file.ends_with(".safetensors") {
        return Reply {
            status: "307 Temporary Redirect",
            headers: vec![
                ("Location", format!("{cached}{hash}/{file}")),
                ("X-Repo-Commit", hash),
            ],
            body: Vec::new(),
            cut: None,
        };
    }
    Reply {
        status: "302 Found",
        headers: vec![
            ("Location", format!("{endpoint}/cdn/{hash}/{file}")),
            ("X-Repo-Commit", hash),
            ("X-Linked-Etag", format!("\"{etag}\"")),
            ("X-Linked-Size", size.to_string()),
            // Of the redirect itself, not of the content.
            ("ETag", "\"not-this-one\"".to_owned()),
        ],
        body: Vec::new(),
        cut: None,
    }
}

/// The commit that a revision (with `/` written as `%2F`) or a hash names.
fn find<'a>(state: &'a State, revision: &str) -> Option<&'a Commit> {
    let revision = revision.replace("%2F", "/");
    let hash = state.revisions.get(&revision).unwrap_or(&revision);
    state.commits.iter().find(|commit| commit.hash == *hash)
}

fn list(state: &State, revision: &str) -> Reply {
    let Some(commit) = find(state, revision) else {
        return Reply::error("404 Not Found");
    };
    let names = commit.files.keys();
    let siblings: Vec<_> = names
        .map(|name| serde_json::json!({ "rfilename": name }))
        .collect();
    let listing =
        serde_json::json!({ "id": state.model_id, "sha": commit.hash, "siblings": siblings });
    Reply {
        status: "200 OK",
        headers: vec![("Content-Type", "application/json".to_owned())],
        body: listing.to_string().into_bytes(),
        cut: None,
    }
}

fn content(state: &mut State, hash: &str, file: &str, request: &Request) -> Reply {
    let commit = find(state, hash);
    let Some(bytes) = commit.and_then(|commit| commit.files.get(file).cloned()) else {
        return Reply::error("404 Not Found");
    };
    let fault = state.faults.get(file).copied();
    let count = state.sent.entry(file.to_owned()).or_default();
    if fault == Some(Fault::Busy) && *count < 2 {
        *count += 1;
        return Reply::error("503 Service Unavailable");
    }
    if !request.probe {
        *count += 1;
    }
    let nth = *count;

    let size = bytes.len();
    let mut start = request.range.unwrap_or(0);
    let mut partial = request.range.is_some();
    let mut cut = None;
    match fault {
        _ if request.probe => {}
        Some(Fault::DropOnce(n) | Fault::DropOnceThenIgnoreRange(n)) if nth == 1 => cut = Some(n),
        Some(Fault::DropAlways(n)) => cut = Some(n),
        Some(Fault::DropOnceThenIgnoreRange(_)) => (start, partial) = (0, false),
        Some(Fault::DropThenRepeat(n, _)) if nth == 1 => cut = Some(n),
        Some(Fault::DropThenRepeat(_, n)) if nth == 2 => {
            (start, partial) = (0, false);
            cut = Some(n);
        }
        _ => {}
    }
    if start >= size {
        return Reply {
            headers: vec![("Content-Range", format!("bytes */{size}"))],
            ..Reply::error("416 Range Not Satisfiable")
        };
    }
    let end = if request.probe { start + 1 } else { size };
    let mut body = bytes[start..end].to_vec();
    match fault {
        _ if request.probe => {}
        Some(Fault::TooLong) => body.extend([0; 7]),
        Some(Fault::ShortAlways(n)) => body.truncate(n.saturating_sub(start)),
        _ => {}
    }
    let mut headers = vec![
        ("Accept-Ranges", "bytes".to_owned()),
        ("ETag", format!("\"{}\"", etag(&bytes))),
        ("X-Repo-Commit", hash.to_owned()),
    ];
    if partial {
        headers.push(("Content-Range", format!("bytes {start}-{}/{size}", end - 1)));
    }
    Reply {
        status: if partial {
            "206 Partial Content"
        } else {
            "200 OK"
        },
        headers,
        body,
        cut,
    }
}

/// Names a content; any function of the bytes does (FNV-1a here).
pub(crate) fn etag(bytes: &[u8]) -> String {
    let step = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
    let hash = bytes.iter().fold(0xcbf2_9ce4_8422_2325, step);
    format!("{hash:016x}").repeat(4)
}
