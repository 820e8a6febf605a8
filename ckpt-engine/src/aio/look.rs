//! What the kernel keeps about the AIO contexts of a process and tells nobody.

use std::{io, sync::OnceLock};

use crate::{
    btf::Types,
    eye::{self, Eye},
};

/// Where things are in the structures of this kernel, in bytes.
#[derive(Clone, Copy, Debug)]
struct Places {
    memory_contexts: u32,
    table_size: u32,
    table_entries: u32,
    user: u32,
    processors: u32,
    max_requests: u32,
    events: u32,
    free: u32,
    completed: u32,
    tail: u32,
    cancelable: u32,
}

impl Places {
    fn find() -> io::Result<Self> {
        let types = Types::read()?;
        let context = |member| types.offset("kioctx", member);
        Ok(Self {
            memory_contexts: types.offset("mm_struct", "ioctx_table")?,
            table_size: types.offset("kioctx_table", "nr")?,
            table_entries: types.offset("kioctx_table", "table")?,
            user: context("user_id")?,
            processors: context("cpu")?,
            max_requests: context("max_reqs")?,
            events: context("nr_events")?,
            free: context("reqs_available")?,
            completed: context("completed_events")?,
            tail: context("tail")?,
            cancelable: context("active_reqs")?,
        })
    }

    fn known() -> io::Result<&'static Self> {
        static PLACES: OnceLock<Option<Places>> = OnceLock::new();
        PLACES.get_or_init(|| Self::find().ok()).as_ref().ok_or(io::ErrorKind::Unsupported.into())
    }
}

/// Finds out what takes long, before there is a hurry.
pub(super) fn prepare() {
    // Where it is unknown that is told when it is needed.
    let _ = Places::known();
    eye::prepare();
}

/// An AIO context of a process as the kernel has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Context {
    /// By which the program knows it: where its ring was mapped.
    pub(super) user: u64,
    /// How many requests the program asked for.
    pub(super) max_requests: u32,
    /// How many events the ring has room for.
    pub(super) events: u32,
    /// Where the next event goes.
    pub(super) tail: u32,
    /// Requests that are not completed.
    pub(super) in_flight: u32,
    /// Some of these can wait for ever.
    pub(super) waits: bool,
}

/// The contexts of a process. Exact for one that stands still.
pub(super) fn contexts(host: i32) -> io::Result<Vec<Context>> {
    const TABLE_MAX: u64 = 1 << 16;
    let places = Places::known()?;
    let eye = Eye::on(host)?;
    let memory = eye.memory()?;
    let table = match memory {
        0 => 0,
        memory => eye.number(memory, places.memory_contexts)?,
    };
    if table == 0 {
        return Ok(Vec::new());
    }
    let size = u64::from(eye.word(table, places.table_size)?);
    if size > TABLE_MAX {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut contexts = Vec::new();
    for slot in 0..size {
        let entry = eye.number(table + slot * 8, places.table_entries)?;
        if entry != 0 {
            contexts.push(context(&eye, entry, places)?);
        }
    }
    Ok(contexts)
}

fn context(eye: &Eye, at: u64, places: &Places) -> io::Result<Context> {
    let events = eye.word(at, places.events)?;
    let parts = eye.number(at, places.processors)?;
    let free = eye.word(at, places.free)?.wrapping_add(eye.sum(parts)?);
    let completed = eye.word(at, places.completed)?;
    let list = at.wrapping_add(places.cancelable.into());
    Ok(Context {
        user: eye.number(at, places.user)?,
        max_requests: eye.word(at, places.max_requests)?,
        events,
        tail: eye.word(at, places.tail)?,
        in_flight: events.wrapping_sub(1).wrapping_sub(free).wrapping_sub(completed),
        waits: eye.number(list, 0)? != list,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::aio;

    #[test]
    fn contexts_are_seen_with_what_they_hold() {
        let own = std::process::id().cast_signed();
        let context = aio::Context::new(100).unwrap();
        let seen = contexts(own).unwrap();
        let seen = seen.iter().find(|seen| seen.user == context.address()).unwrap();
        assert_eq!((seen.max_requests, seen.tail, seen.in_flight, seen.waits), (100, 0, 0, false));
        // Three pages of 32 bytes each, without the head.
        assert_eq!(seen.events, 2 * 128 - 1);
    }
}
