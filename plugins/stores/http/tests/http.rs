//! The store on the bench, with a server that the test plays: what it asks for, and what it makes of every answer.
//!
//! Long for the servers that it plays.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::cell::RefCell;
use std::rc::Rc;

use tenon_sdk::store::{Error, Level, Operation, StoreError};
use tenon_store_http::Http;
use tenon_store_http::response::Head;
use tenon_store_http::url::Url;
use tenon_testkit::suite::store;
use tenon_testkit::{StoreBench, StoreChecks};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

/// A server with one image, and what is wrong with it.
struct Server {
    image: Vec<u8>,
    etag: Option<String>,
    modified: Option<String>,
    /// Gives whole files only.
    whole: bool,
    /// Answers so, instead of with the image, as long as there are any.
    instead: Vec<Vec<u8>>,
    /// Ends each connection after a response, saying so or not.
    closes: bool,
    says_so: bool,
    /// Cuts the connection so many bytes into each response, as often as this.
    cut: Option<(usize, u32)>,
    /// What was asked for: the first and last byte.
    ranges: Vec<(u64, u64)>,
    /// How many connections there were.
    connections: u32,
}

type Shared = Rc<RefCell<Server>>;

fn image(length: u64) -> Vec<u8> {
    (0..length).map(|n| u8::try_from((n / 512 * 31 + n % 512) % 251).unwrap()).collect()
}

fn server(length: u64) -> Shared {
    Rc::new(RefCell::new(Server {
        image: image(length),
        etag: Some("\"one\"".into()),
        modified: Some("Mon, 23 Nov 2026 10:00:00 GMT".into()),
        whole: false,
        instead: Vec::new(),
        closes: false,
        says_so: true,
        cut: None,
        ranges: Vec::new(),
        connections: 0,
    }))
}

impl Server {
    fn answer(&mut self, request: &str) -> Vec<u8> {
        let field = |name: &str| {
            request
                .split("\r\n")
                .find_map(|line| Some(line.strip_prefix(name)?.strip_prefix(": ")?.to_owned()))
        };
        assert!(
            request.starts_with("GET /a/disk.img HTTP/1.1\r\nHost: images.example:8080\r\n"),
            "{request}"
        );
        if let Some(answer) = self.instead.pop() {
            return answer;
        }
        let mut fields = String::new();
        if let Some(etag) = &self.etag {
            fields += &format!("ETag: {etag}\r\n");
        }
        if let Some(modified) = &self.modified {
            fields += &format!("last-modified:{modified}\r\n");
        }
        if self.closes && self.says_so {
            fields += "Connection: close\r\n";
        }
        let range = field("Range").unwrap();
        let (first, last) = range.strip_prefix("bytes=").unwrap().split_once('-').unwrap();
        let (first, last): (u64, u64) = (first.parse().unwrap(), last.parse().unwrap());
        let current =
            field("If-Range").is_none_or(|name| Some(&name) == self.etag.as_ref().or(self.modified.as_ref()));
        let length = self.image.len() as u64;
        if self.whole || !current {
            let mut answer =
                format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n{fields}\r\n").into_bytes();
            answer.extend(&self.image);
            return answer;
        }
        if first >= length {
            return b"HTTP/1.1 416 Range Not Satisfiable\r\nContent-Length: 0\r\n\r\n".to_vec();
        }
        let last = last.min(length - 1);
        self.ranges.push((first, last));
        let data = &self.image[usize::try_from(first).unwrap()..=usize::try_from(last).unwrap()];
        let mut answer = format!(
            "HTTP/1.1 206 Partial Content\r\nContent-Length: {}\r\nContent-Range: bytes {first}-{last}/{length}\r\n{fields}\r\n",
            data.len()
        )
        .into_bytes();
        answer.extend(data);
        answer
    }
}

const URL: &str = "http://images.example:8080/a/disk.img";

fn prepare(settings: &[(&str, &str)], server: &Shared) -> StoreBench<Http> {
    let settings = [&[("url", URL)], settings].concat();
    let mut bench = StoreBench::prepare(&settings, Vec::new());
    let server = server.clone();
    bench.serve("images.example", 8080, move || {
        server.borrow_mut().connections += 1;
        let server = server.clone();
        let mut ended = false;
        move |request: &[u8]| {
            let server = &mut *server.borrow_mut();
            // The bench takes silence for a server that does not answer.
            if ended {
                return Vec::new();
            }
            let mut answer = server.answer(std::str::from_utf8(request).unwrap());
            ended = server.closes;
            if let Some((bytes, times)) = &mut server.cut
                && *times > 0
            {
                *times -= 1;
                answer.truncate(*bytes);
                ended = true;
            }
            answer
        }
    });
    bench
}

