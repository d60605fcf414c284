//! An authority of the lab's own, and the certificates of its store.

use std::fs;
use std::net::Ipv4Addr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use base64ct::{Base64, Encoding};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};

use crate::error::Result;

/// A certificate and its key, PEM.
#[derive(Clone, Debug)]
pub struct Pair {
    pub cert: PathBuf,
    pub key: PathBuf,
}

/// Where the certificates lie on the machine. Hosts have their own in `/etc/pavo/node`;
/// `ca.pem` and those for everybody are in `/etc/pavo`.
#[derive(Clone, Debug)]
pub struct Certs {
    pub ca: PathBuf,
    /// Common name `pavo-node`: a compute host.
    pub node: Pair,
    /// Common name `root`: etcd's administrator.
    pub root: Pair,
    /// Anybody's, nobody's name: to be let in where `Options::client_certs` is set.
    pub user: Pair,
}

pub(crate) struct Authority {
    dir: PathBuf,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    pub fn make(dir: &Path) -> Result<Self> {
        fs::create_dir_all(dir)?;
        let mut params = CertificateParams::new(Vec::new())?;
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.distinguished_name.push(DnType::CommonName, "the lab's authority");
        let key = KeyPair::generate()?;
        let cert = params.self_signed(&key)?;
        fs::write(dir.join("ca.pem"), pem("CERTIFICATE", cert.der()))?;
        Ok(Self { dir: dir.to_owned(), issuer: Issuer::new(params, key) })
    }

    /// A certificate for `name`, with which it may serve at `addresses`.
    pub fn issue(&self, file: &str, name: &str, addresses: &[Ipv4Addr]) -> Result<Pair> {
        let names: Vec<String> = addresses.iter().map(Ipv4Addr::to_string).collect();
        let mut params = CertificateParams::new(names)?;
        params.distinguished_name.push(DnType::CommonName, name);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        if !addresses.is_empty() {
            params.extended_key_usages.push(ExtendedKeyUsagePurpose::ServerAuth);
        }
        let key = KeyPair::generate()?;
        let cert = params.signed_by(&key, &self.issuer)?;
        let pair = Pair {
            cert: self.dir.join(format!("{file}.pem")),
            key: self.dir.join(format!("{file}-key.pem")),
        };
        fs::write(&pair.cert, pem("CERTIFICATE", cert.der()))?;
        fs::write(&pair.key, pem("PRIVATE KEY", key.serialized_der()))?;
        fs::set_permissions(&pair.key, fs::Permissions::from_mode(0o600))?;
        Ok(pair)
    }

    pub fn ca(&self) -> PathBuf {
        self.dir.join("ca.pem")
    }
}

fn pem(label: &str, der: &[u8]) -> String {
    let base64 = Base64::encode_string(der);
    let mut text = format!("-----BEGIN {label}-----\n");
    let mut rest = base64.as_str();
    while !rest.is_empty() {
        let (line, more) = rest.split_at(rest.len().min(64));
        text += line;
        text.push('\n');
        rest = more;
    }
    text + &format!("-----END {label}-----\n")
}
