//! A connection to a controller: HTTP/1.1 over TLS, and who is believed to be at its other end.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};

use base64ct::{Base64, Encoding};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1::{self, SendRequest};
use hyper::header::{self, HeaderValue};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use serde_json::Value;
use sha2::{Digest, Sha256};
use tokio::net::TcpStream;
use tokio::task::AbortHandle;
use tokio_rustls::TlsConnector;

use super::Settings;
use crate::error::{Context, Error, Result};
use crate::node::power::Failure;

/// The most that a controller may answer, in bytes.
const MAX_BODY: usize = 1 << 20;
const MAX_HEAD: usize = 64 << 10;

/// Where distributions keep the certificates that they trust.
const ROOTS: [&str; 3] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
];

/// Who is believed to be the controller.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Trust {
    /// Who has a certificate of an authority that this machine trusts.
    System,
    /// Who has one of an authority in this file.
    Ca(PathBuf),
    /// Who has the certificate with this SHA-256.
    Certificate(Fingerprint),
    /// Whoever answers: the password goes to them.
    Anybody,
    /// Whoever answers, and whoever listens: there is no TLS.
    Plain,
}

/// The SHA-256 of a certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Fingerprint([u8; 32]);

impl Fingerprint {
    fn of(certificate: &[u8]) -> Self {
        Self(Sha256::digest(certificate).into())
    }
}

/// 64 hexadecimal digits, as `openssl x509 -fingerprint -sha256` prints them or without colons.
impl FromStr for Fingerprint {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let digits: String = text.chars().filter(|it| *it != ':').collect();
        let mut bytes = [0; 32];
        let is_hex = digits.len() == 64 && digits.bytes().all(|it| it.is_ascii_hexdigit());
        if !is_hex {
            let what = format!("`{}` is no SHA-256 of a certificate", text.escape_debug());
            return Err(Error::config(what)
                .help("see it: `openssl s_client -connect HOST:443 | openssl x509 -noout -sha256 -fingerprint`"));
        }
        for (index, byte) in bytes.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&digits[2 * index..][..2], 16).expect("digits");
        }
        Ok(Self(bytes))
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// The settings of TLS for each kind of trust, which are read once.
#[derive(Debug, Default)]
pub struct Certificates(Mutex<HashMap<Trust, Arc<ClientConfig>>>);

impl Certificates {
    /// None where there is no TLS.
    fn config(&self, trust: &Trust) -> Result<Option<Arc<ClientConfig>>> {
        if *trust == Trust::Plain {
            return Ok(None);
        }
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(config) = known.get(trust) {
            return Ok(Some(config.clone()));
        }
        let config = Arc::new(config(trust)?);
        known.insert(trust.clone(), config.clone());
        Ok(Some(config))
    }
}

/// TLS to who is believed so; without meaning for [`Trust::Plain`].
///
/// # Errors
/// When the certificates cannot be read.
pub fn config(trust: &Trust) -> Result<ClientConfig> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier: Arc<dyn ServerCertVerifier> = match trust {
        Trust::System => {
            authority(ROOTS.map(PathBuf::from).into_iter().find(|it| it.exists()), &provider)?
        }
        Trust::Ca(file) => authority(Some(file.clone()), &provider)?,
        Trust::Certificate(known) => {
            Arc::new(Known { fingerprint: Some(*known), provider: provider.clone() })
        }
        Trust::Anybody | Trust::Plain => {
            Arc::new(Known { fingerprint: None, provider: provider.clone() })
        }
    };
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .while_doing(|| "preparing TLS".into())?;
    Ok(config.dangerous().with_custom_certificate_verifier(verifier).with_no_client_auth())
}

