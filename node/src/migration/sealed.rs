//! A VE that may run elsewhere by now.

use std::time::Instant;

use ckpt_engine::{capture::CaptureError, files, freeze::Sealed};
use ckpt_format::network::Frame;

use super::{
    blackout::{CopyError, Live},
    holders::Holders,
};

/// A VE that stands still until the log says who owns it.
pub(super) struct SealedVe {
    sealed: Option<Sealed>,
    live: Live,
    frames: Vec<Frame>,
    /// When it stopped.
    pub(super) start: Instant,
}

impl SealedVe {
    pub(super) fn new(live: Live, sealed: Option<Sealed>, start: Instant) -> Self {
        Self { sealed, live, frames: Vec::new(), start }
    }

    /// Takes the frames that were held since the last call.
    pub(super) fn drain(&mut self) -> Vec<Frame> {
        let Some(hold) = &mut self.live.hold else { return Vec::new() };
        match hold.drain() {
            Ok(drained) => {
                if drained.lost > 0 {
                    tracing::warn!(lost = drained.lost, "frames for a VE did not fit the hold");
                }
                // Kept as well: they are due here if the VE comes back.
                self.frames.extend(drained.frames.iter().cloned());
                drained.frames
            }
            Err(error) => {
                tracing::warn!(%error, "cannot read the held packets of a VE");
                Vec::new()
            }
        }
    }

    /// The log says that the VE is ours: it goes on here.
    pub(super) fn resume(&mut self) -> Result<(), CopyError> {
        let holders = Holders::of(&self.live.freezer)?;
        files::mend(&holders.source(self.live.init, self.live.id_base))
            .map_err(CaptureError::Blocked)?;
        if let Some(hold) = &mut self.live.hold {
            hold.open_outgoing()?;
        }
        if let Some(sealed) = self.sealed.take() {
            sealed.unseal().thaw()?;
        }
        if let Some(hold) = &mut self.live.hold {
            hold.reopen(&self.frames)?;
        }
        Ok(())
    }
}
