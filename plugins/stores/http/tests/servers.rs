//! The store with servers behind real sockets: one of the standard library's, and those of others where they are installed.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::cell::{Cell, RefCell};
use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tenon_sdk::Store;
use tenon_sdk::store::{Config, ConnectionError, Error, Level, Operation, StoreError, StoreInfo, hosted};
use tenon_store_http::Http;

const LENGTH: usize = (3 << 20) + 700;

fn image() -> Vec<u8> {
    (0..LENGTH).map(|n| u8::try_from((n / 512 * 31 + n % 512) % 251).unwrap()).collect()
}

/// A host with real connections.
#[derive(Default)]
struct Host {
    connections: RefCell<Vec<Option<TcpStream>>>,
    /// Bytes come one at a time, and one in a second of this clock.
    drips: bool,
    seconds: Cell<u64>,
}

impl Host {
    fn with<R>(
        &self,
        number: u32,
        call: impl FnOnce(&mut TcpStream) -> std::io::Result<R>,
    ) -> Result<R, ConnectionError> {
        let mut list = self.connections.borrow_mut();
        let stream = list[number as usize].as_mut().expect("a connection that is open");
        call(stream).map_err(|_| ConnectionError::Closed)
    }
}

impl hosted::Host for Host {
    fn log(&self, level: Level, message: &str) {
        println!("{level:?}: {message}");
    }
    fn now(&self) -> u64 {
        self.seconds.get() * 1_000_000_000
    }
    fn wait(&self, _: u64) {}
    fn random(&self, length: u32) -> Vec<u8> {
        vec![0; length as usize]
    }
    fn lower_info(&self, _: u32) -> StoreInfo {
        StoreInfo::default()
    }
    fn lower_submit(&self, _: u32, operations: &[Operation]) -> Vec<Result<Vec<u8>, StoreError>> {
        vec![Err(StoreError::Io); operations.len()]
    }
    fn lower_resize(&self, _: u32, _: u64) -> Result<(), StoreError> {
        Err(StoreError::Io)
    }
    fn connect(&self, host: &str, port: u16, _: bool) -> Result<u32, ConnectionError> {
        let stream = TcpStream::connect((host, port))
            .map_err(|error| ConnectionError::Unreachable(error.to_string()))?;
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        let mut list = self.connections.borrow_mut();
        list.push(Some(stream));
        Ok(u32::try_from(list.len() - 1).unwrap())
    }
    fn connection_send(&self, connection: u32, bytes: &[u8]) -> Result<(), ConnectionError> {
        self.with(connection, |stream| stream.write_all(bytes))
    }
    fn connection_receive(&self, connection: u32, max: u32) -> Result<Vec<u8>, ConnectionError> {
        self.seconds.update(|seconds| seconds + u64::from(self.drips));
        let mut bytes = vec![0; if self.drips { 1 } else { max as usize }];
        let count = self.with(connection, |stream| stream.read(&mut bytes))?;
        bytes.truncate(count);
        Ok(bytes)
    }
    fn connection_close(&self, connection: u32) {
        self.connections.borrow_mut()[connection as usize] = None;
    }
}

fn open(host: &Host, url: &str) -> Result<(Http, StoreInfo), Error> {
    let config = Config::new([("url", url), ("cache", "256KiB")]);
    hosted::enter(host, || Http::open(&config, Vec::new()))
}

/// Reads all of the image, in its order and across it.
fn read_all(url: &str) -> usize {
    let (host, right) = (Host::default(), image());
    let (mut store, info) = open(&host, url).unwrap();
    assert_eq!(info.size, (LENGTH as u64).next_multiple_of(512));
    let read = |store: &mut Http, at: usize, length: usize| {
        let mut data = vec![0xaa; length];
        hosted::enter(&host, || store.read(at as u64, &mut data)).unwrap();
        let mut expected = right[at.min(LENGTH)..(at + length).min(LENGTH)].to_vec();
        expected.resize(length, 0);
        assert!(data == expected, "{length} bytes at {at}");
    };
    let size = usize::try_from(info.size).unwrap();
    (0..size).step_by(128 << 10).for_each(|at| read(&mut store, at, (128 << 10).min(size - at)));
    (0..100).for_each(|n| read(&mut store, n * 7919 % 6000 * 512, 8192));
    hosted::enter(&host, || drop(store));
    host.connections.borrow().len()
}

