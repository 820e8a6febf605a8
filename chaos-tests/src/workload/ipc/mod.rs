//! What processes share by a number or a name.

pub(super) mod mailboxes;
pub(super) mod messages;
mod posix;
pub(super) mod segments;
pub(super) mod semaphores;

use super::{Area, local};

pub(super) const AREA: Area = Area {
    name: "ipc",
    workloads: &[
        local("shm-shared", "a segment that two processes write", segments::shared),
        local("shm-detached", "a segment that nobody has attached", segments::detached),
        local("shm-removed", "a removed segment that is still attached", segments::removed),
        local("shm-part", "a part of a segment, and one attached for reading", segments::part),
        local("shm-names", "keys, numbers, sizes, modes and owners of segments", segments::names),
        local("sem-values", "a set of semaphores with values", semaphores::values),
        local("sem-undo", "semaphores that the end of a process changes", semaphores::undo),
        local("sem-turns", "two processes that wake each other", semaphores::turns),
        local("msg-queue", "messages of several types in a queue", messages::queue),
        local("msg-full", "a queue that is full, with a limit of its own", messages::full),
        local("msg-wait", "a process that waits for a message", messages::wait),
        local("mq-letters", "a message queue with priorities", mailboxes::letters),
        local("mq-full", "a message queue that is full", mailboxes::full),
        local("mq-unlinked", "a message queue whose name has gone", mailboxes::unlinked),
        local("mq-wait", "a process that waits for a letter", mailboxes::wait),
        local("posix-shm", "memory under /dev/shm, named and without a name", posix::memory),
        local("posix-shared", "memory under /dev/shm that two processes write", posix::shared),
    ],
};

/// A key that no other program uses at the same time.
pub(super) fn key(number: i32) -> i32 {
    0x5e1f_0000 ^ (nix::unistd::getpid().as_raw() << 4) ^ number
}
