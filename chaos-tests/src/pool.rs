//! Huge pages that the host sets aside for as long as they are needed.

use std::fs;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

const POOL: &str = "/proc/sys/vm/nr_hugepages";

/// The group whose members may make segments of huge pages (shmget(2)).
const GROUP: &str = "/proc/sys/vm/hugetlb_shm_group";

/// Takes from the pool what the first argument says when its standard input ends, and makes the
/// second one the group of those who may make segments.
const KEEPER: &str = "cat > /dev/null; echo $2 > /proc/sys/vm/hugetlb_shm_group; \
                      echo $(($(cat /proc/sys/vm/nr_hugepages) - $1)) > /proc/sys/vm/nr_hugepages";

/// More huge pages than the host had. Dropping it gives them back, and so does the end of this
/// process in any way: a process of its own waits for it.
#[derive(Debug)]
pub struct Pool {
    keeper: Option<Child>,
    whole: bool,
}

impl Pool {
    /// Sets so many pages aside. Where the host has no memory for them, or nobody may ask it, there
    /// are fewer than that: who needs them fails, and says so.
    pub fn with(pages: u64) -> io::Result<Self> {
        if !Path::new(POOL).exists() {
            return Ok(Self { keeper: None, whole: false });
        }
        let mut keeper = Command::new("sh");
        let group = fs::read_to_string(GROUP)?;
        keeper.args(["-c", KEEPER, "keeper", &pages.to_string(), group.trim()]).process_group(0);
        let keeper = keeper.stdin(Stdio::piped()).stdout(Stdio::null()).spawn()?;
        let mut this = Self { keeper: Some(keeper), whole: false };
        let size = || -> io::Result<u64> {
            fs::read_to_string(POOL)?.trim().parse().map_err(io::Error::other)
        };
        let wanted = size()? + pages;
        fs::write(POOL, wanted.to_string())?;
        this.whole = size()? >= wanted;
        Ok(this)
    }

    /// Lets a group, as the host numbers it, make segments of huge pages until the pool is dropped.
    pub fn allow_segments(&self, group: u32) -> io::Result<()> {
        match self.keeper {
            Some(_) => fs::write(GROUP, group.to_string()),
            None => Ok(()),
        }
    }

    /// Whether the host has given all of them.
    pub fn is_whole(&self) -> bool {
        self.whole
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        if let Some(mut keeper) = self.keeper.take() {
            drop(keeper.stdin.take());
            // It ends at once.
            let _ = keeper.wait();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_set_aside_is_given_back() {
        let now = || fs::read_to_string(POOL).unwrap().trim().parse::<u64>().unwrap();
        let before = now();
        let pool = Pool::with(1).unwrap();
        assert!(pool.is_whole());
        assert_eq!(now(), before + 1);
        let group = || fs::read_to_string(GROUP).unwrap();
        let allowed = group();
        pool.allow_segments(4711).unwrap();
        assert_eq!(group().trim(), "4711");
        drop(pool);
        assert_eq!(now(), before);
        assert_eq!(group(), allowed);
    }
}
