//! Lets a daemon that was restarted tell its peers at once that their connections are gone.
//!
//! QUIC has a stateless reset for this: a token derived from a key and the connection's id. With
//! a key made from the node's own private key the new daemon can answer packets that belong to
//! connections of the old one; otherwise each peer would wait out its idle timeout.

use std::sync::Arc;
use std::time::Duration;

use quinn::crypto::{CryptoError, HmacKey};
use quinn::{ConnectionId, ConnectionIdGenerator, EndpointConfig};

use crate::identity::Identity;

const CONTEXT: &str = "ferry transport 1: stateless reset";
const SIGNATURE: usize = 32;
const ID: usize = 8;

struct ResetKey([u8; 32]);

impl HmacKey for ResetKey {
    fn sign(&self, data: &[u8], signature: &mut [u8]) {
        signature.copy_from_slice(blake3::keyed_hash(&self.0, data).as_bytes());
    }

    fn signature_len(&self) -> usize {
        SIGNATURE
    }

    fn verify(&self, data: &[u8], signature: &[u8]) -> Result<(), CryptoError> {
        let expected = blake3::keyed_hash(&self.0, data);
        // The hash type compares in constant time.
        match <[u8; SIGNATURE]>::try_from(signature) {
            Ok(found) if expected == found => Ok(()),
            _ => Err(CryptoError),
        }
    }
}

/// Random ids. (The library's default marks its ids with a key of the process, and then stays
/// silent about those of an earlier one.)
#[derive(Debug)]
struct RandomIds;

impl ConnectionIdGenerator for RandomIds {
    fn generate_cid(&mut self) -> ConnectionId {
        ConnectionId::new(&rand::random::<[u8; ID]>())
    }

    fn cid_len(&self) -> usize {
        ID
    }

    fn cid_lifetime(&self) -> Option<Duration> {
        None
    }
}

/// The endpoint configuration of the node with this identity.
pub(crate) fn endpoint_config(identity: &Identity) -> EndpointConfig {
    let key = ResetKey(blake3::derive_key(CONTEXT, identity.key.secret_der()));
    let mut config = EndpointConfig::new(Arc::new(key));
    config.cid_generator(|| Box::new(RandomIds));
    config
}
