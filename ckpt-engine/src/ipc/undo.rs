//! `SEM_UNDO`: what the end of a process adds to semaphores.
//!
//! The kernel tells nobody, but it keeps each adjustment within a range and refuses an operation
//! that would leave it with ERANGE. All operations of one semop(2) are done or none. So the
//! process itself asks for operations of which the last one cannot be done now: EAGAIN says that
//! those before it could, ERANGE that they could not, and nothing has changed in either case.

use ckpt_format::ipc::{SemaphoreSet, SemaphoreUndo};

use crate::inject::{Batch, Gate, InjectError, Stopped};

/// The range of values and adjustments (`SEMVMX`, `SEMAEM`).
const MAX: i32 = 32_767;
const MIN: i32 = -32_768;
/// The largest step: one that fits between 0 and [`MAX`] from any value, in one direction at
/// least.
const STEP: i32 = 16_383;

/// Operations on one semaphore, as `struct sembuf`.
#[derive(Default)]
struct Operations(Vec<u8>);

impl Operations {
    fn push(&mut self, number: u16, change: i32, flags: i32) {
        self.0.extend(number.to_ne_bytes());
        self.0.extend((change as i16).to_ne_bytes());
        self.0.extend((flags as i16).to_ne_bytes());
    }

    /// Adds to the adjustment, and leaves the value as it is.
    fn adjust(&mut self, number: u16, value: i32, mut change: i32) {
        while change != 0 {
            let step = change.clamp(-STEP, STEP);
            // An operation with undo takes from the adjustment what it adds to the value.
            let first = if step > 0 { value >= step } else { value - step <= MAX };
            match first {
                true => {
                    self.push(number, -step, libc::SEM_UNDO);
                    self.push(number, step, 0);
                }
                false => {
                    self.push(number, step, 0);
                    self.push(number, -step, libc::SEM_UNDO);
                }
            }
            change -= step;
        }
    }

    /// An operation that cannot be done now.
    fn fail(&mut self, number: u16, value: i32) {
        self.push(number, -(value + 1), libc::IPC_NOWAIT);
    }

    fn call(&self, batch: &mut Batch, set: i32) -> usize {
        let address = batch.bytes(&self.0);
        let arguments = [u64::from(set.cast_unsigned()), address, (self.0.len() / 6) as u64];
        batch.call("semop", libc::SYS_semop, &arguments)
    }
}

/// Asks whether the adjustment would leave its range if so much were added to it.
fn ask(batch: &mut Batch, set: &SemaphoreSet, number: u16, change: i32) -> usize {
    let value = i32::from(set.values[usize::from(number)]);
    let mut operations = Operations::default();
    operations.adjust(number, value, change);
    operations.fail(number, value);
    operations.call(batch, set.entry.id)
}

/// Finds the adjustments that a process has in these sets of its own namespace.
pub(crate) fn adjustments(
    thread: &Stopped,
    gate: Gate,
    sets: &[SemaphoreSet],
) -> Result<Vec<SemaphoreUndo>, InjectError> {
    if sets.is_empty() {
        return Ok(Vec::new());
    }
    let mut all = sets.iter().flat_map(|set| (0..set.values.len() as u16).map(move |n| (set, n)));
    let mut found = Vec::new();
    loop {
        let mut batch = gate.batch();
        let mut asked = Vec::new();
        while !batch.is_nearly_full()
            && let Some((set, number)) = all.next()
        {
            let low = ask(&mut batch, set, number, MIN);
            let high = ask(&mut batch, set, number, MAX);
            asked.push((set, number, low, high));
        }
        if asked.is_empty() {
            return Ok(found);
        }
        let done = batch.run(thread)?;
        let out_of_range = |index| is_out_of_range(&done.result(index));
        for (set, number, low, high) in asked {
            let range = match (out_of_range(low), out_of_range(high)) {
                (false, false) => continue,
                (true, _) => (MIN, -1),
                (false, true) => (1, MAX),
            };
            let adjustment = search(thread, gate, set, number, range)?;
            found.push(SemaphoreUndo { set: set.entry.id, number, adjustment });
        }
    }
}