/// Serves ranges of an image, and ends each connection after `each` responses, in the middle of the last.
fn serve(listener: &TcpListener, each: usize) {
    let image = image();
    for stream in listener.incoming() {
        let mut stream = stream.unwrap();
        for n in 1..=each {
            let mut request = Vec::new();
            while !request.ends_with(b"\r\n\r\n") {
                let mut byte = [0];
                if stream.read(&mut byte).unwrap_or(0) == 0 {
                    break;
                }
                request.push(byte[0]);
            }
            let text = String::from_utf8(request).unwrap();
            if text.is_empty() {
                break;
            }
            if text.starts_with("GET /end") {
                return;
            }
            let range = text.split("Range: bytes=").nth(1).unwrap().split("\r\n").next().unwrap();
            let (first, last) = range.split_once('-').unwrap();
            let (first, last): (usize, usize) = (first.parse().unwrap(), last.parse().unwrap());
            let last = last.min(LENGTH - 1);
            let head = format!(
                "HTTP/1.1 206 Partial Content\r\nETag: \"a\"\r\nContent-Length: {}\r\nContent-Range: bytes {first}-{last}/{LENGTH}\r\n\r\n",
                last - first + 1
            );
            let data =
                if n == each { &image[first..usize::midpoint(first, last)] } else { &image[first..=last] };
            if stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(data)).is_err() {
                break;
            }
        }
        let _ = stream.shutdown(Shutdown::Both);
    }
}

#[test]
fn a_server_that_breaks_off_in_the_middle_of_bodies_gives_every_byte_right() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let server = std::thread::spawn(move || serve(&listener, 5));
    let connections = read_all(&format!("http://{address}/image"));
    assert!(connections > 10, "{connections} connections");
    TcpStream::connect(address).unwrap().write_all(b"GET /end HTTP/1.1\r\n\r\n").unwrap();
    server.join().unwrap();
}

#[test]
fn a_server_that_drips_is_given_up() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let server = std::thread::spawn(move || serve(&listener, 5));
    let host = Host { drips: true, ..Host::default() };
    let Err(error) = open(&host, &format!("http://{address}/image")) else { panic!("it was opened") };
    assert!(error.to_string().contains("no answer in time"), "{error}");
    // Three attempts of a minute, which is looked at before each byte.
    assert_eq!(host.seconds.get(), 3 * 61);
    drop(host);
    TcpStream::connect(address).unwrap().write_all(b"GET /end HTTP/1.1\r\n\r\n").unwrap();
    server.join().unwrap();
}

/// A server of others, ended with the test.
struct Foreign {
    child: Child,
    folder: PathBuf,
}

impl Drop for Foreign {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// Whether a program is there.
fn installed(program: &str) -> bool {
    let quiet = |command: &mut Command| command.stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok();
    quiet(Command::new(program).arg("--help"))
}

/// Starts a server over a folder with the image, and waits until it listens.
fn start(name: &str, command: impl FnOnce(&Path, u16) -> Command) -> (Foreign, String) {
    // A port that was free a moment ago.
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let folder = std::env::temp_dir().join(format!("tenon-http-{name}-{}", std::process::id()));
    fs::create_dir_all(&folder).unwrap();
    fs::write(folder.join("image"), image()).unwrap();
    let child = command(&folder, port).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let foreign = Foreign { child, folder };
    let begin = Instant::now();
    while TcpStream::connect(("127.0.0.1", port)).is_err() {
        assert!(begin.elapsed() < Duration::from_secs(20), "{name} does not listen");
        std::thread::yield_now();
    }
    (foreign, format!("http://127.0.0.1:{port}/image"))
}

/// A program, or what the environment says is to be used for it.
fn program(variable: &str, name: &str) -> String {
    std::env::var(variable).unwrap_or_else(|_| name.to_owned())
}

#[test]
fn busybox_serves_every_byte() {
    let busybox = program("BUSYBOX", "busybox");
    let has_httpd = |output: std::process::Output| String::from_utf8_lossy(&output.stdout).contains("httpd");
    if !Command::new(&busybox).arg("--list").output().is_ok_and(has_httpd) {
        println!("not run: there is no busybox with httpd");
        return;
    }
    let (_server, url) = start("busybox", |folder, port| {
        let mut command = Command::new(&busybox);
        command.args(["httpd", "-f", "-p", &format!("127.0.0.1:{port}"), "-h"]).arg(folder);
        command
    });
    read_all(&url);
}

#[test]
fn a_server_without_ranges_is_refused() {
    if !installed("python3") {
        println!("not run: python3 is not installed");
        return;
    }
    let (_server, url) = start("python", |folder, port| {
        let mut command = Command::new("python3");
        command
            .args(["-m", "http.server", &port.to_string(), "--bind", "127.0.0.1", "--directory"])
            .arg(folder);
        command
    });
    let host = Host::default();
    let Err(error) = open(&host, &url) else { panic!("it was opened") };
    assert!(error.to_string().contains("whole files only"), "{error}");
}
