//! The types openraft is used with.
//!
//! Everything that goes to the disk or to a peer is JSON: entries are small, and a field added
//! later does not make an old log unreadable.

use std::io;

use openraft::RaftTypeConfig;
use openraft::vote::RaftLeaderId;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::core::{Answer, Request};

openraft::declare_raft_types!(
    pub(crate) TypeConfig:
        D = Request,
        R = Option<Answer>,
        NodeId = u64,
        Node = openraft::EmptyNode,
);

type LeaderId = <TypeConfig as RaftTypeConfig>::LeaderId;
type CommittedLeaderId = <LeaderId as RaftLeaderId>::Committed;
pub(crate) type Vote = <TypeConfig as RaftTypeConfig>::Vote;
pub(crate) type Entry = <TypeConfig as RaftTypeConfig>::Entry;
pub(crate) type LogId = openraft::LogId<CommittedLeaderId>;
pub(crate) type StoredMembership =
    openraft::StoredMembership<CommittedLeaderId, u64, openraft::EmptyNode>;
pub(crate) type SnapshotMeta = openraft::SnapshotMeta<CommittedLeaderId, u64, openraft::EmptyNode>;
pub(crate) type Snapshot = openraft::Snapshot<CommittedLeaderId, u64, openraft::EmptyNode, String>;
pub(crate) type Raft = openraft::Raft<TypeConfig, super::machine::Machine>;

/// Encodes one of our values.
pub(crate) fn encode<T: Serialize>(value: &T) -> Vec<u8> {
    serde_json::to_vec(value).expect("our types have string keys and no failing serializers")
}

/// Decodes what a peer sent or the disk kept.
pub(crate) fn decode<T: DeserializeOwned>(bytes: &[u8]) -> io::Result<T> {
    serde_json::from_slice(bytes).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}
