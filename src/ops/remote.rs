//! The daemon, as commands reach it: at its socket on its own host, over TLS with a token
//! elsewhere.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HOST};
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use crate::config::Daemon;
use crate::error::{Context, Error, Result, WireError};
use crate::node::power::redfish::{Trust, tls};
use crate::store::secret::Secret;

/// The port of an address that has none.
const PORT: u16 = 7680;

const CONNECT: Duration = Duration::from_secs(10);

/// A little longer than the daemon takes to say that it takes too long.
const ANSWER: Duration = Duration::from_secs(130);

/// The longest answer: all of a hundred thousand nodes.
const MAX_ANSWER: usize = 512 << 20;

/// Where the daemon is.
#[derive(Clone, Debug)]
pub struct Remote(Place);

#[derive(Clone, Debug)]
enum Place {
    Socket(PathBuf),
    Host { host: String, port: u16, trust: Trust, token: Secret },
}

/// What says where the daemon is.
#[derive(Clone, Debug)]
pub struct Hint<'a> {
    /// `$PAVO_DAEMON`: a socket, `https://HOST:PORT`, or `none`.
    pub said: Option<&'a str>,
    pub config: &'a Daemon,
    pub home: &'a Path,
}

impl Hint<'_> {
    /// The daemon, if commands are to ask one.
    ///
    /// # Errors
    /// When its address is none, or there is no token for it.
    pub fn find(&self) -> Result<Option<Remote>> {
        let socket = |path: PathBuf| Ok(Some(Remote(Place::Socket(path))));
        match self.said {
            Some("none") => Ok(None),
            Some(url) if url.starts_with("https://") => self.host(url).map(Some),
            Some(path) if path.starts_with('/') => socket(path.into()),
            Some(other) => {
                Err(Error::usage(format!("`PAVO_DAEMON` is `{}`", other.escape_debug()))
                    .help("it may be `none`, the path of a socket, or `https://HOST:PORT`"))
            }
            None if self.config.socket.exists() => socket(self.config.socket.clone()),
            None => match &self.config.address {
                Some(url) => self.host(url).map(Some),
                // A site that has one keeps nothing beside it.
                None if self.config.is_configured => socket(self.config.socket.clone()),
                None => Ok(None),
            },
        }
    }

    fn host(&self, url: &str) -> Result<Remote> {
        let doing = || format!("finding the daemon at `{}`", url.escape_debug());
        let rest = url.trim_start_matches("https://").trim_end_matches('/');
        let wrong = || Error::config("that is no `https://HOST:PORT`");
        let (host, port) = match rest.rsplit_once(':').filter(|(_, port)| !port.ends_with(']')) {
            Some((host, port)) => (host, port.parse().map_err(|_| wrong()).while_doing(doing)?),
            None => (rest, PORT),
        };
        let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
        if host.is_empty() || host.contains(['/', '@', '?', '#']) {
            return Err(wrong()).while_doing(doing);
        }
        let trust = self.config.ca_cert.clone().map_or(Trust::System, Trust::Ca);
        let file = self.home.join(".pavo/daemon-token");
        let token = Secret::read(&file).map_err(|error| {
            error.help(format!(
                "an administrator makes a token, `pavo daemon token create NAME`; put it into `{}` (0600)",
                file.display()
            ))
        });
        Ok(Remote(Place::Host { host, port, trust, token: token.while_doing(doing)? }))
    }
}

impl Remote {
    /// What is at a path.
    ///
    /// # Errors
    /// The daemon's, or that it cannot be reached.
    pub async fn get<T: DeserializeOwned>(&self, path: &str, query: &impl Serialize) -> Result<T> {
        self.ask(Method::GET, path, query, None).await
    }

    /// Asks for something to be done.
    ///
    /// # Errors
    /// The daemon's, or that it cannot be reached.
    pub async fn send<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T> {
        let body = serde_json::to_vec(body).while_doing(|| "writing what is asked".into())?;
        self.ask(method, path, &(), Some(("application/json", body))).await
    }

