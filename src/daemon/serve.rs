//! Connections: where they come from, how many there are, how long they may take.

use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use hyper::Request;
use hyper::body::Incoming;
use hyper::header::AUTHORIZATION;
use hyper::server::conn::http1;
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use nix::fcntl::{Flock, FlockArg};
use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;

use super::caller::{Caller, Tokens, of_process};
use super::metrics::Metrics;
use crate::config::Daemon;
use crate::error::{Context, Error, Result};

/// How many connections there may be; who comes then waits in the kernel's queue.
const MOST: usize = 1024;

/// How long a caller may take to say what it wants, and to shake hands before.
const HEAD: Duration = Duration::from_secs(10);

/// How long those who are being answered have when the daemon ends.
const FAREWELL: Duration = Duration::from_secs(10);

/// A socket's place on disk, and that it is ours.
#[derive(Debug)]
struct Place {
    socket: PathBuf,
    _lock: Flock<std::fs::File>,
}

impl Drop for Place {
    fn drop(&mut self) {
        // Who asks then is told that nobody is there, at once.
        let _ = std::fs::remove_file(&self.socket);
    }
}

/// Where the daemon listens.
pub struct Listeners {
    unix: UnixListener,
    place: Place,
    tls: Option<(TcpListener, TlsAcceptor)>,
    admin_group: String,
    tokens: Arc<Tokens>,
}

impl Listeners {
    /// Listens.
    ///
    /// # Errors
    /// When another daemon has the socket, or a certificate cannot be read.
    pub async fn open(config: &Daemon) -> Result<Self> {
        let place = lock(&config.socket)?;
        let doing = || format!("listening at `{}`", config.socket.display());
        match std::fs::remove_file(&config.socket) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(error).while_doing(doing);
            }
            _ => {}
        }
        let unix = UnixListener::bind(&config.socket).while_doing(doing)?;
        // Who is at the other end is asked of the kernel.
        let all = std::fs::Permissions::from_mode(0o666);
        std::fs::set_permissions(&config.socket, all).while_doing(doing)?;
        let tls = match (config.listen, &config.certificate, &config.key) {
            (Some(address), Some(certificate), Some(key)) => {
                let doing = || format!("listening at {address}");
                let acceptor = acceptor(certificate, key).while_doing(doing)?;
                Some((TcpListener::bind(address).await.while_doing(doing)?, acceptor))
            }
            _ => None,
        };
        let tokens = Arc::new(Tokens::of(&config.state));
        Ok(Self { unix, place, tls, admin_group: config.admin_group.clone(), tokens })
    }

    /// Where it listens for other hosts.
    pub fn address(&self) -> Option<SocketAddr> {
        self.tls.as_ref().and_then(|(listener, _)| listener.local_addr().ok())
    }

    /// Answers until `stop` says so, and then those who have asked already.
    pub async fn serve(self, api: Router, metrics: Arc<Metrics>, stop: watch::Receiver<bool>) {
        let room = Arc::new(Semaphore::new(MOST));
        let mut ending = stop.clone();
        loop {
            let Ok(place) = room.clone().acquire_owned().await else { break };
            let guest =
                Guest { api: api.clone(), metrics: metrics.clone(), stop: stop.clone(), place };
            tokio::select! {
                () = told(&mut ending) => break,
                accepted = self.unix.accept() => match accepted {
                    Ok((stream, _)) => drop(tokio::spawn(guest.near(stream, self.admin_group.clone()))),
                    Err(error) => pause(&error).await,
                },
                accepted = accept(self.tls.as_ref()) => match accepted {
                    Ok((stream, acceptor)) => {
                        drop(tokio::spawn(guest.far(stream, acceptor, self.tokens.clone())));
                    }
                    Err(error) => pause(&error).await,
                },
            }
        }
        drop(self.place);
        let all = u32::try_from(MOST).unwrap_or(u32::MAX);
        // Who is not done then is cut off.
        let _ = timeout(FAREWELL, room.acquire_many(all)).await;
    }
}

/// Waits until it is said, or nobody is left to say it.
async fn told(stop: &mut watch::Receiver<bool>) {
    let _ = stop.wait_for(|stop| *stop).await;
}

