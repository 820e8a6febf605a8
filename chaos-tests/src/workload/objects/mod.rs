//! What else the kernel gives a descriptor or a number to.

mod epoll;
mod events;

use super::{Area, local};

pub(super) const AREA: Area = Area {
    name: "objects",
    workloads: &[
        local("epoll", "level, edge, one-shot and nested epoll", epoll::run),
        local("epoll-signals", "a signalfd in an epoll set", epoll::signals),
        local("events", "eventfd, signalfd, timerfd with what they hold", events::run),
    ],
};
