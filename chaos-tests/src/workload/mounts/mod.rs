//! Mounts that a program has made.
//!
//! Nothing is mounted or unmounted while a workload runs, only before and after: a program that
//! changes its mounts all the time would be of another kind.

mod attributes;
mod binds;
mod formats;
mod groups;
mod layers;
mod memory;
mod overlays;
mod special;
pub(super) mod table;

use super::{Area, local};

pub(super) const AREA: Area = Area {
    name: "mounts",
    workloads: &[
        local("bind", "a directory that is seen in two places", binds::directory),
        local("bind-file", "a file mounted on another", binds::file),
        local(
            "bind-part",
            "a directory of a file system that is mounted nowhere else",
            binds::part,
        ),
        local("bind-private", "a bind that learns of nothing", groups::private),
        local("shared", "two places that pass new mounts on to each other", groups::shared),
        local("slave", "a place that learns of the mounts of another", groups::slave),
        local("shared-slave", "a chain of places that learn of each other", groups::chain),
        local("unbindable", "a place that cannot be mounted elsewhere", groups::unbindable),
        local(
            "read-only",
            "a read-only view of a directory that is written",
            attributes::read_only,
        ),
        local("no-programs", "mounts without devices, programs and links", attributes::limited),
        local("access-times", "mounts that note accesses in different ways", attributes::times),
        local("memory-tree", "a tmpfs with files of all kinds", memory::tree),
        local("memory-size", "a tmpfs that is full, and stays as large as it was", memory::size),
        local("memory-changes", "a tmpfs whose files change all the time", memory::changes),
        local("memory-owner", "a tmpfs with an owner and permissions", memory::owner),
        local("memory-read-only", "a tmpfs that became read-only", memory::read_only),
        local("ramfs", "files in memory without a limit", memory::ramfs),
        local("over-mounted", "files under a mount, under another", layers::over),
        local("nested-mounts", "a mount in a mount in a mount", layers::nested),
        local("many-mounts", "forty file systems", layers::many),
        local("moved-mount", "a mount that was moved with those in it", layers::moved),
        local("covered-place", "a mount whose directory another one hides", layers::covered),
        local("overlay-lower", "directories merged of three, for reading", overlays::lower),
        local("overlay-many", "two dozen directories merged", overlays::many),
        local("overlay-upper", "an overlay whose changes are in memory", overlays::upper),
        local(
            "overlay-over-itself",
            "an overlay that hides what it is made of",
            overlays::over_itself,
        ),
        local("overlay-objects", "watches, locks and a socket in an overlay", overlays::objects),
        local("overlay-stacked", "an overlay of another overlay", overlays::stacked),
        local("overlay-programs", "programs of an overlay over /usr", overlays::programs),
        local("overlay-private", "an overlay that one service sees alone", overlays::private),
        local("binary-formats", "programs that run files of other kinds", formats::run),
        local("odd-names", "places with blanks, line ends and backslashes", special::names),
        local("proc-options", "a /proc that hides other processes", special::proc),
        local("terminals-apart", "a devpts of its own", special::devpts),
        local("inside-mount", "a working directory and open files in a mount", special::inside),
        local("socket-inside", "a listening socket in a mount", special::listener),
    ],
};
