//! `pavo image import URL`, from a web server that does what servers do.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use base64ct::{Base64, Encoding};
use rustls::{ServerConfig, ServerConnection, StreamOwned};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

/// What is served: more than a server's first few packets.
fn disk() -> Vec<u8> {
    (0..3 << 20).map(|n: u32| (n >> 7) as u8 | 1).collect()
}

/// A server, and a home whose user trusts it.
struct World {
    home: TempDir,
    address: String,
}

impl World {
    fn new(tls: bool) -> Self {
        let home = tempfile::tempdir().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let key = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        let root = Base64::encode_string(key.cert.der());
        let root = format!("-----BEGIN CERTIFICATE-----\n{root}\n-----END CERTIFICATE-----\n");
        std::fs::write(home.path().join("roots.pem"), root).unwrap();
        let config =
            ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
                .with_safe_default_protocol_versions()
                .unwrap()
                .with_no_client_auth()
                .with_single_cert(
                    vec![key.cert.der().clone()],
                    rustls::pki_types::PrivatePkcs8KeyDer::from(key.signing_key.serialize_der())
                        .into(),
                )
                .unwrap();
        let config = Arc::new(config);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (stream, config) = (stream.unwrap(), config.clone());
                std::thread::spawn(move || {
                    if tls {
                        let connection = ServerConnection::new(config).unwrap();
                        let mut stream = StreamOwned::new(connection, stream);
                        answer(&mut stream);
                        stream.conn.send_close_notify();
                        let _ = stream.flush();
                    } else {
                        answer(stream);
                    }
                });
            }
        });
        let scheme = if tls { "https" } else { "http" };
        Self { home, address: format!("{scheme}://localhost:{port}") }
    }

    fn import(&self, path: &str, more: &[&str]) -> (i32, String) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pavo"));
        command.args(["image", "import", &format!("{}{path}", self.address), "fetched"]);
        command.args(more).env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
        command.env("HOME", self.home.path());
        command.env("SSL_CERT_FILE", self.home.path().join("roots.pem"));
        let output = command.output().unwrap();
        (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
    }

    /// The image holds what is served; nothing else is in the repository.
    fn arrived(&self) {
        let repo = self.home.path().join(".local/share/pavo/images");
        let blob = files(&repo.join("data")).pop().expect("an image");
        let raw = self.home.path().join("raw");
        let convert = Command::new("qemu-img")
            .args(["convert", "-f", "qcow2", "-O", "raw"])
            .args([&blob, &raw])
            .status();
        assert!(convert.unwrap().success());
        assert!(std::fs::read(raw).unwrap() == disk());
        assert_eq!(files(&repo.join(".tmp")), [] as [PathBuf; 0]);
    }
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().map(|entry| entry.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect()
}

/// Answers one request.
fn answer(mut stream: impl Read + Write) {
    let mut request = String::new();
    let mut reader = BufReader::new(&mut stream);
    while !request.ends_with("\r\n\r\n") {
        if reader.read_line(&mut request).unwrap_or(0) == 0 {
            return;
        }
    }
    let path = request.split(' ').nth(1).unwrap().to_owned();
    let range = request.lines().find_map(|line| {
        line.to_ascii_lowercase()
            .strip_prefix("range: bytes=")
            .map(|range| range.trim_end_matches('-').parse::<usize>().unwrap())
    });
    let disk = disk();
    let head = |status: &str, more: &str, length: usize| {
        let end = "Connection: close\r\n\r\n";
        format!("HTTP/1.1 {status}\r\n{more}Content-Length: {length}\r\n{end}").into_bytes()
    };
    let ranges = "Accept-Ranges: bytes\r\nETag: \"one\"\r\n";
    // Whoever hangs up has heard enough.
    let mut say = |parts: &[&[u8]]| {
        let _ = stream.write_all(&parts.concat());
        let _ = stream.flush();
    };
    match (path.as_str(), range) {
        ("/disk.raw", None) => say(&[&head("200 OK", "", disk.len()), &disk]),
        // Breaks off a third of the way, each time.
        ("/breaks.raw", from) => {
            let from = from.unwrap_or(0);
            let part = &disk[from..(from + disk.len() / 3 + 1).min(disk.len())];
            let status = if from == 0 { "200 OK" } else { "206 Partial Content" };
            let range = format!("{ranges}Content-Range: bytes {from}-{}/*\r\n", disk.len() - 1);
            say(&[&head(status, &range, disk.len() - from), part]);
        }
        // Has another file by then.
        ("/changes.raw", None) => say(&[&head("200 OK", ranges, disk.len()), &disk[..1000]]),
        ("/changes.raw", Some(_)) => say(&[&head("200 OK", ranges, disk.len()), &disk]),
        ("/stops.raw", None) => say(&[&head("200 OK", ranges, disk.len()), &disk[..1000]]),
        ("/stops.raw", Some(_)) => {
            let range = format!("{ranges}Content-Range: bytes 1000-9999/*\r\n");
            say(&[&head("206 Partial Content", &range, 9000)]);
        }
        ("/lies.raw", Some(_)) => {
            say(&[&head("206 Partial Content", "Content-Range: bytes 7-99/*\r\n", 92)]);
        }
        ("/lies.raw", None) => say(&[&head("200 OK", ranges, disk.len()), &disk[..1000]]),
        ("/elsewhere.raw", None) => {
            say(&[&head("302 Found", "Location: http://localhost:1/disk.raw\r\n", 0)]);
        }
        ("/busy.raw", None) => say(&[&head("503 Service Unavailable", "", 0)]),
        _ => say(&[&head("404 Not Found", "", 0)]),
    }
}

