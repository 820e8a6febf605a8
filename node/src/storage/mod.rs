//! The files of VEs: how they follow a VE to another node.
//!
//! What a VE has changed of its template lies in the *upper* directory of its overlay; what it
//! keeps in memory lies in its tmpfs mounts. Each is a *tree*. On the source a [`FileTracker`]
//! reads the trees in rounds while the VE runs and tells what has changed since the last round as
//! [`FileRecord`](ckpt_format::tree::FileRecord)s; the last round, with the VE frozen, is exact.
//! On the target a [`FileApplier`] takes the records as its orders and makes the same trees,
//! through the mounts of the container that waits there.
//!
//! Files that are open but have no name any more are not here: they travel with the descriptors.
//! What does not travel: inode numbers, the time of the last change of an inode, flags of
//! chattr(1), and space that was reserved but never written.

mod apply;
mod attributes;
mod check;
mod contents;
mod error;
mod glance;
mod limits;
mod listing;
mod make;
mod mirror;
mod path;
mod remove;
mod status;
mod track;
mod trees;
mod walk;

pub use self::{
    apply::{FileApplier, TargetTree},
    error::{SinkClosed, TreeError},
    listing::{Change, Comparison, list_own, settle},
    track::{FileRound, FileTracker, MappedFiles, SourceKind, SourceTree},
    trees::{size, source_trees, target_trees},
};
