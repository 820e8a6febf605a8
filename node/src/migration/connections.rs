//! Connections that the target can make before the VE stops.

use std::os::fd::AsFd;

use ckpt_engine::files;
use ckpt_format::files::RestingConnections;

use super::{
    blackout::{CopyError, Live},
    messages::Item,
    pipe::Pipe,
};

/// How many are told in one piece.
const PIECE: usize = 1000;

impl Live {
    /// Tells which connections of the VE rest, as far as that was not told before.
    pub(super) fn tell_connections(&mut self, pipe: &Pipe) -> Result<(), CopyError> {
        let networks = self.spaces.networks().iter().map(AsFd::as_fd).collect();
        let source = self.holders.source(self.init, self.id_base);
        let told = self.resting.look(&files::Source { networks, ..source });
        let tell = |told| pipe.item(Item::Connections(told)).map_err(|_| CopyError::Link);
        for wake in told.wake.chunks(PIECE) {
            tell(RestingConnections { wake: wake.to_vec(), ..RestingConnections::default() })?;
        }
        for rest in told.rest.chunks(PIECE) {
            tell(RestingConnections { rest: rest.to_vec(), ..RestingConnections::default() })?;
        }
        // What is there already costs less.
        self.fixed.connections = self.resting.count();
        self.fixed.sockets = self.fixed.sockets.saturating_sub(self.fixed.connections);
        Ok(())
    }
}
