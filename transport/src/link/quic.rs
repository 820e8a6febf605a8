//! A link over QUIC: the control stream on the shared connection for services, the bulk streams
//! on a connection of their own.

use bytes::{Bytes, BytesMut};
use tokio::sync::watch;

use crate::error::LinkError;
use crate::frame::{self, BULK_MAX, Frame};

/// The connection for bulk streams, which may still be on its way. It closes with the last
/// handle to it or to one of its streams.
#[derive(Debug, Clone)]
pub(crate) struct BulkConnection(watch::Receiver<Option<quinn::Connection>>);

impl BulkConnection {
    pub(crate) fn new(connection: watch::Receiver<Option<quinn::Connection>>) -> Self {
        Self(connection)
    }

    async fn connection(&self) -> Result<quinn::Connection, LinkError> {
        let mut receiver = self.0.clone();
        let connection = receiver
            .wait_for(Option::is_some)
            .await
            .map_err(|_| LinkError::Lost { cause: "the bulk connection never came".to_owned() })?;
        connection.clone().ok_or(LinkError::Closed)
    }

    pub(super) async fn open(&self) -> Result<FrameSender, LinkError> {
        let connection = self.connection().await?;
        let stream =
            connection.open_uni().await.map_err(|error| frame::connection_error(&error))?;
        Ok(FrameSender { stream, finished: false })
    }

    pub(super) async fn accept(&self) -> Result<FrameReader, LinkError> {
        let connection = self.connection().await?;
        let stream =
            connection.accept_uni().await.map_err(|error| frame::connection_error(&error))?;
        Ok(FrameReader::new(stream))
    }
}

/// Writes bulk frames.
#[derive(Debug)]
pub(super) struct FrameSender {
    stream: quinn::SendStream,
    finished: bool,
}

impl FrameSender {
    pub(super) async fn send(&mut self, parts: [Bytes; 2]) -> Result<(), LinkError> {
        frame::write_joined(&mut self.stream, parts, BULK_MAX).await
    }

    pub(super) async fn finish(mut self) -> Result<(), LinkError> {
        frame::write_end(&mut self.stream).await?;
        self.stream.finish().map_err(|_| LinkError::Closed)?;
        self.finished = true;
        match self.stream.stopped().await {
            Ok(None) => Ok(()),
            Ok(Some(_)) => Err(LinkError::Closed),
            Err(quinn::StoppedError::ConnectionLost(error)) => Err(frame::connection_error(&error)),
            Err(quinn::StoppedError::ZeroRttRejected) => Err(LinkError::Closed),
        }
    }
}

impl Drop for FrameSender {
    fn drop(&mut self) {
        if !self.finished {
            // Otherwise the library would end the stream as if all had been said.
            let _ = self.stream.reset(1u32.into());
        }
    }
}

/// Reads frames, and keeps what came of one when a caller stops waiting half way.
#[derive(Debug)]
pub(super) struct FrameReader {
    stream: quinn::RecvStream,
    header: BytesMut,
    buffer: BytesMut,
    ended: bool,
}

impl FrameReader {
    pub(super) fn new(stream: quinn::RecvStream) -> Self {
        Self { stream, header: BytesMut::new(), buffer: BytesMut::new(), ended: false }
    }

    /// The next frame; `None` where the stream ends between two frames.
    pub(super) async fn next(&mut self, limit: usize) -> Result<Option<Bytes>, LinkError> {
        match frame::resume(&mut self.stream, &mut self.header, &mut self.buffer, limit).await? {
            Some(Frame::Data(bytes)) => Ok(Some(bytes)),
            Some(Frame::End) => {
                self.ended = true;
                Ok(None)
            }
            None => Ok(None),
        }
    }

    /// The next bulk frame; the end must have been said.
    pub(super) async fn next_bulk(&mut self) -> Result<Option<Bytes>, LinkError> {
        if !self.ended {
            match self.next(BULK_MAX).await? {
                Some(bytes) => return Ok(Some(bytes)),
                None if self.ended => {}
                None => return Err(LinkError::Closed),
            }
        }
        // The end of the stream may come later than what says that all was sent. Whoever let go of the
        // stream before would tell the sender that it has given up.
        match self.stream.read(&mut [0]).await {
            Ok(Some(_)) => Err(LinkError::Unintelligible),
            // All is here, whatever becomes of the connection.
            Ok(None) | Err(_) => Ok(None),
        }
    }
}
