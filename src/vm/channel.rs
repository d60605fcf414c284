//! The secure channel between the processes of one cluster, on whichever hosts.
//!
//! Each cluster has an authority of its own. The launcher makes it, issues *one*
//! certificate and forgets the authority's key: whoever holds the [`Identity`] is of
//! the cluster, nobody can be added, and all ends with the job. It travels
//!
//! - to the tasks of a step sealed to the site's key, in the step's environment: root on
//!   each host opens it, and leaves it in a file that only the user reads;
//! - to those of a Slurm without a store, where there is no such key, by the step's standard
//!   input, which whoever listens on the network between the hosts can read;
//! - to commands by a 0600 file or the user's own part of the store.
//!
//! ```text
//! TCP · TLS 1.3, each side shows the certificate · the listener's greeting line · what the two have to say
//! ```
//!
//! In TLS 1.3 a client is done before the listener has looked at its certificate. The
//! greeting tells it that it was let in, so that [`connect`] fails where it is not.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64ct::{Base64, Encoding};
use nix::sys::socket::{setsockopt, sockopt};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use rustls::client::Resumption;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::{AlertDescription, CertificateError, ClientConfig, RootCertStore, ServerConfig};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_rustls::{TlsAcceptor, TlsConnector, TlsStream};

use crate::error::{Context, Error, Result};

/// An authenticated connection, of either side.
pub type Stream = TlsStream<TcpStream>;

/// The name that every member's certificate is for.
const NAME: &str = "pavo";
/// What a listener says to a member first.
const GREETING: &[u8; 7] = b"pavo 1\n";
/// How far the clocks of hosts may be behind.
const SKEW: Duration = Duration::from_secs(24 * 3600);
/// Longer than any site lets a job run.
const VALID: Duration = Duration::from_secs(400 * 24 * 3600);

/// How long somebody who connects may take to show who it is.
pub const HANDSHAKE: Duration = Duration::from_secs(10);
/// How many may knock before we open: all tasks of a cluster come at once, and one too
/// many would wait for seconds until it knocks again.
const BACKLOG: u32 = 4096;
/// How many may be at it at once; more wait, and make those hurry that are slow.
const HANDSHAKES: usize = 256;
/// How long a handshake may take while others wait.
const HURRIED: Duration = Duration::from_secs(1);
/// When who was too slow comes again.
const AGAIN: Duration = Duration::from_millis(100);
/// After this time without an answer to the first address, the next is tried too.
const STAGGER: Duration = Duration::from_millis(300);

/// What makes a process a member of its cluster. Whoever has it can do all that the
/// cluster's user can do to the cluster's VMs.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// DER, as are the others.
    authority: Secret,
    certificate: Secret,
    key: Secret,
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Identity(…)")
    }
}

/// Bytes that are base64 in JSON, and never shown.
#[derive(Clone, PartialEq, Eq)]
struct Secret(Vec<u8>);

impl Serialize for Secret {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&Base64::encode_string(&self.0))
    }
}

impl<'de> Deserialize<'de> for Secret {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        // The text itself is kept out of the error.
        Base64::decode_vec(&text).map(Self).map_err(|_| serde::de::Error::custom("no base64"))
    }
}

