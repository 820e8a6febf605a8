//! Who belongs to the cluster.

use transport::NodeId;

use super::super::command::{Answer, NodeFacts, Refused, Response, VeBrought};
use super::super::ids::Epoch;
use super::super::state::{State, TokenRecord, VeRecord};

impl State {
    pub(super) fn found(&mut self, cluster: String, node: NodeId, facts: NodeFacts) -> Answer {
        if self.cluster.is_some() {
            return Err(Refused::Founded);
        }
        self.cluster = Some(cluster);
        self.nodes.insert(node, facts);
        Ok(Response::Done)
    }

    pub(super) fn update_node(&mut self, node: NodeId, facts: NodeFacts) -> Answer {
        self.expect_node(node)?;
        self.check_node_facts(&facts, Some(node))?;
        self.nodes.insert(node, facts);
        Ok(Response::Done)
    }

    pub(super) fn admit_node(
        &mut self,
        token: &str,
        facts: NodeFacts,
        ves: Vec<VeBrought>,
    ) -> Answer {
        let record = self.tokens.get(token).ok_or(Refused::TokenUnknown)?;
        if let Some(by) = record.used_by {
            return Err(Refused::TokenUsed { by });
        }
        if record.expires_ms <= self.now_ms {
            return Err(Refused::TokenExpired);
        }
        self.check_node_facts(&facts, None)?;
        self.check_brought(&ves)?;
        let node = self.next_node();
        self.nodes.insert(node, facts);
        if let Some(record) = self.tokens.get_mut(token) {
            record.used_by = Some(node);
        }
        for VeBrought { ve, facts, desired } in ves {
            let epoch = self.first_epoch();
            self.ves.insert(ve, VeRecord { facts, owner: node, epoch, desired, migration: None });
        }
        Ok(Response::Admitted { node })
    }

    /// All clashes at once, those among the VEs brought included.
    fn check_brought(&self, ves: &[VeBrought]) -> Result<(), Refused> {
        let mut with_brought = self.clone();
        let newcomer = self.next_node();
        let mut clashes = Vec::new();
        for VeBrought { ve, facts, desired } in ves {
            let found = with_brought.clashes(*ve, facts, true);
            if !found.is_empty() {
                clashes.extend(found);
                continue;
            }
            let record = VeRecord {
                facts: facts.clone(),
                owner: newcomer,
                epoch: Epoch::default(),
                desired: *desired,
                migration: None,
            };
            with_brought.ves.insert(*ve, record);
        }
        if clashes.is_empty() { Ok(()) } else { Err(Refused::Clashes { clashes }) }
    }

    fn next_node(&self) -> NodeId {
        let last = self.nodes.keys().chain(self.removed.keys()).max();
        NodeId(last.map_or(1, |node| node.0 + 1))
    }

    pub(super) fn remove_node(&mut self, node: NodeId) -> Answer {
        if self.removed.contains_key(&node) {
            return Ok(Response::Done);
        }
        self.expect_node(node)?;
        let count = self.owned_by(node).count() as u64;
        if let Some((first, _)) = self.owned_by(node).next() {
            return Err(Refused::NodeOwnsVes { node, count, first });
        }
        let goes_on =
            |stage| matches!(stage, super::super::state::Stage::Begun | crate::Stage::Switched);
        let part = self
            .migrations
            .values()
            .find(|record| goes_on(record.stage) && [record.source, record.target].contains(&node));
        if let Some(record) = part {
            return Err(Refused::NodeMigrates { node, ve: record.ve });
        }
        if self.nodes.len() == 1 {
            return Err(Refused::LastNode);
        }
        if let Some(facts) = self.nodes.remove(&node) {
            self.removed.insert(node, facts.name);
        }
        // Nobody else can clear away what is left there.
        let left: Vec<_> = self.unfinished_on(node).map(|record| record.id).collect();
        for id in left {
            self.finish_migration(id)?;
        }
        Ok(Response::Done)
    }

    pub(super) fn add_token(&mut self, token: String, expires_ms: u64) -> Answer {
        let now = self.now_ms;
        self.tokens.retain(|_, record| record.expires_ms + TOKEN_MEMORY_MS > now);
        self.tokens.entry(token).or_insert(TokenRecord { expires_ms, used_by: None });
        Ok(Response::Done)
    }

    /// A limit of nothing would be the end of all moves: it is none.
    pub(super) fn set_bandwidth(&mut self, limit: Option<u64>) -> Answer {
        self.bandwidth = limit.filter(|&limit| limit > 0);
        Ok(Response::Done)
    }

    pub(super) fn expect_node(&self, node: NodeId) -> Result<&NodeFacts, Refused> {
        self.nodes.get(&node).ok_or(if self.removed.contains_key(&node) {
            Refused::NodeRemoved { node }
        } else {
            Refused::NoNode { node }
        })
    }

    fn check_node_facts(&self, facts: &NodeFacts, of: Option<NodeId>) -> Result<(), Refused> {
        for (&node, other) in self.nodes.iter().filter(|(node, _)| Some(**node) != of) {
            if other.name == facts.name {
                return Err(Refused::NodeNameTaken { name: other.name.clone(), node });
            }
            match facts.address {
                Some(address) if other.address == Some(address) => {
                    return Err(Refused::NodeAddressTaken { address, node });
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// An old token is still told apart from an unknown one for a week.
const TOKEN_MEMORY_MS: u64 = 7 * 24 * 3600 * 1000;
