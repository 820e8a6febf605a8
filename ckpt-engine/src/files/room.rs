//! Room for many descriptors in the table of this process.
//!
//! The table grows in steps, each of which doubles it. Where several threads have it the kernel waits
//! at each step until every processor has passed by (`synchronize_rcu`), some 10 ms. A table
//! never becomes smaller, so it is made large when there is time.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, AsRawFd},
};

use crate::sys::descriptor;

/// Makes room for so many descriptors beside those that there are.
pub fn make_room(count: usize) -> io::Result<()> {
    let lowest = File::open("/dev/null")?;
    let count = i32::try_from(count).map_err(io::Error::other)?;
    let last = lowest.as_raw_fd().saturating_add(count);
    descriptor::duplicate(lowest.as_fd(), last).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::procfs::Status;

    #[test]
    fn afterwards_the_table_has_room() {
        let own = std::process::id().cast_signed();
        let size = || Status::read(own).unwrap().number("FDSize", 10).unwrap();
        let before = size();
        make_room(500).unwrap();
        assert!(before < 500 && size() >= 500, "{before} {}", size());
        let shown = std::fs::read_dir("/proc/self/fd").unwrap().count();
        assert!(shown < 500, "they are not kept open");
        assert!(make_room(usize::MAX).is_err());
        // More than the limit of this process.
        assert!(make_room(i32::MAX as usize).is_err());
    }
}
