//! A client of web servers that keeps its connections: one that breaks is an error, not a reason
//! to make a new one.
//!
//! An answer must be the one that came first, or, if it begins with `count `, the next number:
//! then the server counts the requests of each connection, and none may be lost or repeated.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{
    ClientConfig, ClientConnection, DigitallySignedStruct, Error, SignatureScheme, StreamOwned,
};

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(20);
/// The longest answer that is read, in bytes.
const BODY_MAX: usize = 1 << 20;

/// What to ask for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// Where the server is.
    pub address: SocketAddr,
    /// Whether to speak TLS. Any certificate is taken.
    pub tls: bool,
    /// The path.
    pub path: String,
}

impl std::str::FromStr for Target {
    type Err = String;

    /// From `http://ADDRESS:PORT/PATH` or `https://…`.
    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text} is not http[s]://ADDRESS:PORT/PATH");
        let (scheme, rest) = text.split_once("://").ok_or_else(wrong)?;
        let (address, path) = rest.split_once('/').ok_or_else(wrong)?;
        let tls = match scheme {
            "http" => false,
            "https" => true,
            _ => return Err(wrong()),
        };
        let address = address.parse().map_err(|_| wrong())?;
        Ok(Self { address, tls, path: format!("/{path}") })
    }
}

/// A connection and what it has seen.
pub struct Visitor {
    stream: BufReader<Box<dyn Stream>>,
    request: String,
    body: Option<Vec<u8>>,
    count: Option<u64>,
}

trait Stream: Read + Write {}
impl<T: Read + Write> Stream for T {}

impl std::fmt::Debug for Visitor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Visitor").field("request", &self.request).finish_non_exhaustive()
    }
}

impl Visitor {
    /// Connects.
    pub fn new(target: &Target) -> io::Result<Self> {
        let tcp = TcpStream::connect_timeout(&target.address, PATIENCE)?;
        tcp.set_read_timeout(Some(PATIENCE))?;
        tcp.set_nodelay(true)?;
        let stream: Box<dyn Stream> =
            if target.tls { Box::new(tls(tcp, target)?) } else { Box::new(tcp) };
        let (path, host) = (&target.path, target.address);
        let request =
            format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: keep-alive\r\n\r\n");
        Ok(Self { stream: BufReader::new(stream), request, body: None, count: None })
    }

    /// Asks once and checks the answer. Returns how long it took.
    pub fn visit(&mut self) -> io::Result<Duration> {
        let begun = Instant::now();
        self.stream.get_mut().write_all(self.request.as_bytes())?;
        self.stream.get_mut().flush()?;
        let body = self.answer()?;
        let took = begun.elapsed();
        self.check(body)?;
        Ok(took)
    }

    fn check(&mut self, body: Vec<u8>) -> io::Result<()> {
        let text = std::str::from_utf8(&body).unwrap_or_default();
        if let Some(number) = text.strip_prefix("count ") {
            let number: u64 = number.trim().parse().map_err(io::Error::other)?;
            let expected = self.count.map_or(number, |count| count + 1);
            self.count = Some(number);
            if number != expected {
                return Err(io::Error::other(format!("answer {number} instead of {expected}")));
            }
            return Ok(());
        }
        let first = self.body.get_or_insert_with(|| body.clone());
        if *first != body {
            return Err(io::Error::other(format!("another answer of {} bytes", body.len())));
        }
        Ok(())
    }

    fn line(&mut self) -> io::Result<String> {
        let mut line = String::new();
        if self.stream.read_line(&mut line)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(line.trim_end().to_owned())
    }

    fn answer(&mut self) -> io::Result<Vec<u8>> {
        let status = self.line()?;
        if status.split(' ').nth(1) != Some("200") {
            return Err(io::Error::other(status));
        }
        let (mut length, mut chunked) = (None, false);
        loop {
            let line = self.line()?.to_ascii_lowercase();
            match line.split_once(": ") {
                Some(("content-length", value)) => length = value.parse::<usize>().ok(),
                Some(("transfer-encoding", value)) => chunked = value == "chunked",
                _ if line.is_empty() => break,
                _ => {}
            }
        }
        if !chunked {
            return self.take(length.ok_or_else(|| io::Error::other("an answer of no length"))?);
        }
        let mut body = Vec::new();
        loop {
            let size = self.line()?;
            let size = usize::from_str_radix(&size, 16).map_err(io::Error::other)?;
            let chunk = self.take(size)?;
            self.line()?;
            if chunk.is_empty() {
                return Ok(body);
            }
            body.extend(chunk);
        }
    }

    fn take(&mut self, length: usize) -> io::Result<Vec<u8>> {
        if length > BODY_MAX {
            return Err(io::Error::other(format!("an answer of {length} bytes")));
        }
        let mut body = vec![0; length];
        self.stream.read_exact(&mut body)?;
        Ok(body)
    }
}

fn tls(tcp: TcpStream, target: &Target) -> io::Result<StreamOwned<ClientConnection, TcpStream>> {
    let provider = Arc::new(ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .map_err(io::Error::other)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(AnyCertificate(provider)))
        .with_no_client_auth();
    let name = ServerName::from(target.address.ip());
    let connection = ClientConnection::new(Arc::new(config), name).map_err(io::Error::other)?;
    Ok(StreamOwned::new(connection, tcp))
}

/// The servers of a test sign for themselves.
#[derive(Debug)]
struct AnyCertificate(Arc<CryptoProvider>);

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_says_all() {
        let target: Target = "https://10.0.0.1:443/a/b".parse().unwrap();
        assert_eq!((target.tls, target.path.as_str()), (true, "/a/b"));
        assert!("ftp://10.0.0.1:1/".parse::<Target>().is_err());
        assert!("http://name/".parse::<Target>().is_err());
    }
}
