//! A stranger's one request: to become a member.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use crate::accept::JOIN_MAX;
use crate::error::{ConnectError, LinkError};
use crate::frame;
use crate::hello::{Hello, Purpose, Versions};
use crate::peer;
use crate::token::JoinToken;
use crate::tuning::{self, Timing};
use crate::{socket, tls};

/// Why a request to join has no answer.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// No socket to ask from.
    #[error("cannot open a socket")]
    Socket(#[source] std::io::Error),
    /// TLS could not be set up.
    #[error("cannot set up TLS")]
    Tls(#[from] rustls::Error),
    /// The member could not be reached, or is not of the token's cluster.
    #[error("cannot reach the cluster")]
    Connect(#[source] ConnectError),
    /// The member's answer is lost. The token may be used up.
    #[error("the answer of {address} is lost")]
    InDoubt {
        /// Whom we asked.
        address: SocketAddr,
        /// Why.
        source: LinkError,
    },
    /// The member did not decide in time. The token may be used up.
    #[error("{address} did not answer within {} ms", waited.as_millis())]
    TimedOut {
        /// Whom we asked.
        address: SocketAddr,
        /// How long.
        waited: Duration,
    },
}

/// Asks the member named in `token`; the answer comes as the member's join handler gave it.
pub async fn request_join(
    token: &JoinToken,
    name: &str,
    request: Vec<u8>,
    versions: Versions,
    patience: Duration,
) -> Result<Vec<u8>, JoinError> {
    let address = token.address;
    let any: SocketAddr = if address.is_ipv4() {
        (std::net::Ipv4Addr::UNSPECIFIED, 0).into()
    } else {
        (std::net::Ipv6Addr::UNSPECIFIED, 0).into()
    };
    let socket = socket::open(any).map_err(JoinError::Socket)?;
    let runtime = Arc::new(quinn::TokioRuntime);
    let quic = quinn::Endpoint::new(quinn::EndpointConfig::default(), None, socket, runtime)
        .map_err(JoinError::Socket)?;
    let timing = Timing::default();
    let mut config = quinn::ClientConfig::new(Arc::new(tls::joiner(token.authority)?));
    config.transport_config(tuning::services(timing));
    let hello = Hello { purpose: Purpose::Join, node: None, name: name.to_owned() };
    let mut dialed = peer::dial(&quic, config, address, versions, &hello, timing.connect)
        .await
        .map_err(JoinError::Connect)?;
    let exchange = async {
        frame::write(&mut dialed.send, request.into(), JOIN_MAX).await?;
        frame::read_data(&mut dialed.recv, JOIN_MAX).await
    };
    let answer = tokio::time::timeout(patience, exchange)
        .await
        .map_err(|_| JoinError::TimedOut { address, waited: patience })?
        .map_err(|source| JoinError::InDoubt { address, source })?;
    dialed.connection.close(0u32.into(), b"joined");
    quic.wait_idle().await;
    Ok(answer.to_vec())
}
