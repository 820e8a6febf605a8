//! Open files: where they stand, what they append, who shares them, also when their name is gone.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::time::Duration;

use crate::workload::context::Context;
use crate::workload::outcome::{Failure, ensure, same};
use crate::workload::process::Child;
use crate::workload::stream::Stream;

pub(super) fn run(context: &mut Context) -> Result<(), Failure> {
    let mut streamed = Streamed::start(context)?;
    let mut deleted = Deleted::start(context)?;
    let mut appended = Appended::start(context)?;
    let shared = SharedOffset::start(context)?;
    let mut listed = Listed::start(context)?;
    let handle =
        File::options().read(true).custom_flags(libc::O_PATH).open(context.path("list"))?;
    while context.step(Duration::from_millis(5))? {
        streamed.check()?;
        deleted.check()?;
        appended.check(context)?;
        shared.check()?;
        listed.check()?;
        ensure(handle.metadata()?.is_dir(), || "an O_PATH descriptor lost its folder".to_owned())?;
        if context.progress.plant() {
            streamed.reader.seek(SeekFrom::Current(1))?;
        }
    }
    shared.finish()
}

/// A file written at one offset and read at another.
struct Streamed {
    writer: File,
    reader: File,
    out: Stream,
    back: Stream,
}

impl Streamed {
    fn start(context: &Context) -> Result<Self, Failure> {
        let path = context.path("streamed");
        let writer = File::create_new(&path)?;
        let reader = File::open(&path)?;
        let mut streamed = Self { writer, reader, out: Stream::new(1), back: Stream::new(1) };
        streamed.write(10_000)?;
        Ok(streamed)
    }

    fn write(&mut self, count: usize) -> Result<(), Failure> {
        self.writer.write_all(&self.out.next(count))?;
        self.out.advance(count);
        Ok(())
    }

    fn check(&mut self) -> Result<(), Failure> {
        same("offset of a writer", self.writer.stream_position()?, self.out.place())?;
        same("offset of a reader", self.reader.stream_position()?, self.back.place())?;
        self.write(777)?;
        let mut bytes = [0; 777];
        self.reader.read_exact(&mut bytes)?;
        self.back.check(&bytes)?;
        if self.out.place() > 5 << 20 {
            self.writer.set_len(0)?;
            self.writer.rewind()?;
            self.reader.rewind()?;
            (self.out, self.back) = (Stream::new(1), Stream::new(1));
            self.write(10_000)?;
        }
        Ok(())
    }
}

/// A file without a name, opened twice, with a hole in it.
struct Deleted {
    file: File,
    again: File,
    count: u64,
}

const HOLE: u64 = 1 << 20;

impl Deleted {
    fn start(context: &Context) -> Result<Self, Failure> {
        let path = context.path("deleted");
        let file = File::options().read(true).write(true).create_new(true).open(&path)?;
        let again = File::open(&path)?;
        fs::remove_file(&path)?;
        file.write_all_at(&0u64.to_le_bytes(), HOLE)?;
        Ok(Self { file, again, count: 0 })
    }

    fn check(&mut self) -> Result<(), Failure> {
        let mut bytes = [0; 8];
        self.again.read_exact_at(&mut bytes, HOLE)?;
        same("a counter in a deleted file", u64::from_le_bytes(bytes), self.count)?;
        self.again.read_exact_at(&mut bytes, HOLE / 2)?;
        same("a hole in a deleted file", bytes, [0; 8])?;
        self.count += 1;
        self.file.write_all_at(&self.count.to_le_bytes(), HOLE)?;
        Ok(())
    }
}

/// A log: opened for appending, moved aside now and then.
struct Appended {
    file: File,
    lines: u64,
}

impl Appended {
    fn start(context: &Context) -> Result<Self, Failure> {
        let file = File::options().append(true).create_new(true).open(context.path("log.txt"))?;
        Ok(Self { file, lines: 0 })
    }

    fn check(&mut self, context: &Context) -> Result<(), Failure> {
        writeln!(self.file, "line {}", self.lines)?;
        self.lines += 1;
        if self.lines < 500 {
            return Ok(());
        }
        let path = context.path("log.txt");
        let text = fs::read_to_string(&path)?;
        let right = text.lines().enumerate().all(|(n, line)| line == format!("line {n}"));
        ensure(right && text.lines().count() == 500, || "an appended file is wrong".to_owned())?;
        fs::rename(&path, context.path("log.txt.1"))?;
        *self = Self::start(context)?;
        Ok(())
    }
}

/// One offset shared by parent and child: both append numbers by it, none is overwritten.
struct SharedOffset {
    file: File,
    child: Child,
}

const RECORD: usize = 16;

impl SharedOffset {
    fn start(context: &Context) -> Result<Self, Failure> {
        let path = context.path("shared");
        let file = File::options().read(true).write(true).create_new(true).open(path)?;
        let child = Child::start(context, "shared", |stop| {
            while !stop.wait(Duration::from_millis(7))? {
                (&file).write_all(&[b'c'; RECORD])?;
            }
            Ok(())
        })?;
        Ok(Self { file, child })
    }

    fn check(&self) -> Result<(), Failure> {
        self.child.check()?;
        (&self.file).write_all(&[b'p'; RECORD])?;
        Ok(())
    }

    fn finish(self) -> Result<(), Failure> {
        self.child.finish()?;
        let end = (&self.file).stream_position()?;
        same("length of a file with a shared offset", self.file.metadata()?.len(), end)?;
        let mut bytes = vec![0; usize::try_from(end).unwrap_or(0)];
        self.file.read_exact_at(&mut bytes, 0)?;
        let whole = bytes.chunks(RECORD).all(|record| {
            record.len() == RECORD && record.iter().all(|byte| *byte == record[0] && *byte != 0)
        });
        ensure(whole, || "records of a shared offset overlap".to_owned())?;
        ensure(bytes.contains(&b'c') && bytes.contains(&b'p'), || "one did not write".to_owned())
    }
}

/// A folder that is read bit by bit.
struct Listed {
    entries: fs::ReadDir,
    seen: BTreeSet<String>,
    path: std::path::PathBuf,
}

const ENTRIES: usize = 300;

impl Listed {
    fn start(context: &Context) -> Result<Self, Failure> {
        let path = context.path("list");
        fs::create_dir(&path)?;
        for number in 0..ENTRIES {
            File::create(path.join(format!("entry-{number}")))?;
        }
        Ok(Self { entries: fs::read_dir(&path)?, seen: BTreeSet::new(), path })
    }

    fn check(&mut self) -> Result<(), Failure> {
        let Some(entry) = self.entries.next() else {
            same("entries of a folder", self.seen.len(), ENTRIES)?;
            self.seen.clear();
            self.entries = fs::read_dir(&self.path)?;
            return Ok(());
        };
        let name = entry?.file_name().to_string_lossy().into_owned();
        let new = self.seen.insert(name.clone());
        ensure(new, || format!("{name} was listed twice"))
    }
}