fn open(settings: &[(&str, &str)], server: &Shared) -> Result<StoreBench<Http>, Error> {
    prepare(settings, server).opened()
}

fn refusal(server: &Shared) -> String {
    match open(&[], server) {
        Ok(_) => panic!("the store was opened"),
        Err(error) => error.to_string(),
    }
}

fn answer(head: &str) -> Vec<u8> {
    format!("{head}\r\n\r\n").into_bytes()
}

#[test]
fn it_is_a_store_that_cannot_be_written() {
    let mut bench = open(&[], &server(3 * MIB)).unwrap();
    store(&mut bench, StoreChecks::default()).unwrap();
    assert!(bench.info().read_only);
}

#[test]
fn every_byte_is_that_of_the_image_and_zeroes_fill_the_last_block() {
    for length in [1, 511, 512, 513, 64 * KIB, 64 * KIB + 1, 3 * MIB + 700] {
        for settings in [&[][..], &[("cache", "0")], &[("cache", "128K"), ("read-ahead", "0")]] {
            let server = server(length);
            let mut bench = open(settings, &server).unwrap();
            let size = length.next_multiple_of(512);
            assert_eq!(bench.info().size, size);
            let mut right = image(length);
            right.resize(usize::try_from(size).unwrap(), 0);
            let mut data = Vec::new();
            while (data.len() as u64) < size {
                let at = data.len() as u64;
                data.extend(bench.read(at, (size - at).min(700 * 512)).unwrap());
            }
            assert!(data == right, "{length} bytes");
            let last = size - 512;
            assert!(bench.read(last, 512).unwrap() == right[usize::try_from(last).unwrap()..]);
        }
    }
}

#[test]
fn one_connection_serves_everything_and_nothing_is_fetched_twice() {
    let server = server(4 * MIB);
    let mut bench = open(&[("read-ahead", "0")], &server).unwrap();
    for _ in 0..3 {
        for at in [0, 4096, 100 * KIB, 2 * MIB, 3 * MIB + 512] {
            bench.read(at, 8192).unwrap();
        }
    }
    let server = server.borrow();
    assert_eq!(server.connections, 1);
    let piece = |n: u64| (n * 64 * KIB, (n + 1) * 64 * KIB - 1);
    assert_eq!(server.ranges, [piece(0), piece(1), piece(32), piece(48)]);
    assert_eq!(bench.connections(), 1);
}

#[test]
fn the_cache_is_bounded_and_keeps_what_was_used_last() {
    let server = server(4 * MIB);
    let mut bench = open(&[("cache", "256KiB"), ("read-ahead", "0")], &server).unwrap();
    let mut fetched = |piece: u64| {
        let before = server.borrow().ranges.len();
        bench.read(piece * 64 * KIB, 512).unwrap();
        server.borrow().ranges.len() > before
    };
    let misses: Vec<u64> = [1, 2, 3, 0, 4, 0, 1, 4, 2].into_iter().filter(|piece| fetched(*piece)).collect();
    assert_eq!(misses, [1, 2, 3, 4, 1, 2]);
}

#[test]
fn pieces_that_lie_together_are_asked_for_together() {
    let server = server(8 * MIB);
    let mut bench = open(&[("read-ahead", "0")], &server).unwrap();
    let read = |at: u64| Operation::Read { position: at, length: 4 * KIB };
    let batch = vec![read(70 * KIB), read(2 * MIB), read(130 * KIB), read(2 * MIB - 4 * KIB), read(5 * MIB)];
    assert!(bench.submit(batch).iter().all(Result::is_ok));
    assert_eq!(
        server.borrow().ranges[1..],
        [
            (64 * KIB, 192 * KIB - 1),
            (2 * MIB - 64 * KIB, 2 * MIB + 64 * KIB - 1),
            (5 * MIB, 5 * MIB + 64 * KIB - 1)
        ]
    );
    bench.read(6 * MIB, MIB).unwrap();
    assert_eq!(server.borrow().ranges.last(), Some(&(6 * MIB, 7 * MIB - 1)));
}

