//! Asynchronous input and output: contexts, with what has come and was not fetched.

use std::collections::VecDeque;
use std::fs::File;
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::atomic::Ordering;
use std::time::Duration;

use ckpt_engine::sys::program::aio::{Act, Event, Queue};
use ckpt_engine::sys::program::map::{Backing, Map, PAGE_BYTES};

use crate::client::record::mix;
use crate::workload::context::Context;
use crate::workload::outcome::{Failure, ensure, same};
use crate::workload::process::Child;

/// A block as direct input and output want it.
const BLOCK: usize = PAGE_BYTES;
const BLOCK_WORDS: usize = BLOCK / 8;

/// What a block of a file holds.
fn block(number: usize) -> Vec<u8> {
    let words =
        (0..BLOCK_WORDS).flat_map(|word| mix((number * BLOCK_WORDS + word) as u64).to_le_bytes());
    words.collect()
}

fn make_file(context: &Context, blocks: usize) -> Result<File, Failure> {
    let path = context.path("blocks");
    let file = File::options().read(true).write(true).create_new(true).open(&path)?;
    for number in 0..blocks {
        file.write_all_at(&block(number), (number * BLOCK) as u64)?;
    }
    // Not every file system can do without its cache.
    Ok(File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_DIRECT)
        .open(&path)
        .unwrap_or(file))
}

fn check_block(map: &Map, place: usize, number: usize) -> Result<(), Failure> {
    for word in 0..BLOCK_WORDS {
        let found = map.word(place * BLOCK_WORDS + word).load(Ordering::Relaxed);
        same("what was read", found, mix((number * BLOCK_WORDS + word) as u64))?;
    }
    Ok(())
}

/// Blocks of a file are read into buffers, eight at a time.
pub(super) fn reads(context: &mut Context) -> Result<(), Failure> {
    const BLOCKS: usize = 200;
    const DEPTH: usize = 8;
    let file = make_file(context, BLOCKS)?;
    let buffers = Map::new(DEPTH, Backing::Private)?;
    let queue = Queue::new(64)?;
    let mut numbers = [0; DEPTH];
    let mut random = 5;
    let mut ask = |place: usize, numbers: &mut [usize; DEPTH]| -> Result<(), Failure> {
        random = mix(random);
        numbers[place] = random as usize % BLOCKS;
        let offset = (numbers[place] * BLOCK) as i64;
        let part = (place * BLOCK, BLOCK, offset);
        Ok(queue.submit(Act::Read, file.as_fd(), &buffers, part, place as u64)?)
    };
    (0..DEPTH).try_for_each(|place| ask(place, &mut numbers))?;
    let mut before = Vec::new();
    while context.step(Duration::from_millis(2))? {
        // Those that were checked once are still the same when the next have come.
        for &(place, number) in &before {
            check_block(&buffers, place, number)?;
        }
        for (place, _) in before.drain(..) {
            ask(place, &mut numbers)?;
        }
        for (data, result) in queue.events(DEPTH, None)? {
            let place = data as usize;
            ensure(place < DEPTH, || format!("an event {data} of nobody"))?;
            same("bytes read", result, BLOCK as i64)?;
            check_block(&buffers, place, numbers[place])?;
            before.push((place, numbers[place]));
        }
        if context.progress.plant()
            && let Some(&(place, _)) = before.first()
        {
            buffers.word(place * BLOCK_WORDS + 7).fetch_add(1, Ordering::Relaxed);
        }
    }
    Ok(())
}

/// The ring as a program sees it: head and tail.
fn ring(queue: &Queue) -> Result<(u32, u32), Failure> {
    let mut header = [0; 16];
    File::open("/proc/self/mem")?.read_exact_at(&mut header, queue.number())?;
    let word = |at: usize| u32::from_ne_bytes([0, 1, 2, 3].map(|byte| header[at + byte]));
    Ok((word(8), word(12)))
}

/// Events that nobody has fetched yet wait in the ring, which goes round and round.
pub(super) fn unread(context: &mut Context) -> Result<(), Failure> {
    let null = File::open("/dev/null")?;
    let zero = File::open("/dev/zero")?;
    let map = Map::new(1, Backing::Private)?;
    let queue = Queue::new(20)?;
    let mut expected: VecDeque<Event> = VecDeque::new();
    let mut last = ring(&queue)?;
    let mut next = 1;
    while context.step(Duration::from_millis(2))? {
        same("the ring between two looks", ring(&queue)?, last)?;
        let wanted = 3 + (next % 7) as usize;
        while expected.len() < wanted {
            let length = next as usize % 100;
            let (file, result) = if next % 3 == 0 { (&null, 0) } else { (&zero, length as i64) };
            queue.submit(Act::Read, file.as_fd(), &map, (0, length, 0), next)?;
            expected.push_back((next, result));
            next += 1;
        }
        for _ in 0..2 {
            let found = queue.events(1, Some(Duration::ZERO))?;
            same("the oldest event", found.first().copied(), expected.pop_front())?;
        }
        if context.progress.plant() {
            expected[0].1 += 1;
        }
        last = ring(&queue)?;
    }
    // All that were asked for come, and no more.
    let rest = queue.events(expected.len() + 1, Some(Duration::ZERO))?;
    same("the last events", rest, expected.into())
}

/// Several contexts of several sizes, one of which a child has seen.
pub(super) fn several(context: &mut Context) -> Result<(), Failure> {
    let (mut reader, writer) = std::io::pipe()?;
    let map = Map::new(1, Backing::Private)?;
    let queues: Vec<Queue> =
        [1, 200, 5000].into_iter().map(Queue::new).collect::<Result<_, _>>()?;
    map.word(0).store(u64::MAX, Ordering::Relaxed);
    let head = ring(&queues[0])?;
    // It has the memory of the ring, but not the context.
    let own = &queues;
    let child = Child::start(context, "heir", |stop| {
        while !stop.wait(Duration::from_millis(10))? {
            ring(&own[0])?;
            let none = own[0].events(1, Some(Duration::ZERO));
            same(
                "a context of the parent",
                none.map_err(|error| error.raw_os_error()),
                Err(Some(libc::EINVAL)),
            )?;
        }
        Ok(())
    })?;
    same("a new ring", head, (0, 0))?;
    let mut turn = 0u64;
    while context.step(Duration::from_millis(3))? {
        child.check()?;
        for (place, queue) in queues.iter().enumerate() {
            let data = turn * 10 + place as u64;
            queue.submit(Act::Write, writer.as_fd(), &map, (0, 5, 0), data)?;
            let expected = data + u64::from(context.progress.plant());
            same("what was written", queue.events(4, None)?, vec![(expected, 5)])?;
            let mut bytes = [0; 5];
            reader.read_exact(&mut bytes)?;
            same("what came", bytes, [255; 5])?;
        }
        turn += 1;
    }
    child.finish()
}
