//! The same for many things, on several threads.

use std::thread;

use crate::sys::task;

/// With fewer things for each than this, more threads are not worth their start.
const SHARE_MIN: usize = 32;

/// Does `work` for each item, on as many threads as there are processors, and returns the results
/// in the order of the items. The threads are in the namespaces of the calling one, but where it may
/// be bound to one processor they are not. A panic in one of them becomes one here.
pub(crate) fn each<T: Sync, R: Send>(items: &[T], work: impl Fn(&T) -> R + Sync) -> Vec<R> {
    if items.len() < 2 * SHARE_MIN {
        return items.iter().map(work).collect();
    }
    // Of the process: the calling thread may be bound, which the others inherit.
    let own = std::process::id().cast_signed();
    let processors = task::affinity(own).unwrap_or_default();
    let cpus: u32 = processors.iter().map(|word| word.count_ones()).sum();
    let cpus = cpus.max(1) as usize;
    let count = cpus.min(items.len() / SHARE_MIN).max(1);
    let mut shares = items.chunks(items.len().div_ceil(count).max(1));
    let own = shares.next().unwrap_or_default();
    let work = &work;
    // A new thread begins where its parent is, and would stay there for a tick of the kernel.
    let mut others = processors;
    if let Ok(here) = nix::sched::sched_getcpu() {
        others[here / 64 % 16] &= !(1 << (here % 64));
    }
    let help = |share: &[T]| -> Vec<R> {
        // Without another processor this fails.
        let _ = task::set_affinity(0, &others);
        if let Err(error) = task::set_affinity(0, &processors) {
            tracing::debug!(%error, "a thread stays where its parent is bound to");
        }
        share.iter().map(work).collect()
    };
    let help = &help;
    thread::scope(|scope| {
        let others: Vec<_> = shares.map(|share| scope.spawn(move || help(share))).collect();
        let mut results: Vec<R> = own.iter().map(work).collect();
        for other in others {
            let more: Vec<R> =
                other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            results.extend(more);
        }
        results
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_in_the_order_of_the_items() {
        for count in [0, 1, 31, 64, 1000] {
            let items: Vec<usize> = (0..count).collect();
            let doubled: Vec<usize> = items.iter().map(|item| item * 2).collect();
            assert_eq!(each(&items, |item| item * 2), doubled);
        }
    }

    #[test]
    fn what_a_bound_thread_has_done_is_done_everywhere() {
        let process = task::affinity(std::process::id().cast_signed()).unwrap();
        let mut first = [0; 16];
        let word = process.iter().position(|word| *word != 0).unwrap();
        first[word] = 1 << process[word].trailing_zeros();
        task::set_affinity(0, &first).unwrap();
        let where_each_was = each(&[(); 1000], |()| task::affinity(0).unwrap());
        assert_eq!(where_each_was[0], first);
        assert_eq!(where_each_was[999], process);
    }
}