impl Identity {
    /// A new authority, and the certificate it issues; `owner` is for people who look at it.
    ///
    /// # Errors
    /// When there is no randomness.
    pub fn generate(owner: &str) -> Result<Self> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        issue(owner, now).while_doing(|| "making the cluster's certificate".into())
    }

    /// What a listener needs.
    ///
    /// # Errors
    /// When this is no identity that was generated here.
    pub fn server(&self) -> Result<TlsAcceptor> {
        let doing = || "preparing the cluster's secure channel".to_owned();
        let roots = Arc::new(self.roots()?);
        let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider()).build();
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .while_doing(doing)?
            .with_client_cert_verifier(verifier.while_doing(doing)?)
            .with_single_cert(self.chain(), self.private_key())
            .while_doing(doing)?;
        // Connections are few and long: each shows its certificate.
        config.send_tls13_tickets = 0;
        Ok(TlsAcceptor::from(Arc::new(config)))
    }

    /// What one who connects needs.
    ///
    /// # Errors
    /// As [`server`](Self::server).
    pub fn client(&self) -> Result<TlsConnector> {
        let doing = || "preparing the cluster's secure channel".to_owned();
        let mut config = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .while_doing(doing)?
            .with_root_certificates(self.roots()?)
            .with_client_auth_cert(self.chain(), self.private_key())
            .while_doing(doing)?;
        config.resumption = Resumption::disabled();
        Ok(TlsConnector::from(Arc::new(config)))
    }

    fn roots(&self) -> Result<RootCertStore> {
        let mut roots = RootCertStore::empty();
        let authority = CertificateDer::from(self.authority.0.clone());
        roots.add(authority).while_doing(|| "reading the cluster's authority".into())?;
        Ok(roots)
    }

    fn chain(&self) -> Vec<CertificateDer<'static>> {
        vec![CertificateDer::from(self.certificate.0.clone())]
    }

    fn private_key(&self) -> PrivateKeyDer<'static> {
        PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(self.key.0.clone()))
    }
}

fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// `since_epoch` is what the clock of this host says.
fn issue(owner: &str, since_epoch: Duration) -> Result<Identity, rcgen::Error> {
    let now = rcgen::date_time_ymd(1970, 1, 1) + since_epoch;
    let params = |title: String, names: Vec<String>| {
        let mut params = CertificateParams::new(names)?;
        params.distinguished_name.push(DnType::CommonName, title);
        (params.not_before, params.not_after) = (now - SKEW, now + VALID);
        Ok::<_, rcgen::Error>(params)
    };

    let mut authority = params(format!("pavo cluster {owner}"), Vec::new())?;
    authority.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    authority.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    let authority_key = KeyPair::generate()?;
    let authority_certificate = authority.self_signed(&authority_key)?;
    let authority = Issuer::new(authority, authority_key);

    let mut member = params(format!("pavo member {owner}"), vec![NAME.into()])?;
    member.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    member.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    member.use_authority_key_identifier_extension = true;
    let key = KeyPair::generate()?;
    let certificate = member.signed_by(&key, &authority)?;
    // The authority's key goes here: nobody else is ever let in.
    Ok(Identity {
        authority: Secret(authority_certificate.der().to_vec()),
        certificate: Secret(certificate.der().to_vec()),
        key: Secret(key.serialize_der()),
    })
}

/// A member that connects to others. Prepared once, it serves for many; clones share it.
#[derive(Clone)]
pub struct Caller(TlsConnector);

impl fmt::Debug for Caller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Caller(…)")
    }
}

impl Caller {
    /// # Errors
    /// When the identity is none.
    pub fn new(identity: &Identity) -> Result<Self> {
        identity.client().map(Self)
    }

    /// Connects to whichever of `addresses` (of one process) answers first as a member of
    /// the cluster; all together may take `limit`.
    ///
    /// # Errors
    /// When none does: what is wrong with each.
    pub async fn connect(&self, addresses: &[SocketAddr], limit: Duration) -> Result<Stream> {
        let deadline = Instant::now() + limit;
        let mut reasons: Vec<Option<String>> = vec![None; addresses.len()];
        let mut tries = JoinSet::new();
        let mut rest = addresses.iter().copied().enumerate();
        let mut next = rest.next();
        let mut stagger = Instant::now();
        while next.is_some() || !tries.is_empty() {
            tokio::select! {
                () = sleep_until(deadline) => break,
                () = sleep_until(stagger), if next.is_some() => {
                    let Some((index, address)) = next.take() else { continue };
                    let connector = self.0.clone();
                    tries.spawn(async move { (index, reach(address, &connector).await) });
                    next = rest.next();
                    stagger = Instant::now() + STAGGER;
                }
                Some(Ok((index, outcome))) = tries.join_next() => match outcome {
                    Ok(stream) => return Ok(stream),
                    Err(reason) => {
                        reasons[index] = Some(reason);
                        stagger = Instant::now();
                    }
                },
            }
        }
        let said = addresses.iter().zip(reasons).map(|(address, reason)| {
            let reason = reason.unwrap_or_else(|| format!("no answer within {limit:?}"));
            format!("{address}: {reason}")
        });
        let said = said.collect::<Vec<_>>().join("; ");
        Err(Error::system("no secure connection to the cluster's process")
            .because(if said.is_empty() { "it has no address".into() } else { said }))
    }
}

