//! The one-time ticket into a cluster.
//!
//! It names a member to ask, pins the cluster's authority, and carries a secret of which the
//! cluster keeps only the hash. Whether it was used or has expired is the cluster's knowledge,
//! not the token's.

use std::fmt;
use std::net::SocketAddr;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::identity::Fingerprint;

const PREFIX: &str = "ferry1-";
/// Bytes of checksum behind the body: enough to tell a typing mistake from a foreign token.
const CHECK: usize = 4;

/// A ticket for one node to join one cluster once.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinToken {
    /// A member to ask.
    pub address: SocketAddr,
    /// The cluster's authority.
    pub authority: Fingerprint,
    /// What proves the right to join.
    pub secret: [u8; 32],
}

impl fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JoinToken").field("address", &self.address).finish_non_exhaustive()
    }
}

/// Why a text is no token.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// The text does not begin as tokens do.
    #[error("not a join token: it does not begin with {PREFIX}")]
    Foreign,
    /// A character is missing or wrong.
    #[error("the join token is damaged or incomplete")]
    Damaged,
}

impl JoinToken {
    /// A token with a new random secret.
    pub fn create(address: SocketAddr, authority: Fingerprint) -> Self {
        Self { address, authority, secret: rand::random() }
    }

    /// What the cluster keeps of the secret.
    pub fn secret_hash(&self) -> [u8; 32] {
        *blake3::hash(&self.secret).as_bytes()
    }
}

impl fmt::Display for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut bytes = ckpt_format::codec::encode(self);
        let check = blake3::hash(&bytes);
        bytes.extend_from_slice(&check.as_bytes()[..CHECK]);
        write!(f, "{PREFIX}{}", hex::encode(bytes))
    }
}

impl FromStr for JoinToken {
    type Err = TokenError;

    fn from_str(text: &str) -> Result<Self, TokenError> {
        let digits = text.trim().strip_prefix(PREFIX).ok_or(TokenError::Foreign)?;
        let bytes = hex::decode(digits).map_err(|_| TokenError::Damaged)?;
        let (body, check) = bytes.split_last_chunk::<CHECK>().ok_or(TokenError::Damaged)?;
        if blake3::hash(body).as_bytes()[..CHECK] != check[..] {
            return Err(TokenError::Damaged);
        }
        ckpt_format::codec::decode(body).map_err(|_| TokenError::Damaged)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token() -> JoinToken {
        JoinToken::create("10.77.255.1:7420".parse().unwrap(), Fingerprint([7; 32]))
    }

    #[test]
    fn a_token_survives_being_typed() {
        let token = token();
        assert_eq!(format!(" {token}\n").parse(), Ok(token));
    }

    #[test]
    fn one_wrong_or_missing_character_is_noticed() {
        let text = token().to_string();
        let mut wrong = text.clone().into_bytes();
        wrong[30] = if wrong[30] == b'0' { b'1' } else { b'0' };
        let wrong = String::from_utf8(wrong).unwrap();
        assert_eq!(wrong.parse::<JoinToken>(), Err(TokenError::Damaged));
        assert_eq!(text[..text.len() - 2].parse::<JoinToken>(), Err(TokenError::Damaged));
        assert_eq!("ferry1-".parse::<JoinToken>(), Err(TokenError::Damaged));
        assert_eq!("K10abc".parse::<JoinToken>(), Err(TokenError::Foreign));
    }

    #[test]
    fn debug_output_keeps_the_secret() {
        let token = token();
        assert!(!format!("{token:?}").contains(&hex::encode(token.secret)));
    }
}
