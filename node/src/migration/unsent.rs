//! What closed connections of a VE still send, on a host where nobody can read it and a move would
//! lose it: they have a while to send it.

use std::{
    os::fd::AsFd,
    time::{Duration, Instant},
};

use ckpt_engine::{container::Spaces, files};

/// A peer that takes nothing does not keep the VE here for longer.
const PATIENCE: Duration = Duration::from_secs(3);
const PAUSE: Duration = Duration::from_millis(20);

/// Waits for it as long as the VE runs. What is left then, the engine names in the log.
pub(super) fn wait(init: i32, spaces: &Spaces) {
    let networks: Vec<_> = spaces.networks().iter().map(AsFd::as_fd).collect();
    let end = Instant::now() + PATIENCE;
    while Instant::now() < end
        && files::unsent(init, &networks).is_ok_and(|unsent| !unsent.is_empty())
    {
        std::thread::sleep(PAUSE);
    }
}
