//! Memory: what it holds, and how it is mapped.

mod advice;
mod counters;
mod hugetlb;
mod maps;
mod prefork;
mod sizes;
mod torrent;

use super::{Area, local};

pub(super) const AREA: Area = Area {
    name: "memory",
    workloads: &[
        local(
            "counters",
            "counters in memory against the same in files; pages written at random",
            counters::run,
        ),
        local(
            "maps",
            "maps of files, shared with children, guarded, moved, discarded",
            maps::kinds,
        ),
        local("advice", "each piece of advice of madvise(2)", advice::kinds),
        local("not-for-children", "memory that children do not get", advice::across_fork),
        local("locked", "memory locked at once and as it is used", advice::locked),
        local("locked-future", "all memory to come is locked", advice::locked_future),
        local("sealed", "memory that nobody can unmap or protect", advice::sealed),
        local("droppable", "memory that the kernel may drop", advice::droppable),
        local("guards", "guards between pages", advice::guards),
        local("prefork", "a family whose common memory is there once", prefork::run),
        local("sparse", "pages far apart in sixty-four gibibytes", sizes::sparse),
        local("areas", "three thousand areas that cannot be joined", sizes::areas),
        local("huge", "huge pages that stay huge", sizes::huge),
        local("hugetlb", "huge pages that are set aside", hugetlb::private),
        local("hugetlb-shared", "the same in common with a child", hugetlb::shared),
        local("hugetlb-file", "a sealed memory file of such, mapped in both ways", hugetlb::file),
        local("hugetlb-segment", "segments of such, attached in part or not", hugetlb::segments),
        local("hugetlb-family", "such pages that a child has from its parent", hugetlb::family),
        local("growing-down", "a map that grows downwards", sizes::growing_down),
        local(
            "torrent",
            "memory written as fast as it goes, forked, moved, thrown away and read into",
            torrent::torrent,
        ),
        local("flood", "threads that write as fast as they go", torrent::flood),
        local("churn", "maps made, resized and removed all the time; deep stacks", maps::churn),
    ],
};
