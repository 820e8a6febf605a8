//! Whether a checkpoint can be restored here, found out before anything is touched.

use std::collections::BTreeSet;

use ckpt_format::image::{Host, Manifest};

use super::error::CheckpointError;
use crate::{
    migration::{facts, source::Context},
    template::Digest,
    ve::Settings,
};

/// Memory that the host keeps for itself, in bytes.
const MEMORY_RESERVE: u64 = 64 << 20;

/// Looks at everything that the checkpoint needs of this host.
pub(super) fn check(context: &Context, manifest: &Manifest) -> Result<Digest, CheckpointError> {
    check_host(&manifest.host, &facts::host())?;
    let missing = || CheckpointError::TemplateMissing { digest: manifest.template.clone() };
    let digest = Digest::try_from(manifest.template.clone()).map_err(|_| missing())?;
    if !context.runtime.templates().has(&digest) {
        return Err(missing());
    }
    let summary = &manifest.summary;
    let needed = summary.memory_bytes.saturating_sub(summary.zero_bytes) + MEMORY_RESERVE;
    let room = context.runtime.memory_room().unwrap_or(u64::MAX);
    let available = facts::memory_available().min(room);
    if available < needed {
        return Err(CheckpointError::NoMemory {
            available_mib: available >> 20,
            needed_mib: needed >> 20,
        });
    }
    if let Some(why) = facts::without_32_bits(manifest.vdso_32) {
        return Err(CheckpointError::Without32Bits { why });
    }
    match facts::missing_huge_pages(&manifest.huge_bytes) {
        Some(missing) => Err(CheckpointError::NoHugePages { missing }),
        None => Ok(digest),
    }
}

fn check_host(then: &Host, here: &Host) -> Result<(), CheckpointError> {
    if then.vdso != here.vdso {
        return Err(CheckpointError::OtherKernel { kernel: then.kernel.clone() });
    }
    let own: BTreeSet<_> = here.cpu_features.iter().collect();
    let mut missing: Vec<&str> = Vec::new();
    missing.extend(then.cpu_features.iter().filter(|it| !own.contains(it)).map(String::as_str));
    if missing.is_empty() && then.extended_state_len > here.extended_state_len {
        missing.push("extended state of that size");
    }
    match missing.is_empty() {
        true => Ok(()),
        false => Err(CheckpointError::OtherCpu { missing: missing.join(", ") }),
    }
}

/// The network in the checkpoint is that of the VE's configuration.
pub(super) fn check_addresses(then: &Settings, now: &Settings) -> Result<(), CheckpointError> {
    let told = |settings: &Settings| {
        let mut all: Vec<_> = settings.addresses.iter().map(ToString::to_string).collect();
        all.sort();
        all.extend(settings.mac.map(|mac| mac.to_string()));
        if all.is_empty() { "none".to_owned() } else { all.join(" ") }
    };
    let (then, now) = (told(then), told(now));
    if then == now { Ok(()) } else { Err(CheckpointError::OtherAddresses { then, now }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host() -> Host {
        let features = ["avx2", "sse4_2"].map(str::to_owned).to_vec();
        let (kernel, vdso) = ("6.18.0".to_owned(), [1; 32]);
        Host { kernel, vdso, extended_state_len: 832, cpu_features: features }
    }

    #[test]
    fn the_same_host_fits() {
        assert!(check_host(&host(), &host()).is_ok());
        let mut better = host();
        better.cpu_features.push("avx512f".to_owned());
        better.extended_state_len = 2696;
        assert!(check_host(&host(), &better).is_ok());
    }

    #[test]
    fn what_is_missing_is_named() {
        let mut then = host();
        then.cpu_features.extend(["amx_tile", "avx512f"].map(str::to_owned));
        let told = check_host(&then, &host()).unwrap_err().to_string();
        assert!(told.ends_with("amx_tile, avx512f"), "{told}");
        let then = Host { extended_state_len: 2696, ..host() };
        assert!(matches!(check_host(&then, &host()), Err(CheckpointError::OtherCpu { .. })));
        let then = Host { vdso: [2; 32], kernel: "6.12.1".to_owned(), ..host() };
        let told = check_host(&then, &host()).unwrap_err().to_string();
        assert!(told.contains("6.12.1"), "{told}");
    }
}
