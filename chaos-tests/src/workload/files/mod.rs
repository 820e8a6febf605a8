//! Files of every type, and what is open on them.

mod contents;
mod devices;
mod directories;
mod locks;
mod nameless;
mod pipes;
mod regular;
mod system;
mod terminals;
mod unnamed;
mod watches;

use super::{Area, local};

pub(super) const AREA: Area = Area {
    name: "files",
    workloads: &[
        local(
            "regular",
            "offsets, append, sharing after fork, deleted files, directories",
            regular::run,
        ),
        local("pipes", "pipes and FIFOs with data in them", pipes::run),
        local("terminals", "a pseudo terminal with a session at its other end", terminals::run),
        local("terminal-marks", "ends of input, stops and news of terminals", terminals::marks),
        local("file-holes", "a file of holes, and of a terabyte", contents::sparse),
        local("far", "an offset behind 4 GiB", contents::far),
        local("renamed", "a file that is renamed while it is open", contents::renamed),
        local("file-sealed", "sealed memory files", contents::sealed),
        local("memory-file", "memory files, mapped and not", contents::memory),
        local("flags", "flags of descriptions and of descriptors", system::flags),
        local("proc-files", "files and folders of /proc", system::proc),
        local("proc-gone", "files of /proc of processes that are gone", system::proc_gone),
        local("sys-files", "files and folders of /sys", system::sys),
        local("program", "a program whose file is replaced", system::program),
        local("program-memory", "a program in a memory file", system::program_in_memory),
        local("library", "libraries whose files are replaced", unnamed::library),
        local("deleted", "a deleted file, open several times", unnamed::shared),
        local("deleted-large", "a deleted file of 70 MiB", unnamed::large),
        local("deleted-map", "a deleted file that is mapped", unnamed::mapped),
        local("temporary", "a file that never had a name, and gets one", unnamed::temporary),
        local("hard-link", "a file whose first name has gone", unnamed::hard_link),
        local("readdir-disk", "a folder that is read bit by bit", directories::on_disk),
        local("readdir-memory", "the same in memory", directories::in_memory),
        local("path-only", "descriptors that only name something", directories::by_path),
        local("path-gone", "such descriptors of what has no name any more", nameless::by_path),
        local("fifo-gone", "a FIFO that lost its name to another one", nameless::fifos),
        local("folder-gone", "a folder that is removed while it is open", directories::gone),
        local("working-gone", "a working folder that is removed", directories::working),
        local("lock-process", "locks of a process on parts of a file", locks::of_processes),
        local("lock-file", "locks on whole files, shared with a child", locks::of_files),
        local("lock-made", "locks on pipes, sockets and devices", locks::without_path),
        local("lock-open", "locks of a description on parts of a file", locks::of_descriptions),
        local("lease", "a lease that is broken from time to time", locks::lease),
        local("async", "a signal when something can be read", locks::asynchronous),
        local("watch-disk", "inotify watches with their numbers", watches::on_disk),
        local("watch-memory", "the same in memory", watches::in_memory),
        local("watch-gone", "watches on what has lost its name", watches::gone),
        local("marks-disk", "fanotify marks on a folder and on files", watches::marks_on_disk),
        local("marks-memory", "the same in memory", watches::marks_in_memory),
        local("marks-all", "a fanotify mark on a whole file system", watches::marks_on_all),
        local("devices", "the character devices that everybody has", devices::run),
    ],
};
