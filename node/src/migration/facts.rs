//! What this host is and has, as far as a move depends on it.

use std::path::Path;

use ckpt_engine::{bits32, huge, inject};
use ckpt_format::image::Host;

/// This host as a checkpoint notes it.
pub(super) fn host() -> Host {
    let kernel = nix::sys::utsname::uname();
    Host {
        kernel: kernel.map(|it| it.release().to_string_lossy().into_owned()).unwrap_or_default(),
        vdso: vdso_hash(),
        extended_state_len: extended_state_len(),
        cpu_features: cpu_features(),
    }
}

/// What `/proc/cpuinfo` says of the CPU that programs in user mode may count on.
fn cpu_features() -> Vec<String> {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = text.lines().find(|line| line.starts_with("flags"));
    let words = line.and_then(|line| line.split_once(':')).map_or("", |(_, words)| words);
    words.split_whitespace().filter(|word| is_for_programs(word)).map(str::to_owned).collect()
}

/// Instructions and state, and not what only the kernel or a log cares about.
fn is_for_programs(feature: &str) -> bool {
    const FAMILIES: &[&str] =
        &["3dnow", "amx", "avx", "bmi", "cmp", "cx", "fma", "sha", "sse", "ssse", "xsave"];
    const SINGLE: &[&str] = &[
        "abm",
        "adx",
        "aes",
        "cldemote",
        "clflushopt",
        "clwb",
        "cmov",
        "enqcmd",
        "f16c",
        "fsgsbase",
        "gfni",
        "hle",
        "lahf_lm",
        "mmx",
        "movbe",
        "movdir64b",
        "movdiri",
        "ospke",
        "pclmulqdq",
        "pku",
        "popcnt",
        "pni",
        "rdpid",
        "rdrand",
        "rdseed",
        "rdtscp",
        "rtm",
        "serialize",
        "tbm",
        "user_shstk",
        "vaes",
        "vpclmulqdq",
        "waitpkg",
        "xop",
    ];
    SINGLE.contains(&feature) || FAMILIES.iter().any(|family| feature.starts_with(family))
}

/// The hash of the code that the kernel gives to every process: it is mapped, never copied.
pub(crate) fn vdso_hash() -> [u8; 32] {
    *blake3::hash(&inject::vdso_image().unwrap_or_default()).as_bytes()
}

/// The same for programs of 32 bits; `None` where the host runs none.
pub(crate) fn vdso_32_hash() -> Option<[u8; 32]> {
    bits32::host().map(|host| *blake3::hash(&host.image).as_bytes())
}

/// Why programs of 32 bits that ran on a host with this vdso for them cannot go on here.
pub(super) fn without_32_bits(theirs: Option<[u8; 32]>) -> Option<&'static str> {
    match (theirs, vdso_32_hash()) {
        (None, _) => None,
        (_, None) => Some(
            "runs no programs of 32 bits, the VE does: boot a kernel with CONFIG_IA32_EMULATION=y \
             and without ia32_emulation=off",
        ),
        (theirs, own) => (theirs != own)
            .then_some("has another vdso for programs of 32 bits: boot the same kernel"),
    }
}

/// How many bytes this CPU and kernel save of a thread's extended state (CPUID leaf 13).
pub(crate) fn extended_state_len() -> u64 {
    u64::from(std::arch::x86_64::__cpuid_count(13, 0).ebx)
}

/// `MemAvailable` of `/proc/meminfo`, in bytes.
pub(super) fn memory_available() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let number = line.and_then(|line| line.split_whitespace().next());
    number.and_then(|number| number.parse::<u64>().ok()).unwrap_or(0) << 10
}

/// What of huge pages, in bytes by their size, there is too little of here: what there is and
/// what helps.
pub(super) fn missing_huge_pages(needed: &huge::Sizes) -> Option<String> {
    let missing = |(&page, &bytes): (&u64, &u64)| {
        let page = page.max(1);
        let (free, needed) = (huge::available(page) / page, bytes.div_ceil(page));
        (free < needed).then(|| {
            format!(
                "{free} free huge pages of {} KiB, the VE needs {needed}: raise \
                 vm.nr_hugepages there by {}",
                page >> 10,
                needed - free
            )
        })
    };
    needed.iter().find_map(missing)
}

/// What a file system has left, in bytes.
pub(super) fn disk_free(path: &Path) -> u64 {
    nix::sys::statvfs::statvfs(path)
        .map_or(0, |stat| stat.blocks_available() * stat.fragment_size())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_of_32_bits_need_the_same_vdso() {
        assert_eq!(without_32_bits(None), None);
        assert!(without_32_bits(Some([0; 32])).is_some());
        if let Some(own) = vdso_32_hash() {
            assert_eq!(without_32_bits(Some(own)), None);
        }
    }
}