/// As [`Caller::connect`], for one connection.
///
/// # Errors
/// As that.
pub async fn connect(
    addresses: &[SocketAddr],
    identity: &Identity,
    limit: Duration,
) -> Result<Stream> {
    Caller::new(identity)?.connect(addresses, limit).await
}

/// One address; fails with the reason, as a fragment. A listener to whom very many come makes
/// those hurry that are slow, and who was turned away so comes again.
async fn reach(address: SocketAddr, connector: &TlsConnector) -> Result<Stream, String> {
    loop {
        let begin = Instant::now();
        match greeted(address, connector).await {
            Ok((stream, greeting)) if &greeting == GREETING => return Ok(stream.into()),
            Ok(_) => return Err("another version of pavo listens there".into()),
            Err(error) if hung_up(&error) && begin.elapsed() >= HURRIED => sleep(AGAIN).await,
            Err(error) => return Err(explain(&error)),
        }
    }
}

/// A connection, and what is said there first.
async fn greeted(
    address: SocketAddr,
    connector: &TlsConnector,
) -> io::Result<(tokio_rustls::client::TlsStream<TcpStream>, [u8; GREETING.len()])> {
    let tcp = TcpStream::connect(address).await?;
    keep_watch(&tcp)?;
    let name = ServerName::try_from(NAME).map_err(io::Error::other)?;
    let mut stream = connector.connect(name, tcp).await?;
    let mut greeting = [0; GREETING.len()];
    stream.read_exact(&mut greeting).await?;
    Ok((stream, greeting))
}

fn hung_up(error: &io::Error) -> bool {
    let kinds =
        [io::ErrorKind::UnexpectedEof, io::ErrorKind::ConnectionReset, io::ErrorKind::BrokenPipe];
    kinds.contains(&error.kind())
}

/// What is wrong with a connection, as people would say it.
fn explain(error: &io::Error) -> String {
    let tls = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
    let clocks = "its certificate is not valid at this time: do the clocks of the hosts differ?";
    match (tls, error.kind()) {
        (Some(rustls::Error::InvalidCertificate(why)), _) => match why {
            CertificateError::Expired
            | CertificateError::ExpiredContext { .. }
            | CertificateError::NotValidYet
            | CertificateError::NotValidYetContext { .. } => clocks.into(),
            _ => "what listens there is not of this cluster".into(),
        },
        (Some(rustls::Error::AlertReceived(AlertDescription::CertificateExpired)), _) => {
            clocks.replace("its", "our")
        }
        (Some(rustls::Error::AlertReceived(_)), _) => {
            "it does not take us for a member of its cluster".into()
        }
        (Some(rustls::Error::InvalidMessage(_)), _) => "what listens there is not pavo".into(),
        (_, io::ErrorKind::ConnectionRefused) => "refused: nobody listens there".into(),
        _ if hung_up(error) => "it hung up at once".into(),
        _ => error.to_string(),
    }
}

/// Lets a connection whose other host has vanished end within a minute, and sends
/// small messages at once.
fn keep_watch(tcp: &TcpStream) -> io::Result<()> {
    tcp.set_nodelay(true)?;
    let fd = tcp.as_fd();
    setsockopt(&fd, sockopt::KeepAlive, &true)?;
    setsockopt(&fd, sockopt::TcpKeepIdle, &20)?;
    setsockopt(&fd, sockopt::TcpKeepInterval, &10)?;
    setsockopt(&fd, sockopt::TcpKeepCount, &4)?;
    Ok(setsockopt(&fd, sockopt::TcpUserTimeout, &60_000)?)
}