fn is_out_of_range<T>(result: &std::io::Result<T>) -> bool {
    result.as_ref().is_err_and(|error| error.raw_os_error() == Some(libc::ERANGE))
}

/// Finds an adjustment between two bounds, both of which are possible.
fn search(
    thread: &Stopped,
    gate: Gate,
    set: &SemaphoreSet,
    number: u16,
    (mut low, mut high): (i32, i32),
) -> Result<i32, InjectError> {
    while low < high {
        let middle = low + (high - low) / 2;
        // Out of range exactly if the adjustment is more than this.
        let mut batch = gate.batch();
        let asked = ask(&mut batch, set, number, MAX - middle);
        match is_out_of_range(&batch.run(thread)?.result(asked)) {
            true => low = middle + 1,
            false => high = middle,
        }
    }
    Ok(low)
}

/// Gives a new process its adjustments, in sets that have their values.
pub(crate) fn restore(
    thread: &Stopped,
    gate: Gate,
    sets: &[SemaphoreSet],
    wanted: &[SemaphoreUndo],
) -> Result<(), InjectError> {
    for undo in wanted {
        let set = sets.iter().find(|set| set.entry.id == undo.set);
        let value = set.and_then(|set| set.values.get(usize::from(undo.number)));
        let mut operations = Operations::default();
        operations.adjust(undo.number, value.copied().unwrap_or(0).into(), undo.adjustment);
        let mut batch = gate.batch();
        operations.call(&mut batch, undo.set);
        batch.run(thread)?.all()?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the kernel does with these operations.
    fn run(operations: &Operations, value: &mut i32, adjustment: &mut i32) -> Result<(), i32> {
        let before = (*value, *adjustment);
        for operation in operations.0.chunks_exact(6) {
            let word = |at: usize| i16::from_ne_bytes([operation[at], operation[at + 1]]).into();
            let (change, flags): (i32, i32) = (word(2), word(4));
            *value += change;
            if flags & libc::SEM_UNDO != 0 {
                *adjustment -= change;
            }
            let error = match () {
                () if *value < 0 => libc::EAGAIN,
                () if *value > MAX || *adjustment < MIN || *adjustment > MAX => libc::ERANGE,
                () => continue,
            };
            (*value, *adjustment) = before;
            return Err(error);
        }
        Ok(())
    }

    #[test]
    fn an_adjustment_is_made_whatever_the_value() {
        for value in [0, 1, 5, 16_383, 16_384, 32_766, 32_767] {
            for wanted in [MIN, -20_000, -1, 0, 1, 3, 16_383, 16_384, 30_000, MAX] {
                let mut operations = Operations::default();
                operations.adjust(0, value, wanted);
                let (mut now, mut adjustment) = (value, 0);
                assert_eq!(run(&operations, &mut now, &mut adjustment), Ok(()));
                assert_eq!((now, adjustment), (value, wanted));
            }
        }
    }

    #[test]
    fn a_question_changes_nothing_and_tells_whether_it_fits() {
        for value in [0, 1, 16_384, 32_767] {
            for adjustment in [MIN, -7, 0, 1, 9_000, MAX] {
                for change in [MIN, -1, 1, MAX, MAX - MIN] {
                    let mut operations = Operations::default();
                    operations.adjust(0, value, change);
                    operations.fail(0, value);
                    let (mut now, mut left) = (value, adjustment);
                    let fits = (MIN..=MAX).contains(&(adjustment + change));
                    let expected = if fits { libc::EAGAIN } else { libc::ERANGE };
                    assert_eq!(run(&operations, &mut now, &mut left), Err(expected));
                    assert_eq!((now, left), (value, adjustment));
                }
            }
        }
    }
}