#[test]
fn a_reader_that_goes_on_is_read_ahead_of() {
    let server = server(8 * MIB);
    let mut bench = open(&[("read-ahead", "512KiB")], &server).unwrap();
    for at in 0..1024 {
        bench.read(at * 4 * KIB, 4 * KIB).unwrap();
    }
    let count = server.borrow().ranges.len();
    assert!((7..=9).contains(&count), "{count} requests for 4 MiB");
    // One that jumps is not.
    let before = server.borrow().ranges.len();
    bench.read(7 * MIB, 4 * KIB).unwrap();
    assert_eq!(server.borrow().ranges[before..], [(7 * MIB, 7 * MIB + 64 * KIB - 1)]);
}

#[test]
fn a_changed_image_is_never_mixed_with_the_old_one() {
    type Change = fn(&mut Server);
    let changes: [(&str, Change); 5] = [
        ("another ETag", |server| server.etag = Some("\"two\"".into())),
        ("another time", |server| {
            server.etag = None;
            server.modified = Some("Mon, 23 Nov 2026 10:00:01 GMT".into());
        }),
        ("no name any more", |server| (server.etag, server.modified) = (None, None)),
        ("gone", |server| server.instead = vec![answer("HTTP/1.1 404 Not Found\r\nContent-Length: 0"); 9]),
        ("shorter", |server| server.image.truncate(100)),
    ];
    for (name, change) in changes {
        let server = server(4 * MIB);
        let mut bench = open(&[], &server).unwrap();
        bench.read(0, 4096).unwrap();
        let before = bench.save().unwrap();
        server.borrow_mut().image.fill(0xee);
        change(&mut server.borrow_mut());
        assert_eq!(bench.read(2 * MIB, 4096), Err(StoreError::Io), "{name}");
        // Also when the old image comes back: the guest may have been told of the failure.
        *server.borrow_mut() = Rc::into_inner(self::server(4 * MIB)).unwrap().into_inner();
        assert_eq!(bench.read(3 * MIB, 4096), Err(StoreError::Io), "{name}");
        let log = bench.take_log();
        assert_eq!(log.iter().filter(|(level, _)| *level == Level::Error).count(), 1, "{name}: {log:?}");
        // A new instance does not take the new image for the old one.
        server.borrow_mut().etag = Some("\"three\"".into());
        assert!(bench.restart_with(&before).unwrap_err().to_string().contains("was changed"), "{name}");
    }
}

#[test]
fn a_restarted_store_goes_on_with_the_same_image() {
    let server = server(4 * MIB);
    let mut bench = open(&[], &server).unwrap();
    bench.restart().unwrap();
    assert_eq!(bench.read(MIB, 512).unwrap(), image(2 * MIB)[1 << 20..(1 << 20) + 512]);
}

#[test]
fn a_server_that_names_no_version_is_believed_while_the_length_stays() {
    let server = server(4 * MIB);
    (server.borrow_mut().etag, server.borrow_mut().modified) = (Some("W/\"weak\"".into()), None);
    let mut bench = open(&[], &server).unwrap();
    assert!(bench.take_log().iter().any(|(level, text)| *level == Level::Warn && text.contains("unnoticed")));
    bench.read(MIB, 512).unwrap();
    server.borrow_mut().image.truncate(3 << 20);
    assert_eq!(bench.read(2 * MIB, 512), Err(StoreError::Io));
}

#[test]
fn connections_that_break_are_made_anew() {
    for cut in [0, 1, 20, 150, 5000, 65_600] {
        let server = server(4 * MIB);
        let mut bench = open(&[], &server).unwrap();
        for n in 1..8 {
            server.borrow_mut().cut = Some((cut, 2));
            let data = bench.read(n * 512 * KIB, 4096).unwrap();
            assert_eq!(
                data,
                image(4 * MIB)[usize::try_from(n * 512 * KIB).unwrap()..][..4096],
                "cut at {cut}"
            );
            assert_eq!(server.borrow().cut, Some((cut, 0)), "the fault has fired");
        }
    }
}

#[test]
fn a_server_that_ends_each_connection_is_served_well() {
    for says_so in [true, false] {
        let server = server(4 * MIB);
        (server.borrow_mut().closes, server.borrow_mut().says_so) = (true, says_so);
        let mut bench = open(&[], &server).unwrap();
        for n in 1..8 {
            bench.read(n * 512 * KIB, 4096).unwrap();
        }
        assert_eq!(server.borrow().connections, 8, "{says_so}");
        assert_eq!(bench.now(), 0, "nobody waited");
    }
}