/// Where members of the cluster connect to. Strangers see a handshake that fails, and
/// are counted.
pub struct Listener {
    tcp: TcpListener,
    acceptor: TlsAcceptor,
    limit: Duration,
    handshakes: JoinSet<Option<Stream>>,
    /// When each began, oldest first; some may be over. Those made to hurry are gone.
    begun: VecDeque<(Instant, AbortHandle)>,
    dropped: u64,
}

impl fmt::Debug for Listener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Listener({:?})", self.tcp.local_addr())
    }
}

impl Listener {
    /// # Errors
    /// When the identity is none.
    pub fn new(tcp: TcpListener, identity: &Identity) -> Result<Self> {
        let acceptor = identity.server()?;
        let (handshakes, begun) = (JoinSet::new(), VecDeque::new());
        Ok(Self { tcp, acceptor, limit: HANDSHAKE, handshakes, begun, dropped: 0 })
    }

    /// Listens at `address`, whose port 0 means any.
    ///
    /// # Errors
    /// When that is not possible.
    pub fn bind(address: SocketAddr, identity: &Identity) -> Result<Self> {
        let listen = || {
            let socket = match address {
                SocketAddr::V4(_) => TcpSocket::new_v4(),
                SocketAddr::V6(_) => TcpSocket::new_v6(),
            }?;
            socket.bind(address)?;
            socket.listen(BACKLOG)
        };
        Self::new(listen().while_doing(|| format!("listening at {address}"))?, identity)
    }

    /// Another limit than [`HANDSHAKE`].
    #[must_use]
    pub fn with_limit(self, limit: Duration) -> Self {
        Self { limit, ..self }
    }

    /// # Errors
    /// The system's.
    pub fn address(&self) -> Result<SocketAddr> {
        self.tcp.local_addr().while_doing(|| "finding the listener's port".into())
    }

    /// How many have connected that were no members, or too slow.
    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    /// The next member that connects. May be dropped and called again at any time.
    pub async fn accept(&mut self) -> Stream {
        loop {
            if self.begun.len() >= HANDSHAKES {
                self.begun.retain(|(_, handshake)| !handshake.is_finished());
            }
            let full = self.begun.len() >= HANDSHAKES;
            let hurry = self.begun.front().map(|(since, _)| *since + HURRIED);
            tokio::select! {
                // A member that is there goes before strangers that may come.
                biased;
                Some(done) = self.handshakes.join_next() => match done {
                    Ok(Some(stream)) => return stream,
                    Ok(None) | Err(_) => self.dropped += 1,
                },
                () = sleep_until(hurry.unwrap_or_else(Instant::now)), if full => {
                    self.begun.pop_front().inspect(|(_, handshake)| handshake.abort());
                }
                connection = self.tcp.accept(), if !full => match connection {
                    Ok((tcp, _)) => self.begin(tcp),
                    // Out of descriptors: connections that end will free some.
                    Err(error) => {
                        tracing::warn!("the secure channel: {error}");
                        sleep(Duration::from_millis(100)).await;
                    }
                },
            }
        }
    }

