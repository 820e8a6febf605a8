//! Post-copy: the VE runs on the target while a part of its memory is still on the source.
//!
//! The last rung of the ladder, and only if the user has asked for it. Plain memory that was
//! written since the last round is not sent while the VE stands still; the source keeps its frozen
//! processes, and gives out their pages ([`shelf`]). On the target a process of its own, the
//! [`keeper`], lets threads that touch a missing page wait, and puts pages in place. The daemon
//! there carries them ([`fetch`]).
//!
//! Who owns the VE is settled by the switch as always. The target reports *running* to the log only
//! when nothing is missing any more: until then the source keeps its copy, and the VE can go nowhere.
//!
//! | what dies | what happens |
//! |---|---|
//! | the source's daemon | threads that touch missing pages wait; the daemon that comes back finds the frozen processes by its journal and goes on |
//! | the target's daemon | the keeper lives on, and so does the VE; the daemon that comes back connects to the keeper |
//! | the keeper | the VE is ended: what is missing would read as zeros |
//! | the source, or its copy of the VE | the VE is ended as soon as the source says so, or when it was not heard of for [`fetch::PATIENCE`] |
//! | the VE on the target | the keeper ends, and the source removes its copy |

pub(super) mod fetch;
pub(super) mod keeper;
pub(super) mod later;
mod question;
pub(super) mod shelf;

use serde::{Deserialize, Serialize};
use transport::{Link, NodeId, PeerInfo};

pub(super) use self::question::{Answer, Question};
use super::{error::MigrateError, source::Context};

/// What a finished move tells of its post-copy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PostcopyReport {
    /// Pages that came when the VE ran on the target already, zeros not counted.
    pub pages: u64,
    /// Bytes sent for them.
    pub bytes: u64,
    /// How often a thread had to wait for a page.
    pub faults: u64,
    /// From the switch until the last page had come.
    pub ms: f64,
}

/// Serves a link of another node that is about post-copy.
pub(super) async fn serve(context: Context, peer: PeerInfo, link: Link) {
    let (mut sender, mut receiver) = link.control.split();
    let asked: Question = match receiver.recv().await {
        Ok(asked) => asked,
        Err(error) => {
            tracing::warn!(peer = %peer.name, %error, "a question that cannot be read");
            return;
        }
    };
    let answered = match asked {
        Question::Able => sender.send(&keeper::ability()).await,
        Question::Fetch { migration } => match context.shelves.find(migration, peer.node) {
            Some(shelf) => shelf.serve(sender, receiver, link.bulk).await,
            None => sender.send(&Answer::Gone).await,
        },
        _ => Ok(()),
    };
    if let Err(error) = answered {
        tracing::info!(peer = %peer.name, %error, "a link for pages has ended");
    }
}

/// Asks a node whether it could take in a VE some of whose pages are missing.
pub(super) async fn ask_whether_able(
    context: &Context,
    target: NodeId,
    name: &str,
) -> Result<(), MigrateError> {
    let refused = |cause: String| Err(MigrateError::NoPostcopy { name: name.to_owned(), cause });
    let peer = context.cluster.peer(target);
    let peer = peer.ok_or_else(|| MigrateError::NoAddress { name: name.to_owned() })?;
    let asking = async {
        let link = peer.link(transport::Service::Pages).await.map_err(|error| error.to_string())?;
        let (mut sender, mut receiver) = link.control.split();
        sender.send(&Question::Able).await.map_err(|error| error.to_string())?;
        receiver.recv::<Answer>().await.map_err(|error| error.to_string())
    };
    match tokio::time::timeout(question::ANSWER, asking).await {
        Ok(Ok(Answer::Able)) => Ok(()),
        Ok(Ok(Answer::Unable { cause })) => refused(cause),
        Ok(Ok(_)) => Err(MigrateError::Protocol),
        Ok(Err(cause)) => refused(cause),
        Err(_) => Err(MigrateError::Silent { waited: question::ANSWER }),
    }
}

/// What the user is told before a move that may end in post-copy.
pub(super) fn risk(ve: u32, source: &str) -> String {
    format!(
        "post-copy is allowed: if it comes to that, from the switch on until the last page has come \
         VE {ve} needs both hosts. If {source} is lost then, VE {ve} is lost with it"
    )
}
