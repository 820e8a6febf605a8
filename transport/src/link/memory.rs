//! A link within one process.

use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::{Mutex, Semaphore, mpsc, oneshot};

use super::{
    Bulk, BulkKind, Control, ControlReceiver, ControlSender, Link, ReceiverKind, SenderKind,
};
use crate::error::LinkError;
use crate::hello::Versions;
use crate::tuning::{BULK_STREAMS, STREAM_WINDOW};

/// Control messages on their way.
const MESSAGES: usize = 256;

pub(super) fn pair() -> (Link, Link) {
    let (left_sender, right_receiver) = mpsc::channel(MESSAGES);
    let (right_sender, left_receiver) = mpsc::channel(MESSAGES);
    let (left_open, right_accept) = mpsc::channel(BULK_STREAMS as usize);
    let (right_open, left_accept) = mpsc::channel(BULK_STREAMS as usize);
    let end = |sender, receiver, open, accept| Link {
        control: Control {
            sender: ControlSender(SenderKind::Memory(MessageSender(sender))),
            receiver: ControlReceiver(ReceiverKind::Memory(MessageReceiver(receiver))),
        },
        bulk: Bulk(BulkKind::Memory(BulkPort { open, accept: Arc::new(Mutex::new(accept)) })),
        version: Versions::CURRENT.newest,
    };
    (
        end(left_sender, left_receiver, left_open, left_accept),
        end(right_sender, right_receiver, right_open, right_accept),
    )
}

#[derive(Debug)]
pub(super) struct MessageSender(mpsc::Sender<Bytes>);

impl MessageSender {
    pub(super) async fn send(&self, bytes: Bytes) -> Result<(), LinkError> {
        self.0.send(bytes).await.map_err(|_| LinkError::Closed)
    }
}

#[derive(Debug)]
pub(super) struct MessageReceiver(mpsc::Receiver<Bytes>);

impl MessageReceiver {
    pub(super) async fn recv(&mut self) -> Option<Bytes> {
        self.0.recv().await
    }
}

#[derive(Debug, Clone)]
pub(super) struct BulkPort {
    open: mpsc::Sender<FrameReceiver>,
    accept: Arc<Mutex<mpsc::Receiver<FrameReceiver>>>,
}

impl BulkPort {
    pub(super) async fn open(&self) -> Result<FrameSender, LinkError> {
        let (sender, receiver) = mpsc::unbounded_channel();
        // The window bounds the channel by bytes, as QUIC's does.
        let window = Arc::new(Semaphore::new(STREAM_WINDOW as usize));
        self.open
            .send(FrameReceiver { frames: receiver, window: window.clone(), ended: false })
            .await
            .map_err(|_| LinkError::Closed)?;
        Ok(FrameSender { frames: sender, window })
    }

    pub(super) async fn accept(&self) -> Result<FrameReceiver, LinkError> {
        self.accept.lock().await.recv().await.ok_or(LinkError::Closed)
    }
}

#[derive(Debug)]
enum Item {
    Data(Bytes),
    /// Everything was said; to be acknowledged.
    End(oneshot::Sender<()>),
}

#[derive(Debug)]
pub(super) struct FrameSender {
    frames: mpsc::UnboundedSender<Item>,
    window: Arc<Semaphore>,
}

fn cost(bytes: &Bytes) -> u32 {
    u32::try_from(bytes.len()).unwrap_or(STREAM_WINDOW).min(STREAM_WINDOW)
}

impl FrameSender {
    pub(super) async fn send(&self, bytes: Bytes) -> Result<(), LinkError> {
        let permit = self.window.acquire_many(cost(&bytes)).await.map_err(|_| LinkError::Closed)?;
        permit.forget();
        self.frames.send(Item::Data(bytes)).map_err(|_| LinkError::Closed)
    }

    pub(super) async fn finish(self) -> Result<(), LinkError> {
        let (acknowledge, acknowledged) = oneshot::channel();
        self.frames.send(Item::End(acknowledge)).map_err(|_| LinkError::Closed)?;
        acknowledged.await.map_err(|_| LinkError::Closed)
    }
}

#[derive(Debug)]
pub(super) struct FrameReceiver {
    frames: mpsc::UnboundedReceiver<Item>,
    window: Arc<Semaphore>,
    ended: bool,
}

impl Drop for FrameReceiver {
    fn drop(&mut self) {
        // Wakes a sender that waits for room nobody will make.
        self.window.close();
    }
}

impl FrameReceiver {
    pub(super) async fn recv(&mut self) -> Result<Option<Bytes>, LinkError> {
        if self.ended {
            return Ok(None);
        }
        match self.frames.recv().await {
            Some(Item::Data(bytes)) => {
                self.window.add_permits(cost(&bytes) as usize);
                Ok(Some(bytes))
            }
            Some(Item::End(acknowledge)) => {
                self.ended = true;
                // A sender that stopped waiting does not mind.
                let _ = acknowledge.send(());
                Ok(None)
            }
            None => Err(LinkError::Closed),
        }
    }
}
