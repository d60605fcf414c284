//! A controller's side of Redfish: one system, its power and its boot device.

use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use base64ct::{Base64, Encoding};
use nix::sys::socket::{setsockopt, sockopt};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio_rustls::TlsAcceptor;

use crate::{Bmc, Manner, USER, index, lock};

const SYSTEM: &str = "/redfish/v1/Systems/1";
const RESET: &str = "/redfish/v1/Systems/1/Actions/ComputerSystem.Reset";

/// Whether there is TLS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tls {
    None,
    /// With a certificate that they signed themselves, the same for all.
    Own,
}

/// They speak Redfish until this is dropped.
#[derive(Debug)]
pub struct Redfish {
    port: u16,
    certificate: Option<(Vec<u8>, String)>,
    over: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Redfish {
    fn drop(&mut self) {
        drop(self.over.take());
        if let Some(thread) = self.thread.take() {
            // What it panicked with was printed.
            let _ = thread.join();
        }
    }
}

impl Redfish {
    pub(crate) fn start(all: Arc<Mutex<Vec<Bmc>>>, tls: Tls) -> io::Result<Self> {
        let listener = std::net::TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        setsockopt(&listener.as_fd(), sockopt::BindToDevice, &"lo".into())?;
        listener.set_nonblocking(true)?;
        let port = listener.local_addr()?.port();
        let (certificate, acceptor) = match tls {
            Tls::None => (None, None),
            Tls::Own => {
                let (der, pem, acceptor) = own_certificate().map_err(io::Error::other)?;
                (Some((der, pem)), Some(acceptor))
            }
        };
        let (over, mut ended) = oneshot::channel::<()>();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let thread = std::thread::Builder::new().name("redfish".into()).spawn(move || {
            runtime.block_on(async {
                tokio::select! {
                    () = serve(listener, all, acceptor) => {}
                    _ = &mut ended => {}
                }
            });
        })?;
        Ok(Self { port, certificate, over: Some(over), thread: Some(thread) })
    }

    /// The TCP port of all of them.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Their certificate, as bytes.
    ///
    /// # Panics
    /// Without TLS.
    pub fn certificate(&self) -> &[u8] {
        &self.certificate.as_ref().expect("TLS").0
    }

    /// Their certificate, as text.
    ///
    /// # Panics
    /// Without TLS.
    pub fn pem(&self) -> &str {
        &self.certificate.as_ref().expect("TLS").1
    }
}

type Failed = Box<dyn std::error::Error + Send + Sync>;

/// For the first hundred of them.
fn own_certificate() -> Result<(Vec<u8>, String, TlsAcceptor), Failed> {
    let names: Vec<String> = (0..100).map(|it| crate::Bmcs::address(it).to_string()).collect();
    let key = rcgen::KeyPair::generate()?;
    let certificate = rcgen::CertificateParams::new(names)?.self_signed(&key)?;
    let secret = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(vec![certificate.der().clone()], secret)?;
    let pem = format!(
        "-----BEGIN CERTIFICATE-----\n{}\n-----END CERTIFICATE-----\n",
        Base64::encode_string(certificate.der())
    );
    Ok((certificate.der().to_vec(), pem, TlsAcceptor::from(Arc::new(config))))
}

async fn serve(
    listener: std::net::TcpListener,
    all: Arc<Mutex<Vec<Bmc>>>,
    acceptor: Option<TlsAcceptor>,
) {
    let listener = TcpListener::from_std(listener).expect("a listener");
    while let Ok((stream, _)) = listener.accept().await {
        let (all, acceptor) = (all.clone(), acceptor.clone());
        tokio::spawn(async move {
            // Whoever hangs up has what was wanted.
            let _ = connection(stream, all, acceptor).await;
        });
    }
}

async fn connection(
    stream: TcpStream,
    all: Arc<Mutex<Vec<Bmc>>>,
    acceptor: Option<TlsAcceptor>,
) -> io::Result<()> {
    let IpAddr::V4(address) = stream.local_addr()?.ip() else { return Ok(()) };
    let Some(index) = index(address, lock(&all).len()) else { return Ok(()) };
    match acceptor {
        None => requests(stream, &all, index).await,
        Some(acceptor) => requests(acceptor.accept(stream).await?, &all, index).await,
    }
}

async fn requests<S>(stream: S, all: &Mutex<Vec<Bmc>>, index: usize) -> io::Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut stream = BufReader::new(stream);
    loop {
        let mut line = String::new();
        stream.read_line(&mut line).await?;
        let mut words = line.split_ascii_whitespace();
        let (Some(method), Some(path)) = (words.next(), words.next()) else { return Ok(()) };
        let (mut length, mut login) = (0, String::new());
        loop {
            let mut header = String::new();
            stream.read_line(&mut header).await?;
            let Some((name, value)) = header.trim().split_once(':') else { break };
            match name.to_ascii_lowercase().as_str() {
                "content-length" => length = value.trim().parse().map_err(io::Error::other)?,
                "authorization" => login = value.trim().to_owned(),
                _ => {}
            }
        }
        let mut body = vec![0; length];
        stream.read_exact(&mut body).await?;
        let body = serde_json::from_slice(&body).unwrap_or(Value::Null);
        let (delay, manner, (status, answer)) = {
            let mut all = lock(all);
            let bmc = &mut all[index];
            bmc.packets += 1;
            bmc.settle();
            (bmc.delay, bmc.manner, answer(bmc, method, path, &login, &body))
        };
        tokio::time::sleep(delay).await;
        if manner == Manner::Dead {
            return std::future::pending().await;
        }
        if manner == Manner::Unconfirmed && method == "POST" {
            return Ok(());
        }
        let text = if answer.is_null() { String::new() } else { answer.to_string() };
        say(&mut stream, manner, status, &text).await?;
    }
}

