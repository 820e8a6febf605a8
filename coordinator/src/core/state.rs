//! Everything the cluster has agreed on. Pure data: no clock, no socket, no file.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use transport::NodeId;

use super::command::{NodeFacts, VeFacts};
use super::ids::{Epoch, MigrationId, VeId};

/// Ended migrations kept for those who ask late.
pub(crate) const ENDED_MAX: usize = 256;

/// Whether a VE should run.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Desired {
    /// It should.
    Running,
    /// It should not.
    #[default]
    Stopped,
}

/// One VE.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VeRecord {
    /// What it is.
    pub facts: VeFacts,
    /// The one node that may run it.
    pub owner: NodeId,
    /// How often that changed.
    pub epoch: Epoch,
    /// Whether it should run.
    pub desired: Desired,
    /// The migration it is reserved for.
    pub migration: Option<MigrationId>,
}

/// How far a migration is. Never goes back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stage {
    /// The source owns the VE; the target prepares.
    Begun,
    /// The target owns the VE and is about to let it run.
    Switched,
    /// The target runs the VE; the source removes its copy.
    Running,
    /// The target could not run the VE; the source owns it again, the target removes its copy.
    Returned,
    /// Given up before the switch; the source owns the VE as ever, the target removes its copy.
    Aborted,
    /// Nothing of it is left anywhere.
    Finished,
}

impl Stage {
    /// Whether `next` may follow.
    pub fn may_become(self, next: Self) -> bool {
        matches!(
            (self, next),
            (Self::Begun, Self::Switched | Self::Aborted)
                | (Self::Switched, Self::Running | Self::Returned)
                | (Self::Running | Self::Returned | Self::Aborted, Self::Finished)
        )
    }
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Begun => "begun",
            Self::Switched => "switched",
            Self::Running => "running on the target",
            Self::Returned => "returned to the source",
            Self::Aborted => "aborted",
            Self::Finished => "finished",
        })
    }
}

/// Who has the VE of a migration that cannot end in another way any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The target runs it.
    Moved,
    /// It belongs to the source.
    Stays,
}

/// One migration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MigrationRecord {
    /// Its id.
    pub id: MigrationId,
    /// The VE.
    pub ve: VeId,
    /// The epoch it began in; the switch makes the next.
    pub epoch: Epoch,
    /// From where.
    pub source: NodeId,
    /// Where to.
    pub target: NodeId,
    /// How far it is.
    pub stage: Stage,
    /// When it began, in milliseconds since 1970.
    pub begun_ms: u64,
}

/// A token that was given out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenRecord {
    /// When it expires, in milliseconds since 1970.
    pub expires_ms: u64,
    /// Who used it.
    pub used_by: Option<NodeId>,
}

/// The agreed state of the cluster.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// The cluster's id, once founded.
    pub cluster: Option<String>,
    /// The members.
    pub nodes: BTreeMap<NodeId, NodeFacts>,
    /// Former members, by the names they had. Their numbers are not given out again.
    pub removed: BTreeMap<NodeId, String>,
    /// The VEs.
    pub ves: BTreeMap<VeId, VeRecord>,
    /// The migrations that go on, and some that ended.
    pub migrations: BTreeMap<MigrationId, MigrationRecord>,
    /// Tokens given out, by the hash of their secret.
    pub tokens: BTreeMap<String, TokenRecord>,
    /// What the moves from each node may send together, in bytes per second.
    pub bandwidth: Option<u64>,
    /// The newest time seen, in milliseconds since 1970. Never goes back, whatever a clock does.
    pub now_ms: u64,
    /// The highest epoch of a VE that was struck out.
    pub(crate) epochs_retired: Epoch,
    /// The order in which ended migrations may be forgotten.
    pub(crate) ended: VecDeque<MigrationId>,
}

impl State {
    /// The node called `name`, or numbered so.
    pub fn node_named(&self, name: &str) -> Option<NodeId> {
        let by_name = self.nodes.iter().find(|(_, facts)| facts.name == name);
        by_name.map(|(node, _)| *node).or_else(|| {
            let node = NodeId(name.parse().ok()?);
            self.nodes.contains_key(&node).then_some(node)
        })
    }

    /// The name of a node, whether it is still a member or not.
    pub fn node_name(&self, node: NodeId) -> Option<&str> {
        let facts = self.nodes.get(&node).map(|facts| &facts.name);
        facts.or_else(|| self.removed.get(&node)).map(String::as_str)
    }

    /// The VE called `name`, or numbered so.
    pub fn ve_named(&self, name: &str) -> Option<VeId> {
        let by_name = self.ves.iter().find(|(_, ve)| ve.facts.name.as_deref() == Some(name));
        by_name.map(|(ve, _)| *ve).or_else(|| {
            let ve = VeId(name.parse().ok()?);
            self.ves.contains_key(&ve).then_some(ve)
        })
    }

    /// The VE that has `address`.
    pub fn ve_at(&self, address: IpAddr) -> Option<VeId> {
        let mut ves = self.ves.iter();
        ves.find(|(_, ve)| ve.facts.addresses.contains(&address)).map(|(ve, _)| *ve)
    }

    /// The VEs `node` owns.
    pub fn owned_by(&self, node: NodeId) -> impl Iterator<Item = (VeId, &VeRecord)> {
        self.ves.iter().filter(move |(_, ve)| ve.owner == node).map(|(id, ve)| (*id, ve))
    }

    /// Whose VE it is after a migration; none while that can still change.
    ///
    /// A finished one may have ended either way: its target says so of one that was given up or
    /// returned as soon as nothing is left there, which may be before the source has asked. Then
    /// the owner tells, which is the source still, because the source begins no other migration
    /// of the VE before it knows. One that the log has forgotten was over long ago and is not its
    /// source's affair any more, or never switched: either way nothing waits for it.
    pub fn verdict(&self, migration: MigrationId) -> Option<Verdict> {
        let Some(record) = self.migrations.get(&migration) else { return Some(Verdict::Stays) };
        let stays = match record.stage {
            Stage::Begun | Stage::Switched => return None,
            Stage::Running => false,
            Stage::Returned | Stage::Aborted => true,
            Stage::Finished => self.ves.get(&record.ve).is_some_and(|ve| ve.owner == record.source),
        };
        Some(if stays { Verdict::Stays } else { Verdict::Moved })
    }

    /// The migrations `node` still has to do something for: as the source or the target of one
    /// that goes on, as the source of one whose copy it must remove, or the target likewise.
    pub fn unfinished_on(&self, node: NodeId) -> impl Iterator<Item = &MigrationRecord> {
        self.migrations.values().filter(move |record| match record.stage {
            Stage::Begun | Stage::Switched => record.source == node || record.target == node,
            Stage::Running => record.source == node,
            Stage::Returned | Stage::Aborted => record.target == node,
            Stage::Finished => false,
        })
    }
}
