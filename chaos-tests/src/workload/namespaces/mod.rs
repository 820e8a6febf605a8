//! Namespaces that a program has made.

mod mounts;
mod others;

use super::{Area, local};

pub(super) const AREA: Area = Area {
    name: "namespaces",
    workloads: &[
        local("own-mounts", "a process with a file system that nobody else sees", mounts::own),
        local("own-temp", "two services with a temporary directory each", mounts::temporary),
        local("own-view", "a process that sees everything read-only", mounts::view),
        local("follows-main", "a namespace that learns of the mounts of another", mounts::follows),
        local("shared-mounts", "three processes in one mount namespace", mounts::together),
        local("namespace-within", "a mount namespace below another", mounts::within),
        local("jail-in-namespace", "chroot in a mount namespace", mounts::jail),
        local("inside-namespace", "open and mapped files in a mount namespace", mounts::inside),
        local("many-namespaces", "twelve mount namespaces", mounts::many),
        local(
            "joined-mounts",
            "a process that has joined the namespace of another",
            mounts::joined,
        ),
        local("own-names", "a process with a host name of its own", others::names),
        local("own-ipc", "a process with an IPC namespace of its own", others::ipc),
        local("own-network", "a process with only a loopback interface", others::network),
        local("all-apart", "a process that has four namespaces of its own", others::all),
    ],
};