    /// Asks with a query, and a file as it is.
    ///
    /// # Errors
    /// The daemon's, or that it cannot be reached.
    pub async fn upload<T: DeserializeOwned>(
        &self,
        path: &str,
        query: &impl Serialize,
        text: String,
    ) -> Result<T> {
        self.ask(Method::POST, path, query, Some(("text/plain", text.into_bytes()))).await
    }

    /// Asks, with a query and perhaps a body.
    ///
    /// # Errors
    /// The daemon's, or that it cannot be reached.
    pub async fn ask<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        query: &impl Serialize,
        body: Option<(&'static str, Vec<u8>)>,
    ) -> Result<T> {
        let query = serde_urlencoded::to_string(query).while_doing(|| "writing a query".into())?;
        let path = if query.is_empty() { path.to_owned() } else { format!("{path}?{query}") };
        let mut request = Request::builder().method(method).uri(path);
        if let Some((kind, _)) = &body {
            request = request.header(CONTENT_TYPE, *kind);
        }
        request = match &self.0 {
            Place::Socket(_) => request.header(HOST, "pavo"),
            Place::Host { host, token, .. } => request
                .header(HOST, host)
                .header(AUTHORIZATION, format!("Bearer {}", token.expose())),
        };
        let body = body.map_or_else(Bytes::new, |(_, body)| body.into());
        let request = request.body(Full::new(body)).while_doing(|| "writing a request".into())?;
        let (status, answer) = self.exchange(request).await.while_doing(|| self.doing())?;
        if status.is_success() {
            return serde_json::from_slice(&answer).while_doing(|| self.doing());
        }
        match serde_json::from_slice::<WireError>(&answer) {
            Ok(error) => Err(error.into()),
            Err(_) => {
                Err(Error::system(format!("it answers {status}"))).while_doing(|| self.doing())
            }
        }
    }

    fn doing(&self) -> String {
        match &self.0 {
            Place::Socket(path) => format!("asking the daemon at `{}`", path.display()),
            Place::Host { host, port, .. } => format!("asking the daemon at `{host}:{port}`"),
        }
    }

    async fn exchange(&self, request: Request<Full<Bytes>>) -> Result<(StatusCode, Bytes)> {
        match &self.0 {
            Place::Socket(path) => {
                let stream = UnixStream::connect(path).await.map_err(|error| {
                    Error::system("nobody listens there").because(error).help(
                        "see why: `systemctl status pavo-daemon`; without a daemon commands keep \
                         an inventory of your own: `PAVO_DAEMON=none`",
                    )
                })?;
                over(stream, request).await
            }
            Place::Host { host, port, trust, .. } => {
                let connect = TcpStream::connect((host.as_str(), *port));
                let late =
                    |_| Error::system(format!("no connection within {} s", CONNECT.as_secs()));
                let stream = timeout(CONNECT, connect).await.map_err(late)?;
                let stream = stream.while_doing(|| "connecting".into())?;
                let connector = TlsConnector::from(Arc::new(tls(trust)?));
                let name = ServerName::try_from(host.clone());
                let name = name.while_doing(|| "taking its name for TLS".into())?;
                let stream =
                    timeout(CONNECT, connector.connect(name, stream)).await.map_err(late)?;
                let stream = stream.map_err(|error| {
                    Error::system("it does not prove to be the daemon")
                        .because(error)
                        .help("name the authority of its certificate: `ca-cert` in daemon.yaml")
                })?;
                over(stream, request).await
            }
        }
    }
}

/// One request over a connection of its own.
async fn over(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    request: Request<Full<Bytes>>,
) -> Result<(StatusCode, Bytes)> {
    let work = async {
        let (mut ask, connection) = http1::handshake(TokioIo::new(stream)).await?;
        let turn = tokio::spawn(connection);
        let answer = ask.send_request(request).await?;
        let status = answer.status();
        let body = Limited::new(answer.into_body(), MAX_ANSWER).collect().await?.to_bytes();
        turn.abort();
        Ok::<_, Box<dyn std::error::Error + Send + Sync>>((status, body))
    };
    let late = |_| Error::system(format!("no answer within {} s", ANSWER.as_secs()));
    timeout(ANSWER, work).await.map_err(late)?.while_doing(|| "waiting for its answer".into())
}
