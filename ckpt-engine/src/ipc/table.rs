//! The tables below `/proc/sysvipc`, which show the namespace of whoever opens them.

use std::{fs, io};

use ckpt_format::ipc::{Entry, Segment};

/// Bits of a segment's mode that are no permissions.
const REMOVED: u32 = 0o1000;
const LOCKED: u32 = 0o2000;

/// One line, by the names in the heading.
struct Row<'a>(Vec<(&'a str, &'a str)>);

impl Row<'_> {
    fn number<T: std::str::FromStr>(&self, name: &str) -> io::Result<T> {
        let text = self.text(name)?;
        text.parse().map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "not a number"))
    }

    fn text(&self, name: &str) -> io::Result<&str> {
        let found = self.0.iter().find(|(column, _)| *column == name);
        found.map(|(_, value)| *value).ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    fn mode(&self) -> io::Result<u32> {
        u32::from_str_radix(self.text("perms")?, 8)
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
    }

    fn entry(&self, id: &str, id_base: u32) -> io::Result<Entry> {
        let user = |name: &str| -> io::Result<u32> {
            let number: u32 = self.number(name)?;
            Ok(number.checked_sub(id_base).unwrap_or(65534))
        };
        Ok(Entry {
            id: self.number(id)?,
            key: self.number("key")?,
            mode: (self.mode()? & 0o777) as u16,
            uid: user("uid")?,
            gid: user("gid")?,
            creator_uid: user("cuid")?,
            creator_gid: user("cgid")?,
        })
    }
}

fn rows(text: &str) -> impl Iterator<Item = Row<'_>> {
    let mut lines = text.lines();
    let heading: Vec<&str> = lines.next().unwrap_or("").split_whitespace().collect();
    lines.map(move |line| Row(heading.iter().copied().zip(line.split_whitespace()).collect()))
}

fn read(name: &str) -> io::Result<String> {
    match fs::read_to_string(format!("/proc/sysvipc/{name}")) {
        // A kernel without System V objects.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        other => other,
    }
}

/// The segments, with the number of processes that have them attached.
pub(super) fn attachments(id_base: u32) -> io::Result<Vec<(Segment, u64)>> {
    let read_row = |row: Row<'_>| {
        let mode = row.mode()?;
        let segment = Segment {
            namespace: 0,
            entry: row.entry("shmid", id_base)?,
            size: row.number("size")?,
            removed: mode & REMOVED != 0,
            locked: mode & LOCKED != 0,
            huge: 0,
        };
        Ok((segment, row.number("nattch")?))
    };
    rows(&read("shm")?).map(read_row).collect()
}

/// The segments.
pub(super) fn segments(id_base: u32) -> io::Result<Vec<Segment>> {
    Ok(attachments(id_base)?.into_iter().map(|(segment, _)| segment).collect())
}

/// The sets of semaphores, with their sizes.
pub(super) fn semaphores(id_base: u32) -> io::Result<Vec<(Entry, usize)>> {
    let text = read("sem")?;
    rows(&text).map(|row| Ok((row.entry("semid", id_base)?, row.number("nsems")?))).collect()
}

/// The queues, with the bytes that are in each: no message in it is longer.
pub(super) fn queues(id_base: u32) -> io::Result<Vec<(Entry, usize)>> {
    let text = read("msg")?;
    rows(&text).map(|row| Ok((row.entry("msqid", id_base)?, row.number("cbytes")?))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_read_by_its_heading() {
        let text = "       key      shmid perms                  size  cpid  lpid nattch   uid   \
                    gid  cuid  cgid      atime      dtime      ctime        rss       swap\n\
                    -559038737          3  1600                  4097  6110  6111      2 100033 \
                    100034 100000 100001 1 0 1 4096 0\n";
        let row = rows(text).next().unwrap();
        let entry = row.entry("shmid", 100_000).unwrap();
        assert_eq!((entry.id, entry.key, entry.mode), (3, -559_038_737, 0o600));
        assert_eq!((entry.uid, entry.gid, entry.creator_uid, entry.creator_gid), (33, 34, 0, 1));
        assert_eq!(row.mode().unwrap() & REMOVED, REMOVED);
        assert_eq!(row.number::<u64>("size").unwrap(), 4097);
    }
}
