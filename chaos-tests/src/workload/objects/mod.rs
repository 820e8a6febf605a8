//! What else the kernel gives a descriptor or a number to.

mod aio;
mod counts;
mod epoll;
mod events;
mod namespaces;
mod pidfds;
mod sets;

use super::{Area, local};

pub(super) const AREA: Area = Area {
    name: "objects",
    workloads: &[
        local("epoll", "level, edge, one-shot and nested epoll", epoll::run),
        local("epoll-signals", "a signalfd in an epoll set", epoll::signals),
        local("epoll-made-up", "a file of /proc in an epoll set", epoll::made_up),
        local("epoll-numbers", "epoll entries under closed and reused numbers", sets::numbers),
        local("epoll-deep", "epoll in epoll in epoll in epoll", sets::deep),
        local("epoll-excl", "exclusive epoll entries", sets::exclusive),
        local("epoll-shared", "an epoll set of two processes", sets::shared),
        local("event-full", "an eventfd at its end", counts::full),
        local("event-tokens", "tokens that two processes pass round", counts::tokens),
        local("signal-queue", "a queue of real-time signals", counts::queued),
        local("timer-cancel", "a timer that ends when the clock is set", counts::cancel),
        local("timer-ticks", "a timer that counts while nobody looks", counts::periodic),
        local("pidfd", "pidfds of living processes", pidfds::living),
        local("pidfd-inode", "pidfds that are known again by their inodes", pidfds::remembered),
        local("pidfd-dead", "pidfds of dead processes", pidfds::zombies),
        local("pidfd-gone", "a pidfd of a process that is gone", pidfds::gone),
        local("pidfd-flying", "a pidfd in a socket's queue", pidfds::flying),
        local("namespace-fds", "namespaces that are held open", namespaces::run),
        local("aio", "blocks read in the background, eight at a time", aio::reads),
        local("aio-unread", "events of AIO that nobody has fetched yet", aio::unread),
        local(
            "aio-several",
            "AIO contexts of several sizes, and a child that saw one",
            aio::several,
        ),
        local("events", "eventfd, signalfd, timerfd with what they hold", events::run),
    ],
};
