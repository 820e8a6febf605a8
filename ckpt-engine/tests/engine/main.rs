//! The engine at work on containers of its own. Needs root and a cgroup v2 hierarchy.

mod bench;
mod container;
mod mounts;
mod overlays;
mod rebuild;
