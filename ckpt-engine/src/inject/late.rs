//! Threads that were seized but did not stop in time.

use std::{
    cell::RefCell,
    collections::BTreeSet,
    sync::{Mutex, MutexGuard, PoisonError},
};

use crate::sys::ptrace::{self, Stop};

thread_local! {
    /// Threads that this tracer has seized but that did not stop in time. They stop later, and
    /// must be let go then.
    static LATE: RefCell<Late> = const { RefCell::new(Late(Vec::new())) };
}

/// Those of all our threads. To seize one again is refused by the kernel (EPERM), also to others.
static LATE_ANYWHERE: Mutex<BTreeSet<i32>> = Mutex::new(BTreeSet::new());

fn late_anywhere() -> MutexGuard<'static, BTreeSet<i32>> {
    LATE_ANYWHERE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What is in the list of one of our threads is in that of all. With the thread its tracees go.
struct Late(Vec<i32>);

impl Late {
    fn add(&mut self, tid: i32) {
        self.0.push(tid);
        late_anywhere().insert(tid);
    }

    fn retain(&mut self, keep: impl Fn(i32) -> bool) {
        self.0.retain(|&tid| {
            let kept = keep(tid);
            if !kept {
                late_anywhere().remove(&tid);
            }
            kept
        });
    }
}

impl Drop for Late {
    fn drop(&mut self) {
        self.retain(|_| false);
    }
}

/// Lets threads go that came to their stop after we had given up on them. A thread's end does
/// the same for all that are left.
pub fn let_go_late_stops() {
    LATE.with_borrow_mut(|late| {
        late.retain(|tid| match ptrace::try_wait(tid) {
            Ok(None) => true,
            Ok(Some(Stop::Stopped { .. })) => ptrace::detach(tid, 0).is_err(),
            Ok(Some(Stop::Ended(_))) | Err(_) => false,
        });
    });
}

/// Notes a thread that the caller has seized and given up on.
pub(super) fn add(tid: i32) {
    LATE.with_borrow_mut(|late| late.add(tid));
}

/// Whether one of our threads has done so, and still holds it.
pub(super) fn contains(tid: i32) -> bool {
    late_anywhere().contains(&tid)
}
