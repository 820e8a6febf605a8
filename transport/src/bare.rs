//! One stream of bytes over the library alone: what our links are measured against.
//!
//! The same socket code, certificates and cipher as everywhere else, but no hello, no frames and
//! no control stream. With [`Settings::Ours`] the difference to a link is what our own code
//! costs; with [`Settings::Library`] it is what the tuning is worth.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use crate::error::{BindError, LinkError};
use crate::identity::{Identity, MEMBER};
use crate::tuning::Timing;
use crate::{frame, reset, socket, tls, tuning};

/// How the connection is set up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Settings {
    /// As those of links.
    Ours,
    /// As the library comes.
    Library,
}

/// A socket that sends and receives bare streams.
#[derive(Debug)]
pub struct Bare(quinn::Endpoint);

impl Bare {
    /// Opens the socket. Must be called inside a runtime.
    pub fn bind(
        listen: SocketAddr,
        identity: &Identity,
        settings: Settings,
    ) -> Result<Self, BindError> {
        let mut server = quinn::ServerConfig::with_crypto(Arc::new(tls::server(identity)?));
        let mut client = quinn::ClientConfig::new(Arc::new(tls::client(identity)?));
        let failed = |source| BindError::Socket { address: listen, source };
        let socket = match settings {
            Settings::Ours => {
                server.transport_config(tuning::services(Timing::default())).migration(false);
                client.transport_config(tuning::services(Timing::default()));
                socket::open(listen)
            }
            Settings::Library => std::net::UdpSocket::bind(listen),
        };
        let mut endpoint = quinn::Endpoint::new(
            reset::endpoint_config(identity),
            Some(server),
            socket.map_err(failed)?,
            Arc::new(quinn::TokioRuntime),
        )
        .map_err(failed)?;
        endpoint.set_default_client_config(client);
        Ok(Self(endpoint))
    }

    /// Where it listens.
    pub fn address(&self) -> std::io::Result<SocketAddr> {
        self.0.local_addr()
    }

    /// Takes in the next stream and says how many bytes it had.
    pub async fn receive(&self) -> Result<u64, LinkError> {
        let incoming = self.0.accept().await.ok_or(LinkError::Closed)?;
        let connection = incoming.await.map_err(|error| frame::connection_error(&error))?;
        let mut stream =
            connection.accept_uni().await.map_err(|error| frame::connection_error(&error))?;
        let mut bytes = 0;
        while let Some(chunk) =
            stream.read_chunk(usize::MAX, true).await.map_err(|_| LinkError::Closed)?
        {
            bytes += chunk.bytes.len() as u64;
        }
        // The sender closes, when it knows that all has arrived.
        connection.closed().await;
        Ok(bytes)
    }

    /// Sends the same piece so many times and waits until the other end has it all.
    pub async fn send(&self, to: SocketAddr, piece: Bytes, times: u64) -> Result<(), LinkError> {
        let connecting = self
            .0
            .connect(to, MEMBER)
            .map_err(|error| LinkError::Lost { cause: error.to_string() })?;
        let connection = connecting.await.map_err(|error| frame::connection_error(&error))?;
        let mut stream =
            connection.open_uni().await.map_err(|error| frame::connection_error(&error))?;
        for _ in 0..times {
            stream.write_chunk(piece.clone()).await.map_err(|_| LinkError::Closed)?;
        }
        stream.finish().map_err(|_| LinkError::Closed)?;
        stream.stopped().await.map_err(|_| LinkError::Closed)?;
        connection.close(0u32.into(), b"");
        let _ = tokio::time::timeout(Duration::from_secs(1), self.0.wait_idle()).await;
        Ok(())
    }
}
