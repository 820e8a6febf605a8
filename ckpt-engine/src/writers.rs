//! Whether somebody may be writing to a file just now.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

use crate::eye::Eye;

/// Looks at files that this process has open.
pub struct Writers(Eye);

impl std::fmt::Debug for Writers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Writers").finish_non_exhaustive()
    }
}

impl Writers {
    /// An error where the kernel has no BPF with type information (`CONFIG_DEBUG_INFO_BTF`).
    pub fn new() -> io::Result<Self> {
        Eye::on(std::process::id().cast_signed()).map(Self)
    }

    /// Whether anybody has this file open for writing, or mapped what was open so. If not, then no
    /// write(2) is under way, and a later one changes the times of the file anew.
    pub fn any(&self, file: BorrowedFd<'_>) -> io::Result<bool> {
        self.0.writers(file.as_raw_fd()).map(|count| count > 0)
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn a_file_is_written_as_long_as_it_is_open_for_that() {
        let writers = Writers::new().unwrap();
        let file = tempfile::NamedTempFile::new().unwrap();
        let reader = std::fs::File::open(file.path()).unwrap();
        assert!(writers.any(reader.as_fd()).unwrap());
        let path = file.into_temp_path();
        assert!(!writers.any(reader.as_fd()).unwrap());
        let again = std::fs::File::options().write(true).open(&path).unwrap();
        assert!(writers.any(reader.as_fd()).unwrap());
        drop(again);
        assert!(!writers.any(reader.as_fd()).unwrap());
    }
}
