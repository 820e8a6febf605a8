//! Who a node is: the cluster's authority, a node's certificate, and the files they live in.
//!
//! The authority's key is kept by every voter (mode 0600), so that any of them can admit a node
//! after any other died. A node makes its own key and sends only a signing request: private keys
//! of nodes never travel.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, CertificateSigningRequestDer, PrivateKeyDer};
use serde::{Deserialize, Serialize};

/// The name every member's certificate carries, whatever its number.
pub(crate) const MEMBER: &str = "member.ferry";

/// The number of a node. Never given to another node, not even after a removal.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct NodeId(pub u64);

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

impl NodeId {
    /// The name in the certificate that binds it to this number.
    pub(crate) fn dns_name(self) -> String {
        format!("node-{}.ferry", self.0)
    }
}

/// BLAKE3 of a certificate.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Fingerprint(pub [u8; 32]);

impl Fingerprint {
    pub(crate) fn of(der: &[u8]) -> Self {
        Self(*blake3::hash(der).as_bytes())
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Fingerprint({self})")
    }
}

/// Why an identity could not be made, read or kept.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// A certificate or key could not be made or parsed.
    #[error("bad certificate or key")]
    Certificate(#[from] rcgen::Error),
    /// A PEM text holds no certificate or key.
    #[error("bad PEM text")]
    Pem(#[source] rustls::pki_types::pem::Error),
    /// A file could not be read or written.
    #[error("cannot access {}", path.display())]
    File {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// The cluster's certificate authority: may admit nodes.
pub struct Authority {
    certificate_pem: String,
    key_pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authority").finish_non_exhaustive()
    }
}

impl Authority {
    /// A new authority for the cluster called `cluster`. The subject is unique, so that
    /// a certificate of another cluster is told apart from a damaged one of this.
    pub fn create(cluster: &str) -> Result<Self, IdentityError> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(Vec::<String>::new())?;
        params.distinguished_name.push(DnType::CommonName, format!("ferry cluster {cluster}"));
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
        let certificate = params.self_signed(&key)?;
        Self::from_pem(&certificate.pem(), &key.serialize_pem())
    }

    /// The authority whose certificate and key these are.
    pub fn from_pem(certificate_pem: &str, key_pem: &str) -> Result<Self, IdentityError> {
        let issuer = Issuer::from_ca_cert_pem(certificate_pem, KeyPair::from_pem(key_pem)?)?;
        Ok(Self { certificate_pem: certificate_pem.into(), key_pem: key_pem.into(), issuer })
    }

    /// The certificate, in PEM.
    pub fn certificate_pem(&self) -> &str {
        &self.certificate_pem
    }

    /// The private key, in PEM. Secret.
    pub fn key_pem(&self) -> &str {
        &self.key_pem
    }

    /// Signs the certificate of node `node`, whatever names the request asks for.
    pub fn sign(&self, request_der: &[u8], node: NodeId) -> Result<String, IdentityError> {
        let der = CertificateSigningRequestDer::from(request_der);
        let mut request = CertificateSigningRequestParams::from_der(&der)?;
        // Nothing the requester wrote is trusted; only its public key is taken.
        request.params = CertificateParams::new(vec![MEMBER.to_owned(), node.dns_name()])?;
        request.params.distinguished_name.push(DnType::CommonName, node.dns_name());
        request.params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        Ok(request.signed_by(&self.issuer)?.pem())
    }
}

/// A fresh private key and the request to have it certified.
#[derive(Debug)]
pub struct SigningRequest {
    key_pem: String,
    /// What the authority gets to see.
    pub der: Vec<u8>,
}

impl SigningRequest {
    /// Makes a new key.
    pub fn create() -> Result<Self, IdentityError> {
        let key = KeyPair::generate()?;
        let request = CertificateParams::new(Vec::<String>::new())?.serialize_request(&key)?;
        Ok(Self { key_pem: key.serialize_pem(), der: request.der().to_vec() })
    }

    /// The identity, once the authority has signed.
    pub fn complete(
        self,
        node: NodeId,
        certificate_pem: &str,
        authority_pem: &str,
    ) -> Result<Identity, IdentityError> {
        Identity::from_pem(node, certificate_pem, &self.key_pem, authority_pem)
    }
}

/// What a node proves itself with.
pub struct Identity {
    node: NodeId,
    certificate_pem: String,
    key_pem: String,
    authority_pem: String,
    pub(crate) certificate: CertificateDer<'static>,
    pub(crate) key: PrivateKeyDer<'static>,
    pub(crate) authority: CertificateDer<'static>,
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity").field("node", &self.node).finish_non_exhaustive()
    }
}