    fn begin(&mut self, tcp: TcpStream) {
        let (acceptor, limit) = (self.acceptor.clone(), self.limit);
        let handshake = self.handshakes.spawn(async move {
            let shaken = async {
                keep_watch(&tcp)?;
                let mut stream = acceptor.accept(tcp).await?;
                stream.write_all(GREETING).await?;
                stream.flush().await?;
                Ok::<_, io::Error>(stream)
            };
            match timeout(limit, shaken).await {
                Ok(Ok(stream)) => Some(stream.into()),
                Ok(Err(error)) => {
                    tracing::debug!("the secure channel: a stranger: {error}");
                    None
                }
                Err(_) => None,
            }
        });
        self.begun.push_back((Instant::now(), handshake));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(20);

    async fn listener(identity: &Identity) -> (Listener, SocketAddr) {
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let listener = Listener::bind(any, identity).unwrap();
        let address = listener.address().unwrap();
        (listener, address)
    }

    async fn join(address: SocketAddr, identity: &Identity) -> Result<Stream> {
        connect(&[address], identity, LIMIT).await
    }

    #[tokio::test]
    async fn a_member_that_was_too_slow_comes_again() {
        let identity = Identity::generate("7").unwrap();
        let tcp = TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0))).await.unwrap();
        let address = tcp.local_addr().unwrap();
        let accepting = async {
            let hurried = tcp.accept().await.unwrap();
            sleep(HURRIED + AGAIN).await;
            drop(hurried);
            Listener::new(tcp, &identity).unwrap().accept().await
        };
        let (_ours, theirs) = tokio::join!(accepting, join(address, &identity));
        theirs.unwrap();
    }

    #[tokio::test]
    async fn members_hear_each_other() {
        let identity = Identity::generate("l3").unwrap();
        let (mut listener, address) = listener(&identity).await;
        let connecting = join(address, &identity);
        let (mut ours, theirs) = tokio::join!(listener.accept(), connecting);
        let mut theirs = theirs.unwrap();
        theirs.write_all(b"to").await.unwrap();
        theirs.flush().await.unwrap();
        ours.write_all(b"fro").await.unwrap();
        ours.shutdown().await.unwrap();
        let mut said = [0; 2];
        ours.read_exact(&mut said).await.unwrap();
        assert_eq!(&said, b"to");
        let mut said = String::new();
        theirs.read_to_string(&mut said).await.unwrap();
        assert_eq!(said, "fro");
        assert_eq!(listener.dropped(), 0);
    }

    #[test]
    fn an_identity_is_small_and_keeps_its_key_to_itself() {
        let identity = Identity::generate("99999999").unwrap();
        let text = serde_json::to_string(&identity).unwrap();
        assert!(text.len() < 4096, "{}", text.len());
        assert_eq!(serde_json::from_str::<Identity>(&text).unwrap(), identity);
        assert_eq!(format!("{identity:?}"), "Identity(…)");
        let broken = text.replace("\"key\":\"", "\"key\":\"!");
        let error = serde_json::from_str::<Identity>(&broken).unwrap_err().to_string();
        assert!(error.starts_with("no base64"), "{error}");
        let key = Base64::encode_string(&identity.key.0);
        assert!(!error.contains(&key[..8]));
    }

    #[tokio::test]
    async fn another_clusters_member_is_a_stranger_on_either_side() {
        // The same job id, used again: the names are the same, too.
        let (ours, theirs) = (Identity::generate("7").unwrap(), Identity::generate("7").unwrap());
        let (mut listener, address) = listener(&ours).await;
        let refused = tokio::select! {
            _ = listener.accept() => panic!("it is let in"),
            error = join(address, &theirs) => error.unwrap_err().report(),
        };
        let said = format!("because: {address}: what listens there is not of this cluster");
        assert!(refused.contains(&said), "{refused}");

        // One that takes anybody's certificate but shows a foreign one itself.
        let trusting = Identity { authority: ours.authority.clone(), ..theirs };
        let refused = tokio::select! {
            _ = listener.accept() => panic!("it is let in"),
            error = join(address, &trusting) => error.unwrap_err().report(),
        };
        assert!(refused.contains("it does not take us for a member"), "{refused}");
    }

    #[tokio::test]
    async fn clocks_may_be_off_by_hours_and_more_is_named() {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        let hours = |count: u64| Duration::from_secs(count * 3600);
        // The launcher's host is behind, or ahead.
        for launcher in [now - hours(300 * 24), now - hours(1), now + hours(1), now + hours(23)] {
            let identity = issue("7", launcher).unwrap();
            let (mut listener, address) = listener(&identity).await;
            let (_member, connected) = tokio::join!(listener.accept(), join(address, &identity));
            connected.unwrap();
        }
        for launcher in [now + hours(25), now - hours(401 * 24)] {
            let identity = issue("7", launcher).unwrap();
            let (mut listener, address) = listener(&identity).await;
            tokio::select! {
                _ = listener.accept() => panic!("it is let in"),
                refused = join(address, &identity) => {
                    let refused = refused.unwrap_err().report();
                    assert!(refused.contains("do the clocks of the hosts differ?"), "{refused}");
                }
            }
        }
    }

    #[tokio::test]
    async fn without_a_certificate_nobody_is_let_in() {
        let identity = Identity::generate("7").unwrap();
        let (mut listener, address) = listener(&identity).await;
        let config = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_root_certificates(identity.roots().unwrap())
            .with_no_client_auth();
        let nobody = TlsConnector::from(Arc::new(config));
        tokio::select! {
            _ = listener.accept() => panic!("it is let in"),
            reason = reach(address, &nobody) => {
                let reason = reason.unwrap_err();
                assert!(reason.contains("it does not take us for a member"), "{reason}");
            }
        }
    }

    #[tokio::test]
    async fn an_address_that_does_not_answer_is_named_and_another_is_taken() {
        let identity = Identity::generate("7").unwrap();
        let (mut listener, address) = listener(&identity).await;
        // Bound and not listening: refused. A full backlog: silence.
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.bind(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
        let dead = socket.local_addr().unwrap();
        let error = connect(&[dead], &identity, LIMIT).await.unwrap_err().report();
        assert!(error.contains(&format!("{dead}: refused: nobody listens there")), "{error}");

        let mute = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let silent = mute.local_addr().unwrap();
        let soon = Duration::from_millis(200);
        let error = connect(&[silent], &identity, soon).await.unwrap_err().report();
        assert!(error.contains(&format!("{silent}: no answer within 200ms")), "{error}");

        let addresses = [dead, silent, address];
        let connecting = connect(&addresses, &identity, LIMIT);
        let (_, connected) = tokio::join!(listener.accept(), connecting);
        assert_eq!(connected.unwrap().get_ref().0.peer_addr().unwrap(), address);
    }

    #[tokio::test]
    async fn strangers_that_dawdle_block_nobody_and_are_dropped_at_the_limit() {
        let identity = Identity::generate("7").unwrap();
        let (listener, address) = listener(&identity).await;
        let mut listener = listener.with_limit(Duration::from_secs(3));
        let mut slow = Vec::new();
        // Nothing, part of a handshake, and noise.
        for said in [&b""[..], b"\x16\x03\x01\x02\x00\x01", b"GET / HTTP/1.1\r\n\r\n"] {
            let mut stranger = TcpStream::connect(address).await.unwrap();
            stranger.write_all(said).await.unwrap();
            slow.push(stranger);
        }
        let begin = Instant::now();
        let (_member, connected) = tokio::join!(listener.accept(), join(address, &identity));
        connected.unwrap();
        assert!(listener.dropped() <= 1, "noise only");
        let closed = async {
            for stranger in &mut slow {
                let mut answer = Vec::new();
                // Whether by end or by reset.
                let _ = stranger.read_to_end(&mut answer).await;
            }
        };
        tokio::select! {
            _ = listener.accept() => panic!("somebody is let in"),
            () = closed => assert!(begin.elapsed() >= Duration::from_millis(2900)),
        }
        // The last may have been closed just before it is counted.
        let _ = timeout(Duration::from_millis(50), listener.accept()).await;
        assert_eq!(listener.dropped(), 3);
    }

    #[tokio::test]
    async fn a_crowd_of_strangers_keeps_a_member_waiting_for_a_moment_only() {
        let identity = Identity::generate("7").unwrap();
        let (mut listener, address) = listener(&identity).await;
        let mut crowd = Vec::new();
        for _ in 0..HANDSHAKES + 10 {
            crowd.push(TcpStream::connect(address).await.unwrap());
        }
        let begin = Instant::now();
        let (_, connected) = tokio::join!(listener.accept(), join(address, &identity));
        connected.unwrap();
        assert!(begin.elapsed() >= HURRIED && begin.elapsed() < HANDSHAKE);
    }
}
