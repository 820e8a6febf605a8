//! Keys and keyrings (keyrings(7)).

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// All keys that processes of the VE possess, and those of its users.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Keys {
    /// All of them, each once; elsewhere they are named by their places here.
    pub keys: Vec<Key>,
    /// The keyrings of threads, by the number of the thread in the VE.
    pub threads: BTreeMap<i32, Keyrings>,
    /// The keyrings that the kernel keeps for users, and which users they belong to.
    pub users: Vec<(OfUser, u32, u32)>,
}

/// Which of the keyrings that a user has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum OfUser {
    /// user-keyring(7)
    User,
    /// user-session-keyring(7)
    Session,
    /// persistent-keyring(7)
    Persistent,
}

/// One key.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Key {
    /// Its type: `user`, `logon` or `keyring`.
    pub kind: String,
    /// By what it is found.
    #[serde(with = "serde_bytes")]
    pub description: Vec<u8>,
    /// Whose it is.
    pub user: u32,
    /// Of which group it is.
    pub group: u32,
    /// `KEY_POS_VIEW` and so on.
    pub permissions: u32,
    /// When it expires, in seconds since 1970; 0 is never.
    pub expires_s: i64,
    /// `KEYCTL_REVOKE`
    pub revoked: bool,
    /// What it holds, if it is no keyring.
    #[serde(with = "serde_bytes")]
    pub payload: Vec<u8>,
    /// What it holds, if it is a keyring: places of keys.
    pub links: Vec<u32>,
}

/// The keyrings of one thread: places of keys.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Keyrings {
    /// session-keyring(7)
    pub session: Option<u32>,
    /// process-keyring(7)
    pub process: Option<u32>,
    /// thread-keyring(7)
    pub thread: Option<u32>,
}

impl Keys {
    /// Whether there is nothing that a new VE would not have.
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }
}
