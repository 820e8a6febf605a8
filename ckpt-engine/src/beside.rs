//! The same for many things, on several threads.

use std::{num::NonZero, thread};

/// With fewer things for each than this, more threads are not worth their start.
const SHARE_MIN: usize = 32;

/// Does `work` for each item, on as many threads as there are processors, and returns the results
/// in the order of the items. The threads are in the namespaces of the calling one. A panic in one
/// of them becomes one here.
pub(crate) fn each<T: Sync, R: Send>(items: &[T], work: impl Fn(&T) -> R + Sync) -> Vec<R> {
    if items.len() < 2 * SHARE_MIN {
        return items.iter().map(work).collect();
    }
    let cpus = thread::available_parallelism().map_or(1, NonZero::get);
    let count = cpus.min(items.len() / SHARE_MIN).max(1);
    let mut shares = items.chunks(items.len().div_ceil(count).max(1));
    let own = shares.next().unwrap_or_default();
    let work = &work;
    thread::scope(|scope| {
        let others: Vec<_> =
            shares.map(|share| scope.spawn(move || share.iter().map(work).collect())).collect();
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
}
