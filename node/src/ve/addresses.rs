//! Making sure that an address is nobody else's before a VE gets it.
//!
//! VEs of the cluster are kept apart by the log; here the LAN is asked about all other hosts. A
//! VE that moves is not asked about: its addresses are in use, by itself.

use std::{net::IpAddr, sync::Arc, thread::JoinHandle};

use ckpt_format::network::Cidr;
use tokio::task::spawn_blocking;

use super::{Runtime, VeError};
use crate::network::{Bridge, Claim, NetworkError, find_claim};

/// A question to the LAN that is under way.
pub(super) struct Question(JoinHandle<Result<Option<Claim>, NetworkError>>);

impl Question {
    /// Asks for these addresses, beside whatever else there is to be done.
    pub(super) fn ask(bridge: &Bridge, addresses: &[Cidr]) -> Self {
        let bridge = bridge.clone();
        let addresses: Vec<IpAddr> = addresses.iter().map(|it| it.address()).collect();
        Self(std::thread::spawn(move || find_claim(&bridge, &addresses)))
    }

    /// Waits for the answer: an error if somebody has one of the addresses.
    pub(super) fn answer(self) -> Result<(), VeError> {
        let found = self.0.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        match found? {
            Some(Claim { address, owner }) => Err(VeError::AddressOnNetwork { address, owner }),
            None => Ok(()),
        }
    }
}

impl Runtime {
    /// An error if somebody on the LAN has one of these addresses.
    pub(super) async fn check_unclaimed(
        self: &Arc<Self>,
        addresses: Vec<Cidr>,
    ) -> Result<(), VeError> {
        let question = Question::ask(&self.bridge, &addresses);
        spawn_blocking(move || question.answer()).await?
    }
}
