//! The messages between the two nodes, from the source's side.

use std::time::Duration;

use transport::{Bulk, ControlReceiver, ControlSender, NodeId, Service};

use super::Context;
use crate::{
    api::Sink,
    migration::{error::MigrateError, messages::ToSource},
};

/// An open link to the target.
pub(super) struct Talk {
    pub(super) sender: ControlSender,
    receiver: ControlReceiver,
    pub(super) bulk: Bulk,
    /// The protocol version that both ends speak.
    pub(super) version: u16,
}

impl Talk {
    pub(super) async fn open(
        context: &Context,
        target: NodeId,
        name: &str,
    ) -> Result<Self, MigrateError> {
        let name = || name.to_owned();
        let peer =
            context.cluster.peer(target).ok_or_else(|| MigrateError::NoAddress { name: name() })?;
        let link = peer
            .link(Service::Migration)
            .await
            .map_err(|source| MigrateError::Unreachable { name: name(), source })?;
        let (sender, receiver) = link.control.split();
        Ok(Self { sender, receiver, bulk: link.bulk, version: link.version })
    }

    /// The next message. A target that gave up says why.
    pub(super) async fn answer(&mut self, patience: Duration) -> Result<ToSource, MigrateError> {
        match tokio::time::timeout(patience, self.receiver.recv()).await {
            Err(_) => Err(MigrateError::Silent { waited: patience }),
            Ok(Ok(ToSource::Failed(failure))) => Err(MigrateError::TargetFailed(failure)),
            Ok(answer) => Ok(answer?),
        }
    }

    /// As [`Self::answer`], until the user changes their mind.
    pub(super) async fn answer_or_cancel(
        &mut self,
        patience: Duration,
        sink: &Sink,
    ) -> Result<ToSource, MigrateError> {
        tokio::select! {
            answer = self.answer(patience) => answer,
            () = sink.closed() => Err(MigrateError::Cancelled),
        }
    }
}
