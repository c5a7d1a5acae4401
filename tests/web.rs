//! Images on a web server of others: Debian's nginx, in plain and by TLS.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;
use tenon_tests::{PROMPT, Tenon, debian, noise, outcome, tenon};

const LENGTH: usize = (3 << 20) + 512;

/// nginx over a folder with `image`, ended with the test. It ends every connection after 20 requests.
struct Nginx {
    process: Child,
    folder: TempDir,
    /// Where it is, in plain and by TLS.
    plain: String,
    tls: String,
}

impl Nginx {
    /// Starts it, with a certificate of its own for `localhost`: `certificate` in the folder.
    fn start(image: &[u8]) -> Self {
        let program = debian("web/nginx");
        assert!(program.is_file(), "{} is missing; run `cargo xtask guests --web`", program.display());
        let folder = tempfile::tempdir().expect("a temporary folder");
        let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).expect("a certificate");
        let write =
            |name: &str, content: &[u8]| fs::write(folder.path().join(name), content).expect("a file");
        write("image", image);
        write("certificate", made.cert.pem().as_bytes());
        write("key", made.signing_key.serialize_pem().as_bytes());
        // Ports that were free a moment ago.
        let listeners = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").expect("a port"));
        let [plain, tls] =
            listeners.each_ref().map(|listener| listener.local_addr().expect("an address").port());
        drop(listeners);
        let at = folder.path().display();
        let temporary: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
            .map(|name| format!("{name}_temp_path {at}/{name}; "))
            .concat();
        let configuration = format!(
            "daemon off; master_process off; pid {at}/pid; error_log stderr;\nevents {{}}\nhttp {{\n  access_log off; {temporary}\n  \
             keepalive_requests 20; ssl_certificate {at}/certificate; ssl_certificate_key {at}/key;\n  \
             server {{ listen 127.0.0.1:{plain}; listen 127.0.0.1:{tls} ssl; root {at}; }}\n}}\n"
        );
        write("nginx.conf", configuration.as_bytes());
        let process = Command::new(program)
            .arg("-p")
            .arg(folder.path())
            .args(["-c", "nginx.conf", "-e", "stderr"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .expect("nginx starts");
        let begin = Instant::now();
        while TcpStream::connect(("127.0.0.1", tls)).is_err() {
            assert!(begin.elapsed() < Duration::from_secs(20), "nginx does not listen");
            std::thread::yield_now();
        }
        let (plain, tls) = (format!("http://127.0.0.1:{plain}"), format!("https://localhost:{tls}"));
        Self { process, folder, plain, tls }
    }

    fn file(&self, name: &str) -> String {
        self.folder.path().join(name).display().to_string()
    }
}

impl Drop for Nginx {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[test]
fn an_image_is_copied_in_plain_and_by_tls_from_whom_the_host_believes() {
    let image = noise(11, LENGTH);
    let nginx = Nginx::start(&image);
    let copy = |from: &str, to: &str, believed: &str| {
        let words = ["disk", "convert", &format!("http:{from}"), &format!("file:{}", nginx.file(to))];
        outcome(tenon(&words).env("SSL_CERT_FILE", nginx.file(believed)))
    };
    for (n, address) in [&nginx.plain, &nginx.tls].into_iter().enumerate() {
        let (status, _, error) = copy(&format!("{address}/image"), &format!("copy{n}"), "certificate");
        assert_eq!(status, 0, "{error}");
        let copied = fs::read(nginx.file(&format!("copy{n}"))).expect("the copy");
        assert!(copied == image, "{address}: other bytes came");
    }

    // As a vendor tries a store that has a server.
    let tried =
        outcome(&mut tenon(&["plugin", "test", "http", "--set", &format!("url={}/image", nginx.plain)]));
    assert_eq!(tried.0, 0, "{}", tried.2);

    // Another certificate, though for the same name.
    let other = rcgen::generate_simple_self_signed(["localhost".to_owned()]).expect("a certificate");
    fs::write(nginx.file("other"), other.cert.pem()).expect("a file");
    let by_address = nginx.tls.replace("localhost", "127.0.0.1");
    let plain_by_tls = nginx.plain.replace("http", "https");
    for (from, believed, why) in [
        (format!("{}/image", nginx.tls), "other", "certificate"),
        (format!("{by_address}/image"), "certificate", "not valid for name"),
        (format!("{plain_by_tls}/image"), "certificate", "TLS"),
        (format!("{}/nothing", nginx.tls), "certificate", "404"),
    ] {
        let (status, _, error) = copy(&from, "refused", believed);
        assert_eq!(status, 1, "{from}: {error}");
        assert!(error.contains(why), "{from}: `{why}` is not in: {error}");
        assert!(!fs::exists(nginx.file("refused")).expect("the folder"), "{from}: a file is left behind");
    }
}

#[test]
fn linux_works_on_an_overlay_over_an_image_behind_tls() {
    let nginx = Nginx::start(&noise(12, LENGTH));
    let outcome = Tenon::virtio_debian()
        .env("SSL_CERT_FILE", nginx.file("certificate"))
        .arg("--disk")
        .arg(format!("overlay:http:{}/image", nginx.tls))
        .arg("--disk")
        .arg(format!("file:{},ro", nginx.file("image")))
        .typing(PROMPT, "cmp /dev/vda /dev/vdb && echo same: $((1 + 1))\n")
        .typing(PROMPT, "dd if=/dev/vdb of=/dev/vda bs=64k count=1 skip=5 seek=9 conv=fsync 2> /dev/null\n")
        .typing(PROMPT, "echo 3 > /proc/sys/vm/drop_caches; cmp /dev/vda /dev/vdb | sed 's/line.*//'\n")
        .typing(PROMPT, "poweroff -f\n")
        .outcome();
    assert_eq!(outcome.status, 0, "{}", outcome.all());
    assert!(outcome.stdout.contains("\nsame: 2\n"), "{}", outcome.all());
    let first = format!("differ: byte {}", 9 * (64 << 10) + 1);
    assert!(
        outcome.stdout.contains(&first) || outcome.stdout.contains(&first.replace("byte", "char")),
        "{}",
        outcome.all()
    );
}

/// Gives the first MiB of a disk of 16 MiB, and of what lies behind it nothing, though it keeps the connection.
fn half_dead(listener: &TcpListener) {
    let (stream, _) = listener.accept().expect("a connection");
    let mut lines = BufReader::new(stream.try_clone().expect("the same connection")).lines();
    while let Some(Ok(line)) = lines.next() {
        let Some(range) = line.strip_prefix("Range: bytes=") else { continue };
        let (first, last) = range.split_once('-').expect("a range");
        let (first, last): (usize, usize) =
            (first.parse().expect("a number"), last.parse().expect("a number"));
        if first < 1 << 20 {
            let head = format!(
                "HTTP/1.1 206 Partial Content\r\nETag: \"a\"\r\nContent-Length: {}\r\nContent-Range: bytes {first}-{last}/{}\r\n\r\n",
                last - first + 1,
                16 << 20
            );
            let mut answer = head.into_bytes();
            answer.resize(answer.len() + last - first + 1, 0);
            (&stream).write_all(&answer).expect("somebody reads");
        }
    }
}

#[test]
fn a_machine_ends_though_a_server_does_not_answer() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("an address");
    let server = std::thread::spawn(move || half_dead(&listener));
    let outcome = Tenon::virtio_debian()
        .args(["--disk", &format!("http:http://{address}/image")])
        .typing(
            PROMPT,
            "dd if=/dev/vda of=/dev/null bs=1M skip=8 count=1 & sleep 1; echo waits $((40 + 2))\n",
        )
        .until("waits 42", 1)
        .within(25)
        .outcome();
    assert_eq!(outcome.status, 128 + 15, "{}", outcome.all());
    server.join().expect("the connection has ended");
}