#[test]
fn a_server_in_trouble_is_asked_again_at_growing_intervals_and_not_for_good() {
    let server = server(4 * MIB);
    let mut bench = open(&[("retries", "4")], &server).unwrap();
    let busy = || answer("HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0");
    server.borrow_mut().instead = vec![busy(); 4];
    // The first comes on a kept connection, and is asked for again at once.
    bench.read(MIB, 512).unwrap();
    assert_eq!(bench.now(), 700_000_000);

    bench.set_down(true);
    let before = bench.now();
    assert_eq!(bench.read(2 * MIB, 512), Err(StoreError::Io));
    assert_eq!(bench.now() - before, 1_500_000_000);
    // What is in the cache is still there, and the rest comes back with the server.
    bench.read(MIB, 512).unwrap();
    bench.set_down(false);
    bench.read(2 * MIB, 512).unwrap();
}

#[test]
fn what_cannot_serve_a_store_is_refused_in_words() {
    let whole = server(MIB);
    whole.borrow_mut().whole = true;
    assert!(refusal(&whole).contains("whole files only"));
    assert!(refusal(&server(0)).contains("the image is empty"));
    for (head, says) in [
        ("HTTP/1.1 302 Found\r\nLocation: http://other.example/x", "is at http://other.example/x: give that"),
        ("HTTP/1.1 401 Unauthorized\r\nContent-Length: 0", "does not let us (status 401)"),
        ("HTTP/1.1 404 Not Found", "there is no such image"),
        ("HTTP/1.1 418 I'm a teapot", "status 418"),
        ("HTTP/1.1 500 Oh\r\n", "in trouble (status 500)"),
        ("SSH-2.0-OpenSSH_9.2", "does not speak HTTP"),
        ("HTTP/2 206", "does not speak HTTP/1.1"),
        ("HTTP/1.1 206 Partial Content\r\nContent-Length: 65536", "no range"),
        ("HTTP/1.1 206 P\r\nContent-Length: 65536\r\nContent-Range: bytes 1-65536/1048576", "another range"),
        ("HTTP/1.1 206 P\r\nContent-Length: 5\r\nContent-Range: bytes 0-65535/1048576", "another length"),
        (
            "HTTP/1.1 206 P\r\nContent-Length: 65536\r\nContent-Range: bytes 0-65535/18446744073709551616",
            "range that is none",
        ),
        ("HTTP/1.1 206 P\r\nTransfer-Encoding: chunked\r\nContent-Range: bytes 0-65535/1048576", "in chunks"),
        (
            "HTTP/1.1 206 P\r\nContent-Length: 65536\r\nContent-Encoding: gzip\r\nContent-Range: bytes 0-65535/1048576",
            "compressed",
        ),
    ] {
        let server = server(MIB);
        server.borrow_mut().instead = vec![answer(head); 20];
        let text = refusal(&server);
        assert!(text.contains(says) && text.contains("images.example:8080/a/disk.img"), "{head}: {text}");
    }
    let endless = server(MIB);
    endless.borrow_mut().instead = vec![[b"HTTP/1.1 206 P\r\nX: ".to_vec(), vec![b'x'; 20_000]].concat(); 20];
    assert!(refusal(&endless).contains("longer than 16384"));
    let mut bench = StoreBench::<Http>::prepare(&[("url", "http://elsewhere.example/x")], Vec::new());
    bench.serve("images.example", 8080, || |_: &[u8]| Vec::new());
    let Err(error) = bench.opened() else { panic!("it was opened") };
    assert!(error.to_string().contains("not granted"), "{error}");
}

#[test]
fn settings_that_cannot_be_are_refused() {
    for (settings, says) in [
        (&[][..], "`url` is missing"),
        (&[("url", "images.example/x")], "has no `http://`"),
        (&[("url", "ftp://images.example/x")], "neither of http nor of https"),
        (&[("url", "http:///x")], "no host"),
        (&[("url", "http://a:99999/x")], "a port that is none"),
        (&[("url", "http://a:+80/x")], "a port that is none"),
        (&[("url", "http://me:secret@a/x")], "name or password"),
        (&[("url", "http://a/x\r\nHost: b")], "blanks"),
        (&[("url", URL), ("cache", "1GiB")], "`cache`"),
        (&[("url", URL), ("read-ahead", "2MiB")], "`read-ahead`"),
        (&[("url", URL), ("retries", "1000")], "`retries`"),
    ] {
        let Err(error) = StoreBench::<Http>::new(settings, Vec::new()) else { panic!("{settings:?}") };
        let text = error.to_string();
        assert!(text.contains(says) && !text.contains("secret"), "{settings:?}: {text}");
    }
}

