//! Cgroups that a program manages itself (cgroup v2, with or without controllers).

mod tasks;
mod tree;
mod views;

use super::{Area, local};

pub(super) const AREA: Area = Area {
    name: "cgroups",
    workloads: &[
        local("groups", "a tree of cgroups with owners and permissions", tree::directories),
        local("group-notes", "extended attributes of cgroups", tree::notes),
        local("group-limits", "limits of depth and number of cgroups", tree::limits),
        local("group-files", "open files and directories of cgroups", tree::open),
        local("group-pressure", "a trigger on the pressure of a cgroup", tree::pressure),
        local("group-watch", "watches on the events of a cgroup", tree::watch),
        local("members", "processes in cgroups", tasks::members),
        local("threads-apart", "threads of one process in several cgroups", tasks::threaded),
        local("own-top", "a process that sees a cgroup of its own as the top", views::own),
        local("group-kill", "a cgroup whose processes are ended together", tasks::kill),
    ],
};
