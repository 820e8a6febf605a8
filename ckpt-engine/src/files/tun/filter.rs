//! The filter of a tap (`TUNATTACHFILTER`). The kernel tells that there is one, and not what it is:
//! that is read from its own records.

use std::{io, sync::OnceLock};

use crate::{
    btf::Types,
    eye::Eye,
    files::{Source, find::Object},
};

/// From what a file is for the kernel to the instructions of its filter.
#[derive(Clone, Copy, Debug)]
struct Path {
    filter: u32,
    program: u32,
    original: u32,
    count: u32,
    instructions: u32,
}

impl Path {
    fn find() -> io::Result<Self> {
        let types = Types::read()?;
        Ok(Self {
            filter: types.offset("tun_file", "sk")? + types.offset("sock", "sk_filter")?,
            program: types.offset("sk_filter", "prog")?,
            original: types.offset("bpf_prog", "orig_prog")?,
            count: types.offset("sock_fprog_kern", "len")?,
            instructions: types.offset("sock_fprog_kern", "filter")?,
        })
    }

    fn known() -> io::Result<&'static Self> {
        static PATH: OnceLock<Option<Path>> = OnceLock::new();
        PATH.get_or_init(|| Self::find().ok()).as_ref().ok_or(io::ErrorKind::Unsupported.into())
    }
}

/// Whether filters can be read here.
pub(super) fn is_readable() -> bool {
    Path::known().is_ok()
}

/// The instructions, eight bytes each; nothing where there is no filter any more.
pub(super) fn read(source: &Source<'_>, object: &Object) -> io::Result<Vec<u8>> {
    let path = Path::known()?;
    let &(place, fd) = object.holders.first().ok_or(io::ErrorKind::NotFound)?;
    let eye = Eye::on(source.processes[place].host_pid)?;
    let filter = eye.number(eye.file(fd, object.status.inode)?, path.filter)?;
    if filter == 0 {
        return Ok(Vec::new());
    }
    let original = eye.number(eye.number(filter, path.program)?, path.original)?;
    // A program of another kind than that of a filter.
    if original == 0 {
        return Err(io::ErrorKind::Unsupported.into());
    }
    let count = eye.word(original, path.count)? as u16;
    let start = eye.number(original, path.instructions)?;
    let words = (0..u32::from(count)).map(|place| eye.number(start, 8 * place));
    Ok(words.collect::<io::Result<Vec<_>>>()?.into_iter().flat_map(u64::to_ne_bytes).collect())
}