#[test]
fn addresses_are_taken_apart() {
    let url = |text: &str| {
        Url::parse(text).map(|url| (url.host, url.port, url.authority, url.path, url.tls)).unwrap()
    };
    let parts = |host: &str, port, authority: &str, path: &str, tls| {
        (host.to_owned(), port, authority.to_owned(), path.to_owned(), tls)
    };
    assert_eq!(url("http://a.b/c?d=e#f"), parts("a.b", 80, "a.b", "/c?d=e", false));
    assert_eq!(url("HTTPS://a:8443"), parts("a", 8443, "a:8443", "/", true));
    assert_eq!(url("http://[::1]:8080/x:y"), parts("[::1]", 8080, "[::1]:8080", "/x:y", false));
    assert_eq!(url("http://[::1]?x"), parts("[::1]", 80, "[::1]", "/?x", false));
}

#[test]
fn heads_that_come_in_parts_or_are_anything_are_read_or_refused() {
    let whole = b"HTTP/1.1 206 Partial Content\r\nETag: \"x\"\r\ncontent-RANGE: bytes 0-9/100\r\nContent-Length: 10\r\n\r\nbody";
    let (head, length) = Head::parse(whole).unwrap().unwrap();
    assert_eq!(
        (head.status, head.range, head.length, &whole[length..]),
        (206, Some((0, 9, 100)), Some(10), &b"body"[..])
    );
    for end in 0..length {
        assert_eq!(Head::parse(&whole[..end]), Ok(None), "{end}");
    }
    let mut state = 7_u64;
    let mut next = |limit: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(state >> 33).unwrap() % limit
    };
    let (mut read, mut refused) = (0, 0);
    for _ in 0..200_000 {
        let mut bytes = whole.to_vec();
        for _ in 0..next(4) {
            let at = next(bytes.len());
            match next(3) {
                0 => bytes[at] = u8::try_from(next(256)).unwrap(),
                1 => drop(bytes.remove(at)),
                _ => bytes.insert(at, b"\r\n: -/\"9,"[next(9)]),
            }
        }
        match Head::parse(&bytes) {
            Ok(Some((head, length))) => {
                read += 1;
                assert!(length <= bytes.len());
                assert!(head.range.is_none_or(|(first, last, total)| first <= last && last < total));
            }
            Ok(None) => {}
            Err(_) => refused += 1,
        }
    }
    assert!(read > 10_000 && refused > 10_000, "{read} read, {refused} refused");
}

#[test]
fn a_server_that_answers_anything_gives_failures_and_no_wrong_data() {
    let mut state = 99_u64;
    let mut next = |limit: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(state >> 33).unwrap() % limit
    };
    let right = image(256 * KIB);
    let (mut good, mut bad) = (0, 0);
    for _ in 0..600 {
        let server = server(256 * KIB);
        let mut bench = open(&[("retries", "1"), ("read-ahead", "0")], &server).unwrap();
        let head = "HTTP/1.1 206 Partial Content\r\nContent-Length: 65536\r\nContent-Range: bytes 65536-131071/262144\r\nETag: \"one\"\r\nLast-Modified: Mon, 23 Nov 2026 10:00:00 GMT\r\n\r\n";
        let mut bytes = head.as_bytes().to_vec();
        for _ in 0..1 + next(3) {
            let at = next(bytes.len());
            match next(3) {
                0 => bytes[at] = u8::try_from(next(256)).unwrap(),
                1 => drop(bytes.remove(at)),
                _ => bytes.insert(at, b"\r\n: -/\"9,"[next(9)]),
            }
        }
        bytes.extend(&right[65536..131_072]);
        server.borrow_mut().instead = vec![bytes; 9];
        match bench.read(65536, 4096) {
            // Whatever is wrong with the head: what is taken is what the server sent for this range.
            Ok(data) => {
                good += 1;
                assert!(data == right[65536..69632]);
            }
            Err(_) => bad += 1,
        }
    }
    assert!(good > 20 && bad > 100, "{good} good, {bad} bad");
}

#[test]
fn where_a_server_sends_us_is_an_address_to_give() {
    let url = Url::parse("https://example.org:8443/a/image").unwrap();
    for (location, there) in [
        ("http://mirror.example/image", Some("http://mirror.example/image")),
        ("/b/image", Some("https://example.org:8443/b/image")),
        ("file:///etc/passwd", None),
        ("//mirror.example/image", None),
        ("image", None),
        ("", None),
    ] {
        assert_eq!(url.join(location).as_deref(), there, "{location}");
    }
}
