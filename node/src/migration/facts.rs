//! What this host is and has, as far as a move depends on it.

use std::path::Path;

use ckpt_engine::inject;

/// The hash of the code that the kernel gives to every process: it is mapped, never copied.
pub(super) fn vdso_hash() -> [u8; 32] {
    *blake3::hash(&inject::vdso_image().unwrap_or_default()).as_bytes()
}

/// How many bytes this CPU and kernel save of a thread's extended state (CPUID leaf 13).
pub(super) fn extended_state_len() -> u64 {
    u64::from(std::arch::x86_64::__cpuid_count(13, 0).ebx)
}

/// `MemAvailable` of `/proc/meminfo`, in bytes.
pub(super) fn memory_available() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let number = line.and_then(|line| line.split_whitespace().next());
    number.and_then(|number| number.parse::<u64>().ok()).unwrap_or(0) << 10
}

/// What a file system has left, in bytes.
pub(super) fn disk_free(path: &Path) -> u64 {
    nix::sys::statvfs::statvfs(path)
        .map_or(0, |stat| stat.blocks_available() * stat.fragment_size())
}
