//! The numbers of VEs.

use serde::{Deserialize, Serialize};

/// The number of a VE. The first hundred are reserved, as in OpenVZ.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub struct VeId(u32);

/// A number that no VE can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0} is no VE number: they are from 101 to 2147483644")]
pub struct BadVeId(u32);

impl VeId {
    /// The number.
    pub fn number(self) -> u32 {
        self.0
    }
}

impl TryFrom<u32> for VeId {
    type Error = BadVeId;

    fn try_from(number: u32) -> Result<Self, Self::Error> {
        match number {
            101..=2_147_483_644 => Ok(Self(number)),
            _ => Err(BadVeId(number)),
        }
    }
}

impl From<VeId> for u32 {
    fn from(id: VeId) -> Self {
        id.0
    }
}

impl std::fmt::Display for VeId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}