fn authority(
    file: Option<PathBuf>,
    provider: &Arc<CryptoProvider>,
) -> Result<Arc<WebPkiServerVerifier>> {
    let file = file.ok_or_else(|| {
        Error::system("this machine trusts no authorities").help("install `ca-certificates`")
    })?;
    let reading = || format!("reading the certificates in `{}`", file.display());
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_file_iter(&file).while_doing(reading)? {
        // Some of a distribution may be too odd for us; one of the site's own may not.
        let _ = roots.add(certificate.while_doing(reading)?);
    }
    if roots.is_empty() {
        let none = Error::config(format!(
            "there is no certificate of an authority in `{}`",
            file.display()
        ));
        return Err(none);
    }
    WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider.clone())
        .build()
        .while_doing(reading)
}

/// Takes one certificate, or any.
#[derive(Debug)]
struct Known {
    fingerprint: Option<Fingerprint>,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Known {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let found = Fingerprint::of(certificate);
        match self.fingerprint {
            Some(known) if known != found => Err(rustls::Error::General(format!(
                "it has another certificate, of which the SHA-256 is {found}"
            ))),
            _ => Ok(ServerCertVerified::assertion()),
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let known = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, certificate, signed, known)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let known = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signed, known)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// A conversation: one connection, and another one where the controller ends it after each
/// answer.
pub struct Connection<'a> {
    settings: &'a Settings,
    config: Option<Arc<ClientConfig>>,
    line: Option<Line>,
    host: String,
    authorization: HeaderValue,
    /// The version of what was read last, which is what is changed.
    version: Option<HeaderValue>,
    /// Whether a change has been sent, or part of it.
    told: bool,
}

struct Line {
    requests: SendRequest<Full<Bytes>>,
    task: AbortHandle,
}

impl Drop for Line {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl<'a> Connection<'a> {
    /// Prepares it; it begins with the first question.
    pub fn new(settings: &'a Settings, certificates: &Certificates) -> Result<Self> {
        let (name, port) = (settings.address.as_str(), settings.port);
        let login = format!("{}:{}", settings.user, settings.password.expose());
        let login = format!("Basic {}", Base64::encode_string(login.as_bytes()));
        let mut authorization = HeaderValue::from_str(&login).expect("base64 is a header's value");
        authorization.set_sensitive(true);
        Ok(Self {
            settings,
            config: certificates.config(&settings.trust)?,
            line: None,
            host: if name.contains(':') {
                format!("[{name}]:{port}")
            } else {
                format!("{name}:{port}")
            },
            authorization,
            version: None,
            told: false,
        })
    }

    async fn line(&self) -> Result<Line, Failure> {
        let name = self.settings.address.as_str();
        let stream = TcpStream::connect((name, self.settings.port)).await;
        let stream = stream.while_doing(|| "connecting".into()).map_err(Failure::passing)?;
        // Small questions, each of which waits for its answer.
        let _ = stream.set_nodelay(true);
        let Some(config) = self.config.clone() else { return begin(TokioIo::new(stream)).await };
        let server = ServerName::try_from(name.to_owned());
        let server = server.while_doing(|| "reading the controller's name".into())?;
        let stream = TlsConnector::from(config).connect(server, stream).await;
        let stream = stream.map_err(|error| {
            // Who hangs up may have more time later; who is not believed is not believed.
            let again = error.kind() != io::ErrorKind::InvalidData;
            let error = Error::system("agreeing on TLS").because(error).help(
                "say whom to believe: `control/bmc_trust`, a file with authorities, \
                 `sha256:…`, or `anybody`",
            );
            Failure { again, ..error.into() }
        })?;
        begin(TokioIo::new(stream)).await
    }

    /// Whether it was told to change something, and may have.
    pub fn has_told(&self) -> bool {
        self.told
    }

    /// The connection, where it is still one, or a new one.
    async fn open(&mut self) -> Result<Line, Failure> {
        if let Some(mut line) = self.line.take() {
            if line.requests.ready().await.is_ok() {
                return Ok(line);
            }
        }
        self.line().await
    }

