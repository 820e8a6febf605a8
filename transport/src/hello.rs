//! The first words on every connection: who, which protocol versions, what for.
//!
//! The version range stands first, hand-encoded, so that a node of any version can read it and
//! say what is wrong.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::error::LinkError;
use crate::identity::NodeId;

/// The protocol versions a node speaks, both ends included.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Versions {
    /// The oldest.
    pub oldest: u16,
    /// The newest.
    pub newest: u16,
}

impl Versions {
    /// What this build speaks. From version 2 on pages that a target has already are not sent again, and
    /// it is told ahead what it will need; from version 3 on processes come before the rest of the
    /// state.
    pub const CURRENT: Self = Self { oldest: 1, newest: 3 };

    /// The newest version both sides speak.
    pub fn common(self, other: Self) -> Option<u16> {
        let newest = self.newest.min(other.newest);
        (newest >= self.oldest && newest >= other.oldest).then_some(newest)
    }
}

impl fmt::Display for Versions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.oldest == self.newest {
            write!(f, "version {}", self.newest)
        } else {
            write!(f, "versions {} to {}", self.oldest, self.newest)
        }
    }
}

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Purpose {
    /// Calls and control streams.
    Services,
    /// The bulk streams of one link.
    Bulk {
        /// The link's session, agreed on its control stream.
        session: u128,
    },
    /// One request to join.
    Join,
}

/// What the connecting side says first.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Hello {
    pub(crate) purpose: Purpose,
    /// Who connects; nobody yet when joining.
    pub(crate) node: Option<NodeId>,
    pub(crate) name: String,
}

/// Why a peer refuses a connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum Refusal {
    /// No common version; the header says which the refusing side speaks.
    #[error("no common protocol version")]
    Version,
    /// The connecting side proved no identity, or not the one it claims.
    #[error("the certificate does not prove the identity claimed")]
    Identity,
    /// The node was removed from the cluster.
    #[error("this node was removed from the cluster")]
    Removed,
    /// The session of a bulk connection is not known.
    #[error("unknown session")]
    Session,
    /// The member does not admit nodes.
    #[error("this member does not admit nodes")]
    NoJoin,
}

/// The answer to a hello.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum Welcome {
    Accepted { version: u16, node: NodeId, name: String },
    Refused(Refusal),
}

/// Puts the version header before a body.
pub(crate) fn seal<T: Serialize>(versions: Versions, body: &T) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(64);
    bytes.extend_from_slice(&versions.oldest.to_le_bytes());
    bytes.extend_from_slice(&versions.newest.to_le_bytes());
    bytes.extend_from_slice(&ckpt_format::codec::encode(body));
    bytes
}

/// Takes the version header off.
pub(crate) fn unseal(bytes: &[u8]) -> Result<(Versions, &[u8]), LinkError> {
    let (oldest, rest) = bytes.split_first_chunk::<2>().ok_or(LinkError::Unintelligible)?;
    let (newest, body) = rest.split_first_chunk::<2>().ok_or(LinkError::Unintelligible)?;
    let versions =
        Versions { oldest: u16::from_le_bytes(*oldest), newest: u16::from_le_bytes(*newest) };
    Ok((versions, body))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_common_version_wins() {
        let versions = |oldest, newest| Versions { oldest, newest };
        assert_eq!(versions(1, 3).common(versions(2, 4)), Some(3));
        assert_eq!(versions(2, 4).common(versions(1, 3)), Some(3));
        assert_eq!(versions(1, 1).common(versions(2, 3)), None);
        assert_eq!(versions(5, 6).common(versions(1, 4)), None);
    }

    #[test]
    fn a_header_too_short_is_no_panic() {
        for length in 0..4 {
            assert_eq!(unseal(&vec![1; length]), Err(LinkError::Unintelligible));
        }
    }
}
