//! An authority of a test, and certificates that it signed.

use std::fs;
use std::path::{Path, PathBuf};

use base64ct::{Base64, Encoding};
use pavo::store::etcd::Certificate;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};

pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    dir: tempfile::TempDir,
}

impl Authority {
    /// One with a certificate for members of etcd: `server.pem`.
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut params = named("a test's authority", vec![]);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
        let key = KeyPair::generate().unwrap();
        let certificate = params.self_signed(&key).unwrap();
        write(&dir.path().join("ca.pem"), "CERTIFICATE", certificate.der());
        let authority = Self { issuer: Issuer::new(params, key), dir };
        authority.sign("server", "a member", vec!["127.0.0.1".into()]);
        authority
    }

    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub fn ca(&self) -> Option<PathBuf> {
        Some(self.dir.path().join("ca.pem"))
    }

    /// A certificate of a client.
    pub fn client(&self, name: &str) -> Certificate {
        self.sign(name, name, vec![])
    }

    fn sign(&self, file: &str, name: &str, hosts: Vec<String>) -> Certificate {
        let mut params = named(name, hosts);
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let pair = KeyPair::generate().unwrap();
        let signed = params.signed_by(&pair, &self.issuer).unwrap();
        let cert = self.dir.path().join(format!("{file}.pem"));
        let key = self.dir.path().join(format!("{file}.key"));
        write(&cert, "CERTIFICATE", signed.der());
        write(&key, "PRIVATE KEY", &pair.serialize_der());
        Certificate { cert, key }
    }
}

fn named(name: &str, hosts: Vec<String>) -> CertificateParams {
    let mut params = CertificateParams::new(hosts).unwrap();
    params.distinguished_name.push(DnType::CommonName, name);
    params
}

fn write(file: &Path, label: &str, der: &[u8]) {
    let text = Base64::encode_string(der);
    fs::write(file, format!("-----BEGIN {label}-----\n{text}\n-----END {label}-----\n")).unwrap();
}
