//! What a VE has beside its memory, of which a blackout costs something for each.

use std::path::Path;

use ckpt_engine::{files, procfs};

use super::{
    blackout::{CopyError, Live},
    messages::Item,
    pipe::Pipe,
    rounds::Fixed,
};

impl Live {
    /// Counts it.
    pub(super) fn count_fixed(&mut self) {
        let mut fixed = Fixed::default();
        for process in self.tracker.processes() {
            let entries =
                |name| std::fs::read_dir(procfs::path(process.host(), name)).into_iter().flatten();
            fixed.processes += 1;
            fixed.threads += entries("task").count();
            for link in entries("fd").map(|it| it.and_then(|it| std::fs::read_link(it.path()))) {
                fixed.descriptors += 1;
                fixed.sockets += usize::from(link.is_ok_and(|it| is_socket(&it)));
            }
        }
        self.fixed = fixed;
    }

    /// Makes room for descriptors at both ends, which takes long while the VE stands still.
    pub(super) fn make_room(&self, pipe: &Pipe) -> Result<(), CopyError> {
        let Fixed { descriptors, sockets, .. } = self.fixed;
        // Sockets are held twice while they are made.
        let count = descriptors + sockets;
        if let Err(error) = files::make_room(count) {
            tracing::info!(%error, count, "no room was made for the descriptors of a VE");
        }
        let count = u32::try_from(count).unwrap_or(u32::MAX);
        pipe.item(Item::Descriptors(count)).map_err(|_| CopyError::Link)
    }
}

/// By what `/proc/PID/fd` shows.
fn is_socket(link: &Path) -> bool {
    link.as_os_str().as_encoded_bytes().starts_with(b"socket:")
}