impl Identity {
    /// The first node of a new cluster certifies itself.
    pub fn issue(authority: &Authority, node: NodeId) -> Result<Self, IdentityError> {
        let request = SigningRequest::create()?;
        let certificate = authority.sign(&request.der, node)?;
        request.complete(node, &certificate, authority.certificate_pem())
    }

    fn from_pem(
        node: NodeId,
        certificate_pem: &str,
        key_pem: &str,
        authority_pem: &str,
    ) -> Result<Self, IdentityError> {
        let certificate = CertificateDer::from_pem_slice(certificate_pem.as_bytes())
            .map_err(IdentityError::Pem)?;
        let authority =
            CertificateDer::from_pem_slice(authority_pem.as_bytes()).map_err(IdentityError::Pem)?;
        let key = PrivateKeyDer::from_pem_slice(key_pem.as_bytes()).map_err(IdentityError::Pem)?;
        Ok(Self {
            node,
            certificate_pem: certificate_pem.into(),
            key_pem: key_pem.into(),
            authority_pem: authority_pem.into(),
            certificate,
            key,
            authority,
        })
    }

    /// Reads the identity kept in `directory`.
    pub fn load(directory: &Path, node: NodeId) -> Result<Self, IdentityError> {
        let read = |name: &str| {
            let path = directory.join(name);
            std::fs::read_to_string(&path).map_err(|source| IdentityError::File { path, source })
        };
        Self::from_pem(node, &read("node.crt")?, &read("node.key")?, &read("ca.crt")?)
    }

    /// Keeps the identity in `directory`; the key is readable by root alone.
    pub fn save(&self, directory: &Path) -> Result<(), IdentityError> {
        write_secret(&directory.join("node.key"), &self.key_pem)?;
        write_secret(&directory.join("node.crt"), &self.certificate_pem)?;
        write_secret(&directory.join("ca.crt"), &self.authority_pem)
    }

    /// The node this identity names.
    pub fn node(&self) -> NodeId {
        self.node
    }

    /// The fingerprint of the node's certificate.
    pub fn fingerprint(&self) -> Fingerprint {
        Fingerprint::of(&self.certificate)
    }

    /// The fingerprint of the cluster's authority.
    pub fn authority_fingerprint(&self) -> Fingerprint {
        Fingerprint::of(&self.authority)
    }
}

impl Authority {
    /// Reads the authority kept in `directory`.
    pub fn load(directory: &Path) -> Result<Self, IdentityError> {
        let read = |name: &str| {
            let path = directory.join(name);
            std::fs::read_to_string(&path).map_err(|source| IdentityError::File { path, source })
        };
        Self::from_pem(&read("ca.crt")?, &read("ca.key")?)
    }

    /// Keeps the authority in `directory`; the key is readable by root alone.
    pub fn save(&self, directory: &Path) -> Result<(), IdentityError> {
        write_secret(&directory.join("ca.key"), &self.key_pem)?;
        write_secret(&directory.join("ca.crt"), &self.certificate_pem)
    }
}

/// Writes a file that only its owner may read, whole or not at all, and on the disk.
fn write_secret(path: &Path, text: &str) -> Result<(), IdentityError> {
    use std::io::Write as _;
    use std::os::unix::fs::OpenOptionsExt as _;

    let write = || -> io::Result<()> {
        let temporary = path.with_extension("new");
        let mut file = std::fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&temporary)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        std::fs::rename(&temporary, path)?;
        match path.parent() {
            Some(directory) => std::fs::File::open(directory)?.sync_all(),
            None => Ok(()),
        }
    };
    write().map_err(|source| IdentityError::File { path: path.into(), source })
}
