//! Where the data of a VE goes when it goes into a file.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::{
    image::{ImageFileError, ImageWriter},
    migration::messages::{Item, State},
};

/// A checkpoint file that several hands write to, one after the other.
#[derive(Clone, Debug)]
pub(in crate::migration) struct Outlet(Arc<Mutex<Slot>>);

#[derive(Debug)]
struct Slot {
    /// Taken once it is complete, has failed, or is not wanted any more.
    writer: Option<ImageWriter>,
    failure: Option<ImageFileError>,
}

impl Outlet {
    pub(super) fn new(writer: ImageWriter) -> Self {
        Self(Arc::new(Mutex::new(Slot { writer: Some(writer), failure: None })))
    }

    /// True once nothing more can be written.
    pub(in crate::migration) fn is_broken(&self) -> bool {
        self.slot().writer.is_none()
    }

    /// Writes one piece.
    pub(in crate::migration) fn item(&self, item: &Item) -> Result<(), ()> {
        self.write(|writer| match item {
            Item::Memory(record) => writer.memory(record),
            Item::File(record) => writer.file(record),
            // Nobody waits at the other end, the template stays here, the state goes whole, all memory
            // is in the file, and nothing is made ahead of the state.
            Item::Barrier(_)
            | Item::Template(_)
            | Item::TemplateEnd
            | Item::State { .. }
            | Item::Processes { .. }
            | Item::Postcopy
            | Item::Later { .. }
            | Item::Descriptors(_)
            | Item::Connections(_) => Ok(()),
        })
    }

    /// Writes the state.
    pub(in crate::migration) fn state(&self, state: &State) -> Result<(), ()> {
        self.write(|writer| writer.state(state))
    }

    /// Nothing more is wanted: whoever writes is told so.
    pub(super) fn close(&self) {
        self.slot().writer = None;
    }

    /// How much was written, in bytes.
    pub(super) fn bytes(&self) -> u64 {
        self.slot().writer.as_ref().map_or(0, ImageWriter::len)
    }

    /// The file, to be completed.
    pub(super) fn take(&self) -> Option<ImageWriter> {
        self.slot().writer.take()
    }

    /// Why nothing more could be written.
    pub(super) fn failure(&self) -> Option<ImageFileError> {
        self.slot().failure.take()
    }

    fn slot(&self) -> MutexGuard<'_, Slot> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(
        &self,
        work: impl FnOnce(&mut ImageWriter) -> Result<(), ImageFileError>,
    ) -> Result<(), ()> {
        let mut slot = self.slot();
        let Some(writer) = &mut slot.writer else { return Err(()) };
        work(writer).map_err(|failure| {
            slot.failure = Some(failure);
            slot.writer = None;
        })
    }
}
