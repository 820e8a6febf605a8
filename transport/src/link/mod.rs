//! A link: one control stream and any number of bulk streams between two nodes.
//!
//! Control messages are typed and small, arrive in order, and never wait behind bulk data. Bulk
//! streams carry frames of bytes; a slow receiver holds its sender back, so that memory is
//! bounded on both ends. A stream says whether its sender finished it or was cut off. Dropping
//! any part of a link is noticed by the peer.
//!
//! Two carriers keep these promises and pass the same tests: QUIC between hosts, and a pair in
//! memory for tests and for moves within one process.

mod memory;
mod quic;

use bytes::Bytes;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::LinkError;
use crate::frame::{self, BULK_MAX, CONTROL_MAX};

pub(crate) use quic::BulkConnection;

/// One end of a link.
#[derive(Debug)]
pub struct Link {
    /// Messages.
    pub control: Control,
    /// Where bulk streams come from.
    pub bulk: Bulk,
    /// The protocol version that both ends speak.
    pub version: u16,
}

impl Link {
    /// Two ends joined in memory.
    pub fn pair() -> (Self, Self) {
        memory::pair()
    }

    pub(crate) fn quic(
        send: quinn::SendStream,
        recv: quinn::RecvStream,
        bulk: BulkConnection,
        version: u16,
    ) -> Self {
        Self {
            control: Control {
                sender: ControlSender(SenderKind::Quic(send)),
                receiver: ControlReceiver(ReceiverKind::Quic(quic::FrameReader::new(recv))),
            },
            bulk: Bulk(BulkKind::Quic(bulk)),
            version,
        }
    }
}

/// The control stream of a link.
#[derive(Debug)]
pub struct Control {
    sender: ControlSender,
    receiver: ControlReceiver,
}

impl Control {
    /// Sends a message.
    pub async fn send<T: Serialize + Sync>(&mut self, message: &T) -> Result<(), LinkError> {
        self.sender.send(message).await
    }

    /// Waits for the next message. Safe to drop half way: no part of a message is lost.
    pub async fn recv<T: DeserializeOwned>(&mut self) -> Result<T, LinkError> {
        self.receiver.recv().await
    }

    /// The two directions on their own, for two tasks.
    pub fn split(self) -> (ControlSender, ControlReceiver) {
        (self.sender, self.receiver)
    }
}

/// The sending direction of a control stream.
#[derive(Debug)]
pub struct ControlSender(SenderKind);

#[derive(Debug)]
enum SenderKind {
    Quic(quinn::SendStream),
    Memory(memory::MessageSender),
}

impl ControlSender {
    /// Sends a message.
    pub async fn send<T: Serialize + Sync>(&mut self, message: &T) -> Result<(), LinkError> {
        let bytes = Bytes::from(ckpt_format::codec::encode(message));
        frame::check(bytes.len() as u64, CONTROL_MAX)?;
        match &mut self.0 {
            SenderKind::Quic(stream) => frame::write(stream, bytes, CONTROL_MAX).await,
            SenderKind::Memory(sender) => sender.send(bytes).await,
        }
    }
}

/// The receiving direction of a control stream.
#[derive(Debug)]
pub struct ControlReceiver(ReceiverKind);

#[derive(Debug)]
enum ReceiverKind {
    Quic(quic::FrameReader),
    Memory(memory::MessageReceiver),
}

impl ControlReceiver {
    /// Waits for the next message. Safe to drop half way: no part of a message is lost.
    pub async fn recv<T: DeserializeOwned>(&mut self) -> Result<T, LinkError> {
        let bytes = match &mut self.0 {
            ReceiverKind::Quic(reader) => reader.next(CONTROL_MAX).await?,
            ReceiverKind::Memory(receiver) => receiver.recv().await,
        };
        frame::decode(&bytes.ok_or(LinkError::Closed)?)
    }
}

/// Makes and accepts bulk streams. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Bulk(BulkKind);

#[derive(Debug, Clone)]
enum BulkKind {
    Quic(BulkConnection),
    Memory(memory::BulkPort),
}

impl Bulk {
    /// Opens a stream to the peer. Either side may.
    pub async fn open(&self) -> Result<BulkSender, LinkError> {
        Ok(BulkSender(match &self.0 {
            BulkKind::Quic(connection) => BulkSenderKind::Quic(connection.open().await?),
            BulkKind::Memory(port) => BulkSenderKind::Memory(port.open().await?),
        }))
    }

    /// Waits for a stream that the peer opened (and wrote to: an empty stream is not seen).
    pub async fn accept(&self) -> Result<BulkReceiver, LinkError> {
        Ok(BulkReceiver(match &self.0 {
            BulkKind::Quic(connection) => BulkReceiverKind::Quic(connection.accept().await?),
            BulkKind::Memory(port) => BulkReceiverKind::Memory(port.accept().await?),
        }))
    }
}

/// The sending end of a bulk stream. Dropped without [`BulkSender::finish`], the receiver sees
/// a stream that was cut off.
#[derive(Debug)]
pub struct BulkSender(BulkSenderKind);

#[derive(Debug)]
enum BulkSenderKind {
    Quic(quic::FrameSender),
    Memory(memory::FrameSender),
}

impl BulkSender {
    /// The largest frame, in bytes. Frames of 64 KiB to 1 MiB are the quickest.
    pub const FRAME_MAX: usize = BULK_MAX;

    /// Sends one frame; waits while the receiver is behind.
    pub async fn send(&mut self, bytes: Bytes) -> Result<(), LinkError> {
        self.send_joined([bytes, Bytes::new()]).await
    }

    /// Sends one frame that is in two parts, which the receiver gets as one. Over QUIC neither is
    /// copied for that.
    pub async fn send_joined(&mut self, parts: [Bytes; 2]) -> Result<(), LinkError> {
        frame::check((parts[0].len() + parts[1].len()) as u64, BULK_MAX)?;
        match &mut self.0 {
            BulkSenderKind::Quic(sender) => sender.send(parts).await,
            BulkSenderKind::Memory(sender) => sender.send(parts.concat().into()).await,
        }
    }

    /// Says that everything was said, and waits until the peer's host has it all.
    pub async fn finish(self) -> Result<(), LinkError> {
        match self.0 {
            BulkSenderKind::Quic(sender) => sender.finish().await,
            BulkSenderKind::Memory(sender) => sender.finish().await,
        }
    }
}

/// The receiving end of a bulk stream.
#[derive(Debug)]
pub struct BulkReceiver(BulkReceiverKind);

#[derive(Debug)]
enum BulkReceiverKind {
    Quic(quic::FrameReader),
    Memory(memory::FrameReceiver),
}

impl BulkReceiver {
    /// The next frame; `None` once the sender has finished. A stream that was cut off ends with
    /// an error, never with `None`.
    pub async fn recv(&mut self) -> Result<Option<Bytes>, LinkError> {
        match &mut self.0 {
            BulkReceiverKind::Quic(reader) => reader.next_bulk().await,
            BulkReceiverKind::Memory(receiver) => receiver.recv().await,
        }
    }
}