/// Out of descriptors, most likely: others will be closed.
async fn pause(error: &std::io::Error) {
    tracing::warn!("a caller could not be let in: {error}");
    sleep(Duration::from_millis(100)).await;
}

async fn accept(
    tls: Option<&(TcpListener, TlsAcceptor)>,
) -> std::io::Result<(tokio::net::TcpStream, TlsAcceptor)> {
    match tls {
        Some((listener, acceptor)) => Ok((listener.accept().await?.0, acceptor.clone())),
        None => std::future::pending().await,
    }
}

/// A connection, and what it takes to answer it.
struct Guest {
    api: Router,
    metrics: Arc<Metrics>,
    stop: watch::Receiver<bool>,
    place: OwnedSemaphorePermit,
}

impl Guest {
    /// From this host.
    async fn near(self, stream: UnixStream, admin_group: String) {
        let Ok(peer) = stream.peer_cred() else { return };
        // Directories of users may be slow, and then only this caller waits.
        let find = move || of_process(peer.uid(), peer.gid(), &admin_group);
        let Ok(caller) = tokio::task::spawn_blocking(find).await else { return };
        self.answer(stream, move |_| Some(caller.clone())).await;
    }

    /// From another host.
    async fn far(self, stream: tokio::net::TcpStream, acceptor: TlsAcceptor, tokens: Arc<Tokens>) {
        let Ok(Ok(stream)) = timeout(HEAD, acceptor.accept(stream)).await else { return };
        let caller = move |request: &Request<Incoming>| {
            let said = request.headers().get(AUTHORIZATION)?.to_str().ok()?;
            let (scheme, token) = said.split_once(' ')?;
            scheme.eq_ignore_ascii_case("bearer").then(|| tokens.caller(token.trim())).flatten()
        };
        self.answer(stream, caller).await;
    }

    async fn answer(
        self,
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
        caller: impl Fn(&Request<Incoming>) -> Option<Caller> + Send + Sync + 'static,
    ) {
        self.metrics.connected();
        let api = TowerToHyperService::new(self.api.clone());
        let service = service_fn(move |mut request: Request<Incoming>| {
            if let Some(caller) = caller(&request) {
                request.extensions_mut().insert(caller);
            }
            api.call(request.map(Body::new))
        });
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD)
            .max_buf_size(64 << 10)
            .serve_connection(TokioIo::new(stream), service);
        let mut connection = std::pin::pin!(connection);
        let mut stop = self.stop.clone();
        tokio::select! {
            _ = connection.as_mut() => {}
            () = told(&mut stop) => {
                connection.as_mut().graceful_shutdown();
                // A caller that goes away is its own affair.
                let _ = timeout(FAREWELL, connection).await;
            }
        }
        self.metrics.disconnected();
        drop(self.place);
    }
}

/// Makes sure that no other daemon on this host has the socket.
fn lock(socket: &Path) -> Result<Place> {
    let file = socket.with_extension("lock");
    let doing = || format!("taking `{}`", file.display());
    if let Some(dir) = socket.parent() {
        std::fs::create_dir_all(dir).while_doing(doing)?;
    }
    let opened = std::fs::OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&file)
        .while_doing(doing)?;
    match Flock::lock(opened, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(Place { socket: socket.to_owned(), _lock: lock }),
        Err((_, nix::errno::Errno::EWOULDBLOCK)) => {
            let what = format!("another daemon listens at `{}`", socket.display());
            Err(Error::system(what).help("see which: `pavo service list`"))
        }
        Err((_, error)) => Err(error).while_doing(doing),
    }
}

fn acceptor(certificate: &Path, key: &Path) -> Result<TlsAcceptor> {
    let reading = |file: &Path| format!("reading `{}`", file.display());
    let chain: Vec<CertificateDer> = CertificateDer::pem_file_iter(certificate)
        .and_then(Iterator::collect)
        .while_doing(|| reading(certificate))?;
    let private = PrivateKeyDer::from_pem_file(key).while_doing(|| reading(key))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .while_doing(|| "preparing TLS".into())?
        .with_no_client_auth()
        .with_single_cert(chain, private)
        .while_doing(|| reading(certificate))?;
    Ok(TlsAcceptor::from(Arc::new(config)))
}
