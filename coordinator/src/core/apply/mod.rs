//! One request in, one answer out. Every replica comes to the same result.

mod membership;
mod migration;
mod ve;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::command::{Answer, Command, Request};
use super::ids::RequestId;
use super::state::State;

/// Answers kept for requests that are sent again.
const ANSWERS_MAX: usize = 4096;

/// The state and the memory of answers: everything a snapshot holds.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Core {
    /// Shared with whoever looks at it; a change makes a new one.
    #[serde(with = "shared")]
    pub(crate) state: Arc<State>,
    answers: BTreeMap<RequestId, Answer>,
    /// The order in which answers may be forgotten.
    answered: VecDeque<RequestId>,
}

impl Core {
    /// Carries out a request. A refused one changes nothing but the memory of answers.
    pub(crate) fn apply(&mut self, request: Request) -> Answer {
        if let Some(answer) = self.answers.get(&request.id) {
            return answer.clone();
        }
        let state = Arc::make_mut(&mut self.state);
        state.now_ms = state.now_ms.max(request.at_ms);
        let answer = state.carry_out(request.command);
        self.answers.insert(request.id, answer.clone());
        self.answered.push_back(request.id);
        while self.answered.len() > ANSWERS_MAX {
            if let Some(oldest) = self.answered.pop_front() {
                self.answers.remove(&oldest);
            }
        }
        answer
    }
}

/// An `Arc` is written as what it holds.
mod shared {
    use std::sync::Arc;

    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub(super) fn serialize<T: Serialize, S: Serializer>(
        value: &Arc<T>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        value.as_ref().serialize(serializer)
    }

    pub(super) fn deserialize<'de, T: Deserialize<'de>, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Arc<T>, D::Error> {
        T::deserialize(deserializer).map(Arc::new)
    }
}

impl State {
    fn carry_out(&mut self, command: Command) -> Answer {
        match command {
            Command::Found { cluster, node, facts } => self.found(cluster, node, facts),
            Command::UpdateNode { node, facts } => self.update_node(node, facts),
            Command::AdmitNode { token, facts, ves } => self.admit_node(&token, facts, ves),
            Command::RemoveNode { node } => self.remove_node(node),
            Command::AddToken { token, expires_ms } => self.add_token(token, expires_ms),
            Command::SetBandwidth { limit } => self.set_bandwidth(limit),
            Command::RegisterVe { ve, owner, facts } => self.register_ve(ve, owner, facts),
            Command::UpdateVe { ve, epoch, facts } => self.update_ve(ve, epoch, facts),
            Command::UnregisterVe { ve, epoch } => self.unregister_ve(ve, epoch),
            Command::SetDesired { ve, epoch, desired } => self.set_desired(ve, epoch, desired),
            Command::BeginMigration { migration, ve, epoch, source, target } => {
                self.begin_migration(migration, ve, epoch, source, target)
            }
            Command::Switch { migration, epoch } => self.switch(migration, epoch),
            Command::AbortMigration { migration } => self.abort_migration(migration),
            Command::ReportRunning { migration } => self.report_running(migration),
            Command::ReturnVe { migration, epoch } => self.return_ve(migration, epoch),
            Command::FinishMigration { migration } => self.finish_migration(migration),
        }
    }
}