async fn say<S>(stream: &mut S, manner: Manner, status: u16, text: &str) -> io::Result<()>
where
    S: AsyncWrite + Unpin,
{
    let head = format!("HTTP/1.1 {status} So\r\nETag: \"1\"\r\nContent-Type: application/json\r\n");
    match manner {
        Manner::Noise => {
            // It does not end.
            stream
                .write_all(format!("{head}Content-Length: 99999999999\r\n\r\n").as_bytes())
                .await?;
            loop {
                stream.write_all(&[b'['; 1 << 16]).await?;
            }
        }
        Manner::Truncated => {
            let half = &text[..text.len() / 2];
            let text = format!("{head}Content-Length: {}\r\n\r\n{half}", text.len());
            stream.write_all(text.as_bytes()).await?;
            stream.flush().await?;
            Err(io::ErrorKind::Other.into())
        }
        _ => {
            let text = format!("{head}Content-Length: {}\r\n\r\n{text}", text.len());
            stream.write_all(text.as_bytes()).await?;
            stream.flush().await
        }
    }
}

fn refused(status: u16, why: &str) -> (u16, Value) {
    (status, json!({ "error": { "message": why } }))
}

fn answer(bmc: &mut Bmc, method: &str, path: &str, login: &str, body: &Value) -> (u16, Value) {
    let known = Base64::encode_string(format!("{USER}:{}", bmc.password).as_bytes());
    if login != format!("Basic {known}") {
        return refused(401, "who are you?");
    }
    match (bmc.manner, method, path) {
        (Manner::Busy | Manner::Full, ..) => refused(503, "later"),
        // All it says leads elsewhere.
        (Manner::WrongSession, ..) => {
            (200, json!({ "Members": [{ "@odata.id": "http://127.0.0.1:1/" }] }))
        }
        (_, "GET", path) if path.starts_with("/redfish/v1/Systems") && path != SYSTEM => {
            page(bmc, path)
        }
        (_, "GET", SYSTEM) => (200, system(bmc)),
        (_, "PATCH", SYSTEM) => boot(bmc, body),
        (_, "POST", RESET) => reset(bmc, body),
        _ => refused(404, "there is no such page"),
    }
}

/// A page of its systems, `…/Systems` or `…/Systems?page=2`.
fn page(bmc: &Bmc, path: &str) -> (u16, Value) {
    let page = path.split_once("?page=").map_or(Some(1), |(_, page)| page.parse().ok());
    match page {
        Some(page) if page == bmc.pages => (200, json!({ "Members": [{ "@odata.id": SYSTEM }] })),
        Some(page) if page < bmc.pages => {
            let next = format!("/redfish/v1/Systems?page={}", page + 1);
            (200, json!({ "Members": [], "Members@odata.nextLink": next }))
        }
        _ => refused(404, "there is no such page"),
    }
}

/// The words of Redfish and the numbers of IPMI.
const DEVICES: [(&str, u8); 5] = [("None", 0), ("Pxe", 1), ("Hdd", 2), ("Cd", 5), ("BiosSetup", 6)];

fn system(bmc: &Bmc) -> Value {
    let device = DEVICES.iter().find(|(_, number)| *number == bmc.boot[1] >> 2);
    let enabled = match bmc.boot[0] & 0xc0 {
        0xc0 => "Continuous",
        0x80 => "Once",
        _ => "Disabled",
    };
    let words: Vec<&str> = DEVICES.iter().map(|(word, _)| *word).collect();
    json!({
        "PowerState": bmc.said_state.unwrap_or(if bmc.on { "On" } else { "Off" }),
        "Boot": {
            "BootSourceOverrideEnabled": enabled,
            "BootSourceOverrideTarget": device.map_or("None", |(word, _)| word),
            "BootSourceOverrideTarget@Redfish.AllowableValues": words,
        },
        "Actions": { "#ComputerSystem.Reset": {
            "target": RESET,
            "ResetType@Redfish.AllowableValues": bmc.resets,
        } },
    })
}

fn boot(bmc: &mut Bmc, body: &Value) -> (u16, Value) {
    let text = |name: &str| body.get("Boot").and_then(|it| it.get(name)).and_then(Value::as_str);
    let flags = match text("BootSourceOverrideEnabled") {
        Some("Once") => 0x80,
        Some("Continuous") => 0xc0,
        Some("Disabled") => 0,
        _ => return refused(400, "for how long?"),
    };
    let wanted = text("BootSourceOverrideTarget").unwrap_or("None");
    match DEVICES.iter().find(|(word, _)| *word == wanted) {
        Some((_, number)) => {
            bmc.boot = [flags, number << 2, 0, 0, 0];
            (204, Value::Null)
        }
        None => refused(400, "from what?"),
    }
}

fn reset(bmc: &mut Bmc, body: &Value) -> (u16, Value) {
    let number = match (body.get("ResetType").and_then(Value::as_str), bmc.on) {
        (Some("On"), false) => 1,
        (Some("ForceOff"), true) => 0,
        (Some("ForceRestart"), true) => 3,
        (Some("GracefulShutdown"), true) => 5,
        (Some("PushPowerButton"), on) => {
            if on {
                5
            } else {
                1
            }
        }
        // As many real ones do.
        _ => return refused(409, "it is so already"),
    };
    bmc.change(number);
    (204, Value::Null)
}
