//! Disk images fetched from a web server, as distributions publish them.
//!
//! Over TLS whoever answers is who was asked; without it only a hash makes the bytes those
//! that were meant, so plain `http:` is refused unless one is given. What breaks off goes on
//! where it was (RFC 9110, section 14), as long as each attempt gets further.

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use sha2::{Digest, Sha256};
use ureq::http::{HeaderMap, StatusCode, header};
use ureq::tls::{PemItem, RootCerts, TlsConfig, parse_pem};
use ureq::{Agent, Body};

use super::uri;
use crate::error::{Context, Error, Result};

/// How long a server may be silent.
const SILENCE: Duration = Duration::from_secs(30);
const CONNECT: Duration = Duration::from_secs(10);
const REDIRECTS: u32 = 5;
const BLOCK: usize = 256 << 10;

/// Where distributions keep the certificates that they trust.
const ROOTS: [&str; 3] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
];

/// A SHA-256 as a user writes it, 64 hexadecimal digits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hash(String);

impl std::str::FromStr for Hash {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        if text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Ok(Self(text.to_ascii_lowercase()));
        }
        Err(Error::usage(format!("`{}` is no SHA-256", text.escape_debug()))
            .help("it has 64 hexadecimal digits; distributions list them beside their images"))
    }
}

impl Hash {
    /// Refuses a file that has another one.
    pub(super) fn check(&self, path: &Path) -> Result<()> {
        let hash = || -> std::io::Result<String> {
            let (mut file, mut hasher) = (File::open(path)?, Sha256::new());
            let mut block = vec![0; BLOCK];
            loop {
                match file.read(&mut block)? {
                    0 => break,
                    count => hasher.update(&block[..count]),
                }
            }
            Ok(hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
        };
        let found = hash().while_doing(|| format!("hashing `{}`", path.display()))?;
        if found == self.0 {
            return Ok(());
        }
        Err(Error::usage(format!("its SHA-256 is {found}, not the one given"))
            .help("is the file newer than the hash? compare it with the list of whoever made it"))
    }
}

/// Bytes that have come, and all there are, where the server says so.
pub type Progress<'a> = &'a dyn Fn(u64, Option<u64>);

/// Whether an image is to be fetched.
pub(super) fn is_url(source: &str) -> bool {
    source.starts_with("https://") || source.starts_with("http://")
}

/// Fetches `url` into `folder`; the file is named as in the URL, for its suffix.
///
/// # Errors
/// When the server refuses, is silent for half a minute, or breaks off again and again.
pub(super) fn fetch(
    url: &str,
    hash: Option<&Hash>,
    folder: &Path,
    progress: Progress<'_>,
) -> Result<PathBuf> {
    if url.starts_with("http:") && hash.is_none() {
        return Err(Error::usage("anybody on the way may change what comes by plain http")
            .help("use https, or give the hash that it must have: `--sha256`"));
    }
    let path = folder.join(file_name(url));
    let agent = agent(url.starts_with("https:"))?;
    let mut file = File::create_new(&path).while_doing(|| "creating a file".into())?;
    let mut transfer = Transfer { agent, url, file: &mut file, done: 0, version: None };
    transfer.run(progress)?;
    if let Some(hash) = hash {
        hash.check(&path)?;
    }
    Ok(path)
}

/// The last part of the path, if it is a plain name.
fn file_name(url: &str) -> &str {
    let path = url.split(['?', '#']).next().unwrap_or_default();
    let last = path.rsplit('/').next().unwrap_or_default();
    if uri::plain(last) { last } else { "download" }
}

fn agent(only_tls: bool) -> Result<Agent> {
    let config = Agent::config_builder()
        .https_only(only_tls)
        .max_redirects(REDIRECTS)
        .timeout_connect(Some(CONNECT))
        .timeout_recv_response(Some(SILENCE))
        .timeout_per_read(Some(SILENCE))
        .user_agent(concat!("pavo/", env!("CARGO_PKG_VERSION")));
    let config = if only_tls { config.tls_config(tls()?) } else { config };
    Ok(config.build().new_agent())
}

fn tls() -> Result<TlsConfig> {
    let named = std::env::var_os("SSL_CERT_FILE").map(PathBuf::from);
    let path = named.or_else(|| ROOTS.iter().map(PathBuf::from).find(|path| path.is_file()));
    let path = path.ok_or_else(|| {
        Error::system("this machine has no list of certificates that it trusts")
            .help("apt install ca-certificates, or name one: `SSL_CERT_FILE=…`")
    })?;
    let pem = std::fs::read(&path).while_doing(|| format!("reading `{}`", path.display()))?;
    let roots = parse_pem(&pem).filter_map(|item| match item {
        Ok(PemItem::Certificate(certificate)) => Some(certificate),
        _ => None,
    });
    Ok(TlsConfig::builder()
        .unversioned_rustls_crypto_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .root_certs(RootCerts::Specific(Arc::new(roots.collect())))
        .build())
}

struct Transfer<'a> {
    agent: Agent,
    url: &'a str,
    file: &'a mut File,
    done: u64,
    /// What the server calls this version of the file, if it can go on in the middle of one.
    version: Option<String>,
}

