//! Contexts for asynchronous input and output (io_setup(2)).
//!
//! A context is known by the address of its ring, which the kernel maps and which the program may
//! read by itself. On the target each is made anew, its ring moved to the old address (the kernel
//! follows it), and advanced by empty requests until its head and tail are where they were.
//!
//! A request that is not completed cannot go along: those at disks are waited for, others are
//! refused.

mod look;
mod rebuild;

use std::{
    io,
    time::{Duration, Instant},
};

use ckpt_format::{
    memory::{Area, Backing, PAGE},
    process::Ring,
};

pub(crate) use self::rebuild::rebuild;
use crate::{
    procfs::{self, MapLine},
    sys::{aio::Context, vm},
};

/// How long requests may take to complete once the VE stands still.
const PATIENCE: Duration = Duration::from_millis(500);
/// Where head and number stand in a ring (`struct aio_ring`).
const HEAD: usize = 8;
const HEADER: usize = 32;
const EVENT: usize = 32;

/// Why the contexts of a process cannot be moved.
#[derive(Debug)]
pub(crate) enum Refusal {
    /// The kernel does not let us look at them.
    Unknown(io::Error),
    /// One waits for something (`IOCB_CMD_POLL`).
    Waits,
    /// Requests that have not completed in time.
    InFlight(u32),
}

impl Refusal {
    /// What it is, and what helps.
    pub(crate) fn describe(&self) -> (String, &'static str) {
        match self {
            Self::Unknown(error) => (
                format!("an AIO context that this kernel does not let us look into ({error})"),
                "restart the program without it",
            ),
            Self::Waits => (
                "an AIO request that waits for something (IOCB_CMD_POLL)".to_owned(),
                "try again when it has come, or stop the program",
            ),
            Self::InFlight(count) => {
                (format!("{count} AIO requests that take long"), "try again in a moment")
            }
        }
    }
}

/// Whether a map is the ring of a context.
pub(crate) fn is_ring(line: &MapLine) -> bool {
    line.name.starts_with("/[aio]") && Some(line.device.as_str()) == device()
}

/// The device number of the kernel's own file system of rings, as maps shows it. A file of the VE
/// with a misleading name is never on it.
fn device() -> Option<&'static str> {
    static DEVICE: std::sync::OnceLock<Option<String>> = std::sync::OnceLock::new();
    let find = || {
        let context = Context::new(1).ok()?;
        let maps = procfs::read_text(std::process::id().cast_signed(), "maps").ok()?;
        let mut lines = procfs::parse_maps(&maps).into_iter();
        Some(lines.find(|line| line.start == context.address())?.device)
    };
    DEVICE.get_or_init(find).as_deref()
}

/// Finds out what takes long, if the process has a context.
pub(crate) fn prepare(host: i32) {
    if maps(host).is_ok_and(|lines| lines.iter().any(is_ring)) {
        look::prepare();
    }
}

fn maps(host: i32) -> io::Result<Vec<MapLine>> {
    let text = std::fs::read_to_string(procfs::path(host, "maps"))?;
    Ok(procfs::parse_maps(&text))
}

/// What of a running process cannot be moved, unless it ends by itself.
pub(crate) fn check(host: i32) -> Result<(), Refusal> {
    let contexts = look::contexts(host).map_err(Refusal::Unknown)?;
    if contexts.iter().any(|context| context.waits) { Err(Refusal::Waits) } else { Ok(()) }
}

/// Reads the rings of a process that stands still, once its requests are completed.
pub(crate) fn capture(host: i32) -> Result<Vec<Ring>, Refusal> {
    let start = Instant::now();
    let contexts = loop {
        let contexts = look::contexts(host).map_err(Refusal::Unknown)?;
        let in_flight: u32 = contexts.iter().map(|context| context.in_flight).sum();
        match in_flight {
            0 => break contexts,
            _ if contexts.iter().any(|context| context.waits) => return Err(Refusal::Waits),
            _ if start.elapsed() > PATIENCE => return Err(Refusal::InFlight(in_flight)),
            _ => std::thread::sleep(Duration::from_micros(200)),
        }
    };
    let lines = maps(host).map_err(Refusal::Unknown)?;
    let ring = |line: &MapLine| -> io::Result<Ring> {
        let mut contents = vec![0; (line.end - line.start) as usize];
        let len = contents.len();
        if vm::read_process(host, &mut contents, &[(line.start, len)])? != len {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let context = contexts.iter().find(|context| context.user == line.start);
        let events = context.map_or(0, |context| context.events);
        let head = word(&contents, HEAD).unwrap_or(0);
        let used = contents.iter().rposition(|&byte| byte != 0).map_or(0, |last| last + 1);
        contents.truncate(used);
        Ok(Ring {
            start: line.start,
            requests: context.map_or(0, |context| context.max_requests),
            events,
            // A program may have written anything; this is what the kernel makes of it.
            head: head.checked_rem(events).unwrap_or(0),
            tail: context.map_or(0, |context| context.tail),
            contents,
        })
    };
    lines
        .iter()
        .filter(|line| is_ring(line))
        .map(|line| ring(line).map_err(Refusal::Unknown))
        .collect()
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at + 4)?.try_into().ok().map(u32::from_ne_bytes)
}

/// Whether a ring that somebody sent makes sense in an area of this size.
pub(crate) fn fits(ring: &Ring, size: u64) -> bool {
    let whole = ((HEADER + EVENT * ring.events as usize) as u64).next_multiple_of(PAGE);
    let in_use = ring.head < ring.events && ring.tail < ring.events && whole == size;
    ring.contents.len() as u64 <= size && (ring.requests == 0 || in_use)
}

/// Whether any of these areas is a ring.
pub(crate) fn any(areas: &[Area]) -> bool {
    areas.iter().any(|area| area.backing == Backing::Ring)
}

#[cfg(test)]
mod tests {
    use std::{io::Write, os::fd::AsFd};

    use super::*;
    use crate::sys::program::{
        aio::{Act, Queue},
        map::{Backing, Map},
    };

    #[test]
    fn a_request_that_waits_is_refused_until_it_is_answered() {
        let own = std::process::id().cast_signed();
        let (reader, mut writer) = io::pipe().unwrap();
        let map = Map::new(1, Backing::Private).unwrap();
        let queue = Queue::new(4).unwrap();
        queue.submit(Act::Poll, reader.as_fd(), &map, (0, 0, 0), 7).unwrap();
        assert!(matches!(check(own), Err(Refusal::Waits)));
        assert!(matches!(capture(own), Err(Refusal::Waits)));
        writer.write_all(b"x").unwrap();
        while matches!(check(own), Err(Refusal::Waits)) {}
        let rings = capture(own).unwrap();
        let ring = rings.iter().find(|ring| ring.start == queue.number()).unwrap();
        assert_eq!((ring.requests, ring.head, ring.tail), (4, 0, 1));
        assert!(fits(ring, PAGE));
        assert!(!fits(ring, 2 * PAGE));
        // What was asked for stands at the beginning of the first event.
        assert_eq!(word(&ring.contents, HEADER), Some(7));
    }
}
