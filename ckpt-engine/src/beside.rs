//! The same for many things, on several threads.

use std::{
    sync::atomic::{AtomicUsize, Ordering},
    thread,
};

use crate::sys::task;

/// With fewer things for each than this, more threads are not worth their start.
const SHARE_MIN: usize = 32;
/// So many things are taken at once. Some take a hundred times as long as others, and a processor
/// may have other work to do.
const TAKEN: usize = 16;

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
    let count = (cpus.max(1) as usize).min(items.len() / SHARE_MIN);
    let next = AtomicUsize::new(0);
    // What one thread does, in pieces with their places.
    let share = || -> Vec<(usize, Vec<R>)> {
        let mut done = Vec::new();
        loop {
            let place = next.fetch_add(TAKEN, Ordering::Relaxed);
            let Some(rest) = items.get(place..).filter(|rest| !rest.is_empty()) else {
                return done;
            };
            done.push((place, rest.iter().take(TAKEN).map(&work).collect()));
        }
    };
    // A new thread begins where its parent is, and would stay there for a tick of the kernel.
    let mut others = processors;
    if let Ok(here) = nix::sched::sched_getcpu() {
        others[here / 64 % 16] &= !(1 << (here % 64));
    }
    let help = || {
        // Without another processor this fails.
        let _ = task::set_affinity(0, &others);
        if let Err(error) = task::set_affinity(0, &processors) {
            tracing::debug!(%error, "a thread stays where its parent is bound to");
        }
        share()
    };
    let mut done = thread::scope(|scope| {
        let others: Vec<_> = (1..count).map(|_| scope.spawn(help)).collect();
        let mut done = share();
        for other in others {
            done.extend(other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        }
        done
    });
    done.sort_unstable_by_key(|(place, _)| *place);
    done.into_iter().flat_map(|(_, results)| results).collect()
}

#[cfg(test)]
mod tests {
    use std::{
        collections::HashSet,
        sync::{Barrier, Mutex},
    };

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
        let cpus: u32 = process.iter().map(|word| word.count_ones()).sum();
        // No thread goes on before each has begun.
        let (all, begun) = (Barrier::new(cpus as usize), Mutex::new(HashSet::new()));
        let where_each_was = each(&[(); 10_000], |()| {
            if begun.lock().unwrap().insert(thread::current().id()) {
                all.wait();
            }
            task::affinity(0).unwrap()
        });
        assert_eq!(begun.into_inner().unwrap().len(), cpus as usize);
        assert!(where_each_was.contains(&first));
        assert_eq!(cpus > 1, where_each_was.contains(&process) && process != first);
    }

    #[test]
    fn what_takes_long_holds_nothing_up_but_what_was_taken_with_it() {
        let done = AtomicUsize::new(0);
        let items: Vec<usize> = (0..1000).collect();
        let results = each(&items, |item| {
            // Only somebody else can do the others.
            while *item == 0 && done.load(Ordering::Relaxed) < items.len() - TAKEN {
                thread::yield_now();
            }
            done.fetch_add(1, Ordering::Relaxed);
            *item
        });
        assert_eq!(results, items);
    }
}