    pub async fn get(&mut self, path: &str) -> Result<Value, Failure> {
        let answer = self.ask(Method::GET, path, None).await?;
        self.version = answer.headers().get(header::ETAG).cloned();
        let body = Limited::new(answer.into_body(), MAX_BODY).collect().await;
        let body = body
            .map_err(|error| Error::system("its answer breaks off, or is too long").because(error));
        let body = body.map_err(Failure::passing)?.to_bytes();
        let value = serde_json::from_slice(&body);
        Ok(value.while_doing(|| format!("reading `{path}`"))?)
    }

    pub async fn post(&mut self, path: &str, body: &Value) -> Result<(), Failure> {
        self.version = None;
        self.ask(Method::POST, path, Some(body)).await.map(drop)
    }

    pub async fn patch(&mut self, path: &str, body: &Value) -> Result<(), Failure> {
        self.ask(Method::PATCH, path, Some(body)).await.map(drop)
    }

    async fn ask(
        &mut self,
        method: Method,
        path: &str,
        body: Option<&Value>,
    ) -> Result<Response<hyper::body::Incoming>, Failure> {
        let what = || format!("{method} `{path}`");
        let mut request = Request::builder()
            .method(&method)
            .uri(path)
            .header(header::HOST, &self.host)
            .header(header::AUTHORIZATION, &self.authorization)
            .header(header::ACCEPT, "application/json")
            .header("OData-Version", "4.0");
        if body.is_some() {
            request = request.header(header::CONTENT_TYPE, "application/json");
        }
        if let Some(version) = self.version.as_ref().filter(|_| method == Method::PATCH) {
            request = request.header(header::IF_MATCH, version);
        }
        let body = body.map_or(Bytes::new(), |body| Bytes::from(body.to_string()));
        let request = request.body(Full::new(body)).while_doing(what)?;
        let mut line = self.open().await?;
        self.told = method != Method::GET;
        let answer = line.requests.send_request(request).await.map_err(|error| {
            // It was not sent where the connection had ended before.
            let perhaps_done = self.told && !error.is_canceled();
            let error = Error::system(what()).because(error);
            Failure { again: true, perhaps_done, error }
        })?;
        self.line = Some(line);
        if answer.status().is_success() {
            return Ok(answer);
        }
        Err(refusal(answer).await.while_doing(what()))
    }
}

async fn begin<S>(stream: TokioIo<S>) -> Result<Line, Failure>
where
    TokioIo<S>: hyper::rt::Read + hyper::rt::Write + Send + Unpin + 'static,
{
    let begun = http1::Builder::new().max_buf_size(MAX_HEAD).handshake(stream).await;
    let (requests, connection) = begun.while_doing(|| "beginning HTTP".into())?;
    // How it ends is seen in the requests.
    let task = tokio::spawn(async { drop(connection.await) }).abort_handle();
    Ok(Line { requests, task })
}

/// What a controller says no with, and in what words.
async fn refusal(answer: Response<hyper::body::Incoming>) -> Failure {
    let status = answer.status();
    let (again, why) = match status {
        StatusCode::UNAUTHORIZED => (false, "the user or the password is wrong"),
        StatusCode::FORBIDDEN => (false, "the user may not do this"),
        StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => (true, "it is busy"),
        _ if status.is_redirection() => (false, "it sends us elsewhere, where we do not go"),
        _ => (false, "it refuses"),
    };
    let body = Limited::new(answer.into_body(), MAX_BODY).collect().await;
    let words = body.ok().and_then(|body| {
        let value: Value = serde_json::from_slice(&body.to_bytes()).ok()?;
        let error = value.get("error")?;
        let extended = error.get("@Message.ExtendedInfo").and_then(|it| it.get(0));
        let words = extended.and_then(|it| it.get("Message")).or_else(|| error.get("message"))?;
        Some(words.as_str()?.chars().take(300).collect::<String>())
    });
    let mut what = format!("{why} (status {})", status.as_u16());
    if let Some(words) = words {
        what += &format!(": {}", words.escape_debug());
    }
    Failure { again, ..Error::system(what).into() }
}
