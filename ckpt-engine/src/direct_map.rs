//! Where the kernel sees the bytes of a page.
//!
//! What waits in the kernel lies in pages, which its records name by their `struct page`. These
//! stand in one table, one after the other, and the pages themselves in one range of addresses,
//! the direct map. Where both begin is secret and different with each start of the host, but two
//! pages of our own tell: their numbers are in `/proc/self/pagemap`, the kernel's records of a pipe
//! name them, and what is in them we have written ourselves.

use std::{
    fs::File,
    io::{self, Read},
    os::{
        fd::{AsFd, AsRawFd},
        unix::fs::FileExt,
    },
};

use crate::{
    btf::Types,
    eye::Eye,
    look::Look,
    sys::{descriptor, vm::SharedMapping},
};

const PAGE: u64 = ckpt_format::memory::PAGE;
/// The direct map begins at a multiple of this (`PUD_SIZE` of pages with 4 KiB).
const ALIGNMENT: u64 = 1 << 30;
/// How far from its beginning a page is looked for: as much memory as a host may have.
const REACH: u64 = 16 << 40;
/// How many places are tried at once.
const AT_ONCE: usize = 48;

/// Leads from a `struct page` to what is in the page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DirectMap {
    /// Where the `struct page` of the page with the number 0 would be.
    table: u64,
    /// The size of one of them.
    entry: u64,
    /// Where that page itself would be.
    memory: u64,
}

impl DirectMap {
    /// Finds the table and the direct map of the running kernel.
    pub(crate) fn find(types: &Types, look: &Look) -> io::Result<Self> {
        let [first, second] = [Known::new(types)?, Known::new(types)?];
        let entry = u64::from(types.size("page")?);
        let table = first.record.wrapping_sub(first.number * entry);
        // The records of pipes are in the direct map, and so behind its beginning.
        let mut starts = (0..REACH / ALIGNMENT)
            .map(|back| (first.somewhere & !(ALIGNMENT - 1)).wrapping_sub(back * ALIGNMENT));
        loop {
            let some: Vec<u64> = starts.by_ref().take(AT_ONCE).collect();
            let places: Vec<_> =
                some.iter().map(|start| (start + first.number * PAGE, MARK)).collect();
            if places.is_empty() {
                return Err(io::ErrorKind::Unsupported.into());
            }
            let seen = look.where_possible(&places)?;
            let found = seen.iter().position(|bytes| bytes.as_deref() == Some(&first.mark));
            let Some(found) = found else { continue };
            let this = Self { table, entry, memory: some[found] };
            // By chance it would not be right for another page as well.
            let other = this.address(second.record).ok_or(io::ErrorKind::Unsupported)?;
            let is_right = look.at(&[(other, MARK)])?[0] == second.mark;
            return if is_right { Ok(this) } else { Err(io::ErrorKind::Unsupported.into()) };
        }
    }

    /// Where the bytes of a page are; nothing for what is no record of one.
    pub(crate) fn address(&self, record: u64) -> Option<u64> {
        let distance = record.checked_sub(self.table)?;
        let number = distance / self.entry;
        (distance % self.entry == 0 && number < REACH / PAGE).then(|| self.memory + number * PAGE)
    }
}

/// How many bytes are written into a page of our own.
const MARK: usize = 32;

/// A page of our own, of which everything is known but where the kernel sees it.
struct Known {
    number: u64,
    /// Its `struct page`.
    record: u64,
    /// Something else in the direct map.
    somewhere: u64,
    mark: [u8; MARK],
    _memory: SharedMapping,
}

impl Known {
    fn new(types: &Types) -> io::Result<Self> {
        let memory = SharedMapping::anonymous(PAGE as usize)?;
        let mut mark = [0; MARK];
        File::open("/dev/urandom")?.read_exact(&mut mark)?;
        memory.write(0, &mark);
        let (reader, writer) = nix::unistd::pipe()?;
        descriptor::give_page(&writer, &memory)?;
        let eye = Eye::on(std::process::id().cast_signed())?;
        let inode = descriptor::status(reader.as_fd())?.inode;
        let fd = reader.as_raw_fd();
        let pipe = eye.file(fd, inode)?;
        let somewhere = eye.number(pipe, types.offset("pipe_inode_info", "bufs")?)?;
        let record = eye.number(somewhere, types.offset("pipe_buffer", "page")?)?;
        let mut entry = [0; 8];
        let (start, _) = memory.range();
        File::open("/proc/self/pagemap")?.read_exact_at(&mut entry, start / PAGE * 8)?;
        // Documentation/admin-guide/mm/pagemap.rst: the number of the page, and whether there is one.
        let entry = u64::from_ne_bytes(entry);
        let number = entry & ((1 << 55) - 1);
        if entry >> 63 == 0 || number == 0 {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        Ok(Self { number, record, somewhere, mark, _memory: memory })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_found_by_its_record() {
        let types = Types::read().unwrap();
        let look = Look::new(types.function("bpf_iter_task").unwrap()).unwrap();
        let map = DirectMap::find(&types, &look).unwrap();
        assert_eq!(DirectMap::find(&types, &look).unwrap(), map);
        let third = Known::new(&types).unwrap();
        let address = map.address(third.record).unwrap();
        assert_eq!(look.at(&[(address, MARK)]).unwrap()[0], third.mark);
        // What is no record leads nowhere.
        assert_eq!(map.address(third.record + 8), None);
        assert_eq!(map.address(0), None);
    }
}