fn hash(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn an_image_comes_over_tls() {
    let world = World::new(true);
    let (code, said) = world.import("/disk.raw", &[]);
    assert_eq!(code, 0, "{said}");
    assert!(said.contains("Fetched 100 % of https://localhost"), "{said}");
    world.arrived();
}

#[test]
fn what_breaks_off_goes_on_where_it_was() {
    let world = World::new(true);
    let (code, said) = world.import("/breaks.raw", &["--sha256", &hash(&disk())]);
    assert_eq!(code, 0, "{said}");
    world.arrived();
    let world = World::new(true);
    let (code, said) = world.import("/changes.raw", &[]);
    assert_eq!(code, 0, "{said}");
    world.arrived();
}

#[test]
fn without_tls_only_what_has_the_right_hash_comes_in() {
    let world = World::new(false);
    let (code, said) = world.import("/disk.raw", &[]);
    assert_eq!(code, 2, "{said}");
    assert!(said.contains("anybody on the way may change"), "{said}");
    let (code, said) = world.import("/disk.raw", &["--sha256", &hash(b"another")]);
    assert_eq!(code, 2, "{said}");
    assert!(said.contains(&format!("its SHA-256 is {}", hash(&disk()))), "{said}");
    let (code, said) = world.import("/disk.raw", &["--sha256", "abc"]);
    assert_eq!(code, 2, "{said}");
    assert!(said.contains("64 hexadecimal digits"), "{said}");
    let (code, said) = world.import("/disk.raw", &["--sha256", &hash(&disk()).to_uppercase()]);
    assert_eq!(code, 0, "{said}");
    world.arrived();
}

#[test]
fn what_servers_refuse_or_get_wrong_is_said_and_nothing_is_left() {
    let world = World::new(true);
    for (path, expected, why) in [
        ("/none.raw", 4, "the server has no such file"),
        ("/busy.raw", 5, "the server refused (status 503)"),
        ("/elsewhere.raw", 5, "it leads to a place without TLS"),
        ("/stops.raw", 5, "it broke off after 1000 bytes"),
        ("/lies.raw", 5, "it sent another part than was asked for"),
    ] {
        let (code, said) = world.import(path, &[]);
        assert_eq!(code, expected, "{path}: {said}");
        assert!(said.contains(why) && said.contains("importing `https://"), "{path}: {said}");
    }
    // Whom this machine does not trust.
    std::fs::write(world.home.path().join("roots.pem"), "").unwrap();
    let (code, said) = world.import("/disk.raw", &[]);
    assert_eq!(code, 5, "{said}");
    assert!(said.contains("the server cannot be reached"), "{said}");
    let repo = world.home.path().join(".local/share/pavo/images");
    for folder in ["data", "meta", ".tmp"] {
        assert_eq!(files(&repo.join(folder)), [] as [PathBuf; 0], "{folder}");
    }
    // Nobody there.
    let gone = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    assert!(TcpStream::connect(gone).is_err());
    let world = World { address: format!("https://{gone}"), ..world };
    let (code, said) = world.import("/disk.raw", &[]);
    assert_eq!(code, 5, "{said}");
    assert!(said.contains("the server cannot be reached"), "{said}");
}
