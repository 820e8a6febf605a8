//! Processes and threads: registers, signals, identities, relatives.

mod bits32;
mod common;
mod dead;
mod dispatch;
mod family;
mod headless;
mod identity;
mod keys;
mod mutexes;
mod own;
mod scheduling;
mod seccomp;
mod settings;
mod signals;
mod threads;

use super::{Area, local};

pub(super) const AREA: Area = Area {
    name: "processes",
    workloads: &[
        local(
            "threads",
            "thread-locals, locks and conditions, the processor a thread runs on",
            threads::run,
        ),
        local(
            "registers",
            "vector, general and control registers in the middle of a loop",
            threads::registers,
        ),
        local("mutexes", "robust mutexes whose owner dies", mutexes::run),
        local(
            "signals",
            "handlers, masks, pending and queued signals, alternate stack",
            signals::run,
        ),
        local(
            "no-stack",
            "handlers for an alternate stack where there is none",
            signals::without_stack,
        ),
        local(
            "identity",
            "user, groups, capabilities, limits, umask, working directory, names",
            identity::run,
        ),
        local("keys", "a session keyring with keys of all kinds", keys::session),
        local("keys-services", "session keyrings of several services", keys::services),
        local("keys-users", "keyrings of users, of a process and of threads", keys::users),
        local(
            "family",
            "sessions, groups, orphans, children that come and go, a zombie",
            family::run,
        ),
        local("stopped", "a child stopped by a signal", family::stopped),
        local("dead", "children that have ended in different ways", dead::run),
        local("thread-users", "threads that each are another user", own::users),
        local("headless", "a process whose first thread has ended", headless::run),
        local("thread-masks", "threads that hold back different signals", own::masks),
        local(
            "common-files",
            "a child with the descriptor table of its parent",
            common::descriptors,
        ),
        local("common-folders", "a child that goes where its parent goes", common::directories),
        local("thread-folders", "threads with working folders of their own", common::apart),
        local("jail", "a child in a root of its own", own::jail),
        local("seccomp", "a filter on system calls", seccomp::one),
        local("seccomp-several", "filters, one on top of the other", seccomp::several),
        local("seccomp-long", "a filter as long as can be, and one that logs", seccomp::long),
        local("seccomp-user", "a filter of a service without privileges", seccomp::unprivileged),
        local("seccomp-heirs", "filters of a family, each with one more", seccomp::inherited),
        local("seccomp-trap", "a filter that answers with a signal", seccomp::trap),
        local("seccomp-threads", "threads with filters of their own", seccomp::threads),
        local("seccomp-together", "filters put on all threads at once", seccomp::together),
        local("seccomp-exec", "filters of a program that another one started", seccomp::executed),
        local("dispatch", "system calls that go to the program's own handler", dispatch::run),
        local(
            "bits32",
            "a program of 32 bits: thread-locals, registers, signals, timers, a heap",
            bits32::all,
        ),
        local("bits32-waits", "waits of a program of 32 bits", bits32::waits),
        local("bits32-threads", "threads of a program of 32 bits", bits32::threads),
        local("bits32-exec", "a program of 32 bits and one of 64 in turn", bits32::executing),
        local("bits32-within", "code of 32 bits in a program of 64", bits32::within),
        local("batch", "a nice process of the batch policy", scheduling::batch),
        local("idle", "a process of the idle policy", scheduling::idle),
        local("nice", "a nice process whose children are not", scheduling::nice),
        local("disk-priority", "priority at disks", scheduling::disk),
        local("thread-priorities", "threads that are scheduled differently", scheduling::threads),
        local("one-processor", "a process bound to one processor", settings::one_processor),
        local("no-huge-pages", "a process that wants no huge pages", settings::huge_pages_disabled),
        local("merged", "a process whose memory may be merged", settings::memory_merge),
        local("no-code", "a process that may not write code", settings::deny_write_execute),
        local("machine-check", "the policy for broken memory", settings::machine_check),
        local("slack", "timers that may be late", settings::timer_slack),
        local("parent-death", "a signal at the end of the parent", settings::parent_death),
        local("private", "a process that nobody may look into", settings::not_dumpable),
        local("subreaper", "a process that adopts orphans", settings::subreaper),
        local("secure-bits", "secure bits with their locks", settings::secure_bits),
        local("bounding", "a bounding set with gaps", settings::bounding),
        local("ambient", "a user with ambient capabilities", settings::ambient),
        local("uneven", "sets of capabilities that all differ", settings::uneven),
        local("oom-score", "who is ended first when memory runs out", settings::out_of_memory),
        local("login", "who has logged in", settings::login),
        local("core-filter", "what a core file holds", settings::core_filter),
        local("personality", "an execution domain of old", settings::old_personality),
        local("barriers", "registrations for membarrier(2)", settings::barriers),
    ],
};