impl Transfer<'_> {
    fn run(&mut self, progress: Progress<'_>) -> Result<()> {
        loop {
            let before = self.done;
            match self.attempt(progress) {
                Ok(()) => return Ok(()),
                Err(Broken::Lost(_)) if self.version.is_some() && self.done > before => {}
                Err(Broken::Lost(error) | Broken::Refused(error)) => return Err(error),
            }
        }
    }

    fn attempt(&mut self, progress: Progress<'_>) -> Result<(), Broken> {
        let mut request = self.agent.get(self.url);
        if let (1.., Some(version)) = (self.done, &self.version) {
            request = request
                .header(header::RANGE, format!("bytes={}-", self.done))
                .header(header::IF_RANGE, version);
        }
        let mut response = request.call().map_err(Broken::of)?;
        let headers = response.headers();
        let goes_on = response.status() == StatusCode::PARTIAL_CONTENT;
        if goes_on && !range_starts_at(headers, self.done) {
            return Err(Broken::Refused(Error::system("it sent another part than was asked for")));
        }
        if !goes_on {
            self.file.set_len(0).map_err(Broken::disk)?;
            self.done = 0;
            self.version = version(headers);
        }
        use std::io::Seek;
        self.file.seek(std::io::SeekFrom::Start(self.done)).map_err(Broken::disk)?;
        let rest = response.body().content_length();
        let total = rest.map(|rest| rest + self.done);
        self.receive(response.body_mut(), total, progress)
    }

    fn receive(
        &mut self,
        body: &mut Body,
        total: Option<u64>,
        progress: Progress<'_>,
    ) -> Result<(), Broken> {
        let mut reader = body.with_config().limit(u64::MAX).reader();
        let mut block = vec![0; BLOCK];
        loop {
            progress(self.done, total);
            match reader.read(&mut block) {
                Ok(0) if total.is_some_and(|total| self.done < total) => {
                    return Err(Broken::Lost(self.broke_off()));
                }
                Ok(0) => return Ok(()),
                Ok(count) => {
                    self.file.write_all(&block[..count]).map_err(Broken::disk)?;
                    self.done += count as u64;
                }
                Err(error) => {
                    return Err(Broken::Lost(self.broke_off().because(error)));
                }
            }
        }
    }
}

impl Transfer<'_> {
    fn broke_off(&self) -> Error {
        Error::system(format!("it broke off after {} bytes", self.done))
            .help("try again, or fetch it by other means and import the file")
    }
}

/// Why an attempt ended.
enum Broken {
    /// Another one may get further.
    Lost(Error),
    Refused(Error),
}

impl Broken {
    fn of(error: ureq::Error) -> Self {
        match error {
            ureq::Error::StatusCode(404 | 410) => Self::Refused(
                Error::not_found("the server has no such file")
                    .help("look at the address; older files are taken away"),
            ),
            ureq::Error::StatusCode(code) => Self::Refused(
                Error::system(format!("the server refused (status {code})"))
                    .help("try again later, or fetch it with a browser and import the file"),
            ),
            ureq::Error::RequireHttpsOnly(_) => Self::Refused(
                Error::system("it leads to a place without TLS")
                    .help("look for the image's own address; `http:` needs `--sha256`"),
            ),
            other => Self::Lost(Error::system("the server cannot be reached").because(other).help(
                "look at its name, your network and `https_proxy`; whom this machine trusts \
                     is in ca-certificates, or in `SSL_CERT_FILE`",
            )),
        }
    }

    fn disk(error: std::io::Error) -> Self {
        Self::Refused(Error::system("writing it to the repository").because(error))
    }
}

/// What changes when the file does; weak ones will not do (RFC 9110, section 13.1.5).
fn version(headers: &HeaderMap) -> Option<String> {
    let ranges = headers.get(header::ACCEPT_RANGES)?.to_str().ok()?;
    let tag = headers.get(header::ETAG)?.to_str().ok()?;
    (ranges == "bytes" && !tag.starts_with("W/")).then(|| tag.to_owned())
}

fn range_starts_at(headers: &HeaderMap, offset: u64) -> bool {
    let range = headers.get(header::CONTENT_RANGE).and_then(|range| range.to_str().ok());
    range.is_some_and(|range| range.starts_with(&format!("bytes {offset}-")))
}
