//! Namespaces that a program has made.

mod clocks;
mod ipc;
mod kept;
mod mounts;
mod others;
mod pids;
mod users;

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
        local("own-segments", "segments in an IPC namespace of one's own", ipc::segments),
        local("own-detached", "a segment there that nobody has attached", ipc::detached),
        local("own-removed", "a removed segment there that is still attached", ipc::removed),
        local("own-undo", "semaphores there that the end of a process changes", ipc::undo),
        local("own-messages", "messages in an IPC namespace of one's own", ipc::messages),
        local("own-mailboxes", "message queues there, also without a name", ipc::mailboxes),
        local("own-limits", "limits there, and a mount of its message queues", ipc::limits),
        local("own-raised", "what only limits that were raised there allow", ipc::raised),
        local("kept-ipc", "an IPC namespace with objects and without a process", ipc::kept),
        local("own-clocks", "a child in a time namespace, and its parent outside", clocks::own),
        local("unborn-clocks", "a time namespace that nobody is in yet", clocks::unborn),
        local("own-network", "a process with only a loopback interface", others::network),
        local("users-service", "users of a service that knows two of them", users::service),
        local("users-root", "a user who is root in a user namespace", users::root),
        local("users-nobody", "a user namespace without users", users::nobody),
        local("users-deep", "a user namespace in another one in another one", users::deep),
        local("users-threads", "threads in a user namespace", users::threads),
        local("users-joined", "a user namespace that is joined and held open", users::joined),
        local("users-ruler", "names and networks that belong to a user namespace", users::ruler),
        local("users-sandbox", "mounts that came into a user namespace", users::sandbox),
        local("pids-own", "a family with numbers of its own, and their /proc", pids::own),
        local("pids-users", "a family with numbers of its own in a user namespace", pids::users),
        local("pids-many-users", "several users in a pid namespace of theirs", pids::many_users),
        local("pids-deep", "a pid namespace in another one", pids::deep),
        local("pids-masked", "a pid namespace with a /proc as containers have it", pids::masked),
        local("pids-waiting", "a pid namespace that nobody is in yet", pids::waiting),
        local(
            "pids-joined",
            "a process that bears children in another pid namespace",
            pids::joined,
        ),
        local(
            "pids-signals",
            "signals, pidfds and files of /proc in a pid namespace",
            pids::signals,
        ),
        local("kept-open", "namespaces without a process that are held open", kept::open),
        local("kept-mounted", "namespaces without a process that are mounted", kept::mounted),
        local("all-apart", "a process that has four namespaces of its own", others::all),
    ],
};
