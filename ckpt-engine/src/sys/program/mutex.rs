//! A mutex shared between processes that notices when its owner has died.

use std::io;
use std::mem::MaybeUninit;

use super::map::{Backing, Map};

/// How a lock was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Taken {
    /// Its last owner had released it.
    Clean,
    /// Its last owner died with it.
    OwnerDied,
}

/// A robust mutex in memory shared with children.
#[derive(Debug)]
pub struct RobustMutex {
    map: Map,
}

impl RobustMutex {
    /// A free mutex.
    pub fn new() -> io::Result<Self> {
        let map = Map::new(1, Backing::Shared)?;
        let mut attributes = MaybeUninit::<libc::pthread_mutexattr_t>::uninit();
        let attributes = attributes.as_mut_ptr();
        // SAFETY: the pointer is to memory for the attributes.
        check(unsafe { libc::pthread_mutexattr_init(attributes) })?;
        // SAFETY: the attributes were initialised above.
        check(unsafe {
            libc::pthread_mutexattr_setpshared(attributes, libc::PTHREAD_PROCESS_SHARED)
        })?;
        // SAFETY: the attributes were initialised above.
        check(unsafe {
            libc::pthread_mutexattr_setrobust(attributes, libc::PTHREAD_MUTEX_ROBUST)
        })?;
        let mutex = Self { map };
        // SAFETY: the page is zeroed, large and aligned enough, and nobody uses the mutex yet.
        check(unsafe { libc::pthread_mutex_init(mutex.pointer(), attributes) })?;
        Ok(mutex)
    }

    /// Waits for the mutex and takes it. After `OwnerDied` it is made usable again.
    pub fn lock(&self) -> io::Result<Taken> {
        // SAFETY: the mutex was initialised in `new` and is never moved.
        let result = unsafe { libc::pthread_mutex_lock(self.pointer()) };
        if result != libc::EOWNERDEAD {
            check(result)?;
            return Ok(Taken::Clean);
        }
        // SAFETY: we hold the mutex, whose owner died.
        check(unsafe { libc::pthread_mutex_consistent(self.pointer()) })?;
        Ok(Taken::OwnerDied)
    }

    /// Releases it. Fails when this thread does not hold it.
    pub fn unlock(&self) -> io::Result<()> {
        // SAFETY: the mutex was initialised in `new`; a robust mutex checks its owner itself.
        check(unsafe { libc::pthread_mutex_unlock(self.pointer()) })
    }

    fn pointer(&self) -> *mut libc::pthread_mutex_t {
        self.map.address() as *mut libc::pthread_mutex_t
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(result)) }
}
