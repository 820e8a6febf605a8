//! What the hosts offer, and between which of them VEs can move.

use std::path::PathBuf;

use ckpt_engine::{bits32, host};
use serde::{Deserialize, Serialize};

use crate::{
    cgroup::{Controller, Hierarchies},
    migration::facts,
};

/// What a host offers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostReport {
    /// The release of its kernel.
    pub kernel: String,
    /// A hash of the code that the kernel maps into every process.
    pub vdso: String,
    /// The bytes that its CPU saves of a thread's extended state.
    pub extended_state_bytes: u64,
    /// What is missing.
    pub missing: Vec<Missing>,
}

/// Something that a host does not offer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Missing {
    /// What.
    pub name: String,
    /// What does not work without it.
    pub purpose: String,
    /// How it was found missing.
    pub cause: String,
    /// What helps.
    pub hint: String,
    /// False where VEs run and move all the same.
    pub needed: bool,
}

impl HostReport {
    /// Tries everything on this host. Changes nothing.
    pub fn examine() -> Self {
        let mut missing = Vec::new();
        for feature in host::features() {
            if let Err(error) = feature.outcome {
                let (name, purpose, hint) = (feature.name, feature.purpose, feature.hint);
                missing.push(Missing::new(name, purpose, &error.to_string(), hint, true));
            }
        }
        missing.extend(cgroups());
        if !host::has_timer_ids() {
            missing.push(Missing::new(
                "ids of timers that a process may choose",
                "restoring POSIX timers with large ids quickly",
                "the kernel is older than 6.16",
                "use Linux 6.16 or newer",
                false,
            ));
        }
        if bits32::host().is_none() {
            missing.push(Missing::new(
                "programs of 32 bits",
                "running them in VEs, and moving those that do",
                "the kernel does not execute them, or gives them no vdso",
                "boot a kernel with CONFIG_IA32_EMULATION=y, without ia32_emulation=off and vdso32=0",
                false,
            ));
        }
        if !is_installed("mmdebstrap") {
            missing.push(Missing::new(
                "mmdebstrap",
                "building templates here",
                "it is not in PATH",
                "apt install mmdebstrap",
                false,
            ));
        }
        let kernel = nix::sys::utsname::uname();
        Self {
            kernel: kernel.map(|it| it.release().to_string_lossy().into()).unwrap_or_default(),
            vdso: blake3::Hash::from(facts::vdso_hash()).to_hex()[..16].to_owned(),
            extended_state_bytes: facts::extended_state_len(),
            missing,
        }
    }
}

impl Missing {
    fn new(name: &str, purpose: &str, cause: &str, hint: &str, needed: bool) -> Self {
        let [name, purpose, cause, hint] = [name, purpose, cause, hint].map(str::to_owned);
        Self { name, purpose, cause, hint, needed }
    }
}

fn cgroups() -> Vec<Missing> {
    let hierarchies = match Hierarchies::find() {
        Ok(hierarchies) => hierarchies,
        Err(error) => {
            let hint = "mount -t cgroup2 cgroup2 /sys/fs/cgroup";
            let cause = crate::api::chain(&error);
            return vec![Missing::new("cgroup v2", "freezing VEs", &cause, hint, true)];
        }
    };
    let lacks = |controller: &Controller| {
        let unified = hierarchies.controllers.contains(controller);
        !unified && !hierarchies.legacy.iter().any(|(kind, _)| kind == controller)
    };
    let controllers = [
        (Controller::Memory, "the cgroup controller memory", "limits of memory (--ram)"),
        (Controller::Cpu, "the cgroup controller cpu", "limits of CPU time (--cpulimit)"),
        (Controller::Pids, "the cgroup controller pids", "limits of processes (--numproc)"),
    ];
    let missing = controllers.into_iter().filter(|(controller, ..)| lacks(controller));
    missing
        .map(|(_, name, purpose)| {
            let cause = "no cgroup hierarchy has it";
            Missing::new(name, purpose, cause, "enable it when the kernel boots", false)
        })
        .collect()
}

fn is_installed(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|directory: PathBuf| directory.join(program).is_file())
}

/// Why VEs cannot move from one host to another.
pub fn obstacle(from: &HostReport, to: &HostReport) -> Option<String> {
    if from.vdso != to.vdso {
        let (one, other) = (&from.kernel, &to.kernel);
        return Some(format!("their kernels ({one}, {other}) map different code into processes"));
    }
    if from.extended_state_bytes > to.extended_state_bytes {
        return Some(format!(
            "its CPU saves {} bytes of a thread's state, the other one only {}",
            from.extended_state_bytes, to.extended_state_bytes
        ));
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_smaller_cpu_is_an_obstacle_one_way_only() {
        let here = HostReport::examine();
        let smaller = HostReport { extended_state_bytes: 100, ..here.clone() };
        assert_eq!(obstacle(&here, &here), None);
        assert!(obstacle(&here, &smaller).is_some_and(|text| text.contains("100")));
        assert_eq!(obstacle(&smaller, &here), None);
        let other = HostReport { vdso: "other".to_owned(), ..here.clone() };
        assert!(obstacle(&here, &other).is_some());
    }
}
