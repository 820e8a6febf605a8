//! Memory, CPU and process limits of VEs, and freezing and killing them as a whole.
//!
//! Freezing and killing are always done in the cgroup v2 hierarchy, with or without controllers.
//! Limits are set there when it has the controllers, else in the v1 hierarchies.
//!
//! Every start of a VE gets fresh cgroups, `PARENT/VEID.N`: a process cannot be created into a
//! v2 cgroup that was ever killed. The VE sees only `VEID.N/ve` in the v2 tree, so that what we
//! do to the cgroup above it (freezing, limits) never shows inside.

mod cpu;
mod hierarchies;
mod legacy;
mod unified;

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use nix::libc::{ENODEV, EOPNOTSUPP};
use serde::{Deserialize, Serialize};
use tracing::debug;

pub use cpu::CpuLimit;
pub use hierarchies::Hierarchies;

/// How long all tasks of a VE may take to freeze or to die.
const SETTLE_MAX: Duration = Duration::from_secs(10);

/// A resource that the kernel can limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Controller {
    /// Memory and swap.
    Memory,
    /// Shares and limits of CPU time.
    Cpu,
    /// Processes and threads.
    Pids,
}

impl Controller {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Memory, Self::Cpu, Self::Pids];

    fn name(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Cpu => "cpu",
            Self::Pids => "pids",
        }
    }
}

/// The limits of a VE; `None` is unlimited, or the kernel's default weight.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Memory in bytes.
    pub memory_bytes: Option<u64>,
    /// Swap beside the memory, in bytes.
    pub swap_bytes: Option<u64>,
    /// Processes and threads.
    pub processes: Option<u64>,
    /// The share of CPU time when others want it, too; 1000 is the usual one.
    pub cpu_units: Option<u64>,
    /// Percent of one CPU that it may use at most: 150 is one and a half.
    pub cpu_percent: Option<u64>,
}

/// What a VE uses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Processes and threads.
    pub processes: u64,
    /// Memory in bytes, page cache included.
    pub memory_bytes: u64,
}

/// Why cgroups cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// There is no cgroup v2 hierarchy on this host.
    #[error("no cgroup v2 hierarchy is mounted")]
    NoUnified,
    /// A file or directory of the hierarchy cannot be used.
    #[error("cannot {act} {path}")]
    File {
        /// What was to be done.
        act: &'static str,
        /// To what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// No hierarchy has the controller for a limit.
    #[error("this host cannot limit {what}")]
    NoController {
        /// What was to be limited.
        what: &'static str,
    },
    /// The tasks of a VE did not get into the state asked for.
    #[error("{path} is not {state} after {waited_s} s")]
    Unsettled {
        /// The cgroup.
        path: PathBuf,
        /// The state.
        state: &'static str,
        /// How long we waited.
        waited_s: u64,
    },
}

/// The cgroups of one start of a VE.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cgroups {
    /// `…/VEID.N` in the v2 hierarchy: frozen and killed here, limited here if there are
    /// controllers.
    pub unified: PathBuf,
    /// The controllers that `unified` has.
    controllers: Vec<Controller>,
    /// The directories in v1 hierarchies.
    legacy: Vec<(Controller, PathBuf)>,
}

impl Cgroups {
    /// Makes the cgroups for a new start of a VE.
    pub fn create(hierarchies: &Hierarchies, parent: &str, ve: u32) -> Result<Self, CgroupError> {
        let above = hierarchies.unified.join(parent);
        make_all(&above)?;
        let wanted = &hierarchies.controllers;
        unified::enable(&hierarchies.unified, Path::new(parent), wanted)?;
        for number in 0.. {
            let name = format!("{ve}.{number}");
            let unified = above.join(&name);
            match fs::create_dir(&unified) {
                Ok(()) => (),
                Err(source) if source.kind() == io::ErrorKind::AlreadyExists => continue,
                Err(source) => return Err(failed("make", &unified)(source)),
            }
            let mut this = Self { unified, controllers: wanted.clone(), legacy: Vec::new() };
            return match this.fill(hierarchies, parent, &name) {
                Ok(()) => Ok(this),
                Err(problem) => {
                    let _ = this.remove();
                    Err(problem)
                }
            };
        }
        unreachable!("the numbers do not end")
    }

    fn fill(
        &mut self,
        hierarchies: &Hierarchies,
        parent: &str,
        name: &str,
    ) -> Result<(), CgroupError> {
        unified::enable_here(&self.unified, &self.controllers)?;
        make_all(&self.visible())?;
        for (controller, top) in &hierarchies.legacy {
            let directory = top.join(parent).join(name);
            make_all(&directory)?;
            self.legacy.push((*controller, directory));
        }
        Ok(())
    }

    /// Ends and removes what is below the parent and not among `keep`: cgroups of VEs whose
    /// daemon died before it could write them down.
    pub fn sweep(
        hierarchies: &Hierarchies,
        parent: &str,
        keep: &[&Self],
    ) -> Result<(), CgroupError> {
        let above = hierarchies.unified.join(parent);
        let found = match children(&above) {
            Ok(found) => found,
            Err(source) if gone(&source) => return Ok(()),
            Err(source) => return Err(failed("list", &above)(source)),
        };
        for unified in found {
            let name = unified.file_name().and_then(|name| name.to_str()).unwrap_or("");
            let ours = name.split_once('.').is_some_and(|(ve, number)| {
                ve.parse::<u32>().is_ok() && number.parse::<u32>().is_ok()
            });
            if !ours || keep.iter().any(|it| it.unified == unified) {
                continue;
            }
            let legacy = hierarchies.legacy.iter();
            let legacy = legacy.map(|(kind, top)| (*kind, top.join(parent).join(name))).collect();
            let left = Self { controllers: Vec::new(), legacy, unified };
            left.kill_all()?;
            left.remove()?;
        }
        Ok(())
    }

    /// The cgroup that freezes and kills everything of the VE; the VE does not see it.
    pub fn freezer(&self) -> &Path {
        &self.unified
    }

    /// The top of the tree that the VE sees.
    pub fn visible(&self) -> PathBuf {
        self.unified.join("ve")
    }

    /// Lets the VE's root manage the tree that it sees.
    pub fn delegate(&self, id: u32) -> Result<(), CgroupError> {
        let visible = self.visible();
        let files = ["", "cgroup.procs", "cgroup.threads", "cgroup.subtree_control"];
        for path in files.map(|name| visible.join(name)) {
            std::os::unix::fs::chown(&path, Some(id), Some(id)).map_err(failed("chown", &path))?;
        }
        Ok(())
    }

    /// The directories that the VE's processes start in, the v2 one first.
    pub fn directories(&self) -> Vec<PathBuf> {
        let legacy = self.legacy.iter().map(|(_, directory)| directory.clone());
        std::iter::once(self.visible()).chain(legacy).collect()
    }

    /// The directories for a program that enters the VE: those where its pid 1 is now. A cgroup
    /// that hands controllers on has no processes of its own, so an init may have left the top.
    pub fn beside(&self, init: i32) -> Vec<PathBuf> {
        let mut directories = self.directories();
        let line = fs::read_to_string(format!("/proc/{init}/cgroup")).unwrap_or_default();
        let top = self.unified.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let path = line.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or_default();
        if let Some((_, below)) = path.split_once(&format!("{top}/ve/"))
            && !below.contains("..")
        {
            directories[0].push(below);
        }
        directories
    }

    /// Sets the limits. Those in force before are replaced.
    pub fn apply(&self, limits: &Limits) -> Result<(), CgroupError> {
        let wanted = [
            (Controller::Memory, "memory", limits.memory_bytes.is_some()),
            (Controller::Cpu, "CPU time", limits.cpu_percent.is_some()),
            (Controller::Pids, "processes", limits.processes.is_some()),
        ];
        for (controller, what, wanted) in wanted {
            if self.controllers.contains(&controller) {
                unified::apply(&self.unified, controller, limits)?;
            } else if let Some(directory) = self.legacy(controller) {
                legacy::apply(directory, controller, limits)?;
            } else if wanted {
                return Err(CgroupError::NoController { what });
            }
        }
        Ok(())
    }

    /// What the VE uses now.
    pub fn usage(&self) -> Usage {
        let number = |path: PathBuf| {
            fs::read_to_string(path).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0)
        };
        let of = |controller, unified: &str, legacy: &str| {
            if self.controllers.contains(&controller) {
                return number(self.unified.join(unified));
            }
            self.legacy(controller).map_or(0, |directory| number(directory.join(legacy)))
        };
        Usage {
            processes: of(Controller::Pids, "pids.current", "pids.current"),
            memory_bytes: of(Controller::Memory, "memory.current", "memory.usage_in_bytes"),
        }
    }

    fn legacy(&self, controller: Controller) -> Option<&Path> {
        let mut legacy = self.legacy.iter();
        legacy.find(|(kind, _)| *kind == controller).map(|(_, directory)| directory.as_path())
    }

    /// The host's numbers of the VE's processes.
    pub fn processes(&self) -> Result<Vec<i32>, CgroupError> {
        let mut found = Vec::new();
        collect_processes(&self.unified, &mut found)?;
        Ok(found)
    }

    /// Stops all tasks, or lets them go on. Returns when it has happened.
    pub fn freeze(&self, frozen: bool) -> Result<(), CgroupError> {
        let value = if frozen { "1" } else { "0" };
        write(&self.unified.join("cgroup.freeze"), value)?;
        let state = if frozen { "frozen" } else { "running" };
        unified::wait(&self.unified, &format!("frozen {value}"), state, SETTLE_MAX)
    }

    /// Ends all processes. Returns when none is left.
    pub fn kill_all(&self) -> Result<(), CgroupError> {
        let killed = write(&self.unified.join("cgroup.kill"), "1")
            .and_then(|()| unified::wait(&self.unified, "populated 0", "empty", SETTLE_MAX));
        match killed {
            // Whoever watches the VE was faster and has removed it: nothing can be in there.
            Err(CgroupError::File { source, .. }) if gone(&source) => Ok(()),
            other => other,
        }
    }

    /// Removes the cgroups. All processes must have ended.
    pub fn remove(&self) -> Result<(), CgroupError> {
        remove_tree(&self.unified)?;
        for (_, directory) in &self.legacy {
            remove_tree(directory)?;
        }
        debug!(cgroup = %self.unified.display(), "removed");
        Ok(())
    }
}

fn gone(source: &io::Error) -> bool {
    source.kind() == io::ErrorKind::NotFound || source.raw_os_error() == Some(ENODEV)
}

fn collect_processes(directory: &Path, found: &mut Vec<i32>) -> Result<(), CgroupError> {
    let path = directory.join("cgroup.procs");
    let text = match fs::read_to_string(&path) {
        // It holds threads, whose processes are told further up.
        Err(source) if source.raw_os_error() == Some(EOPNOTSUPP) => String::new(),
        text => text.map_err(failed("read", &path))?,
    };
    found.extend(text.lines().filter_map(|line| line.parse::<i32>().ok()));
    for child in children(directory).map_err(failed("list", directory))? {
        match collect_processes(&child, found) {
            // Removed by a VE that runs.
            Err(CgroupError::File { source, .. }) if gone(&source) => (),
            collected => collected?,
        }
    }
    Ok(())
}

fn children(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            found.push(entry.path());
        }
    }
    Ok(found)
}

fn remove_tree(directory: &Path) -> Result<(), CgroupError> {
    match children(directory) {
        Ok(children) => {
            for child in children {
                remove_tree(&child)?;
            }
        }
        Err(source) if gone(&source) => return Ok(()),
        Err(source) => return Err(failed("list", directory)(source)),
    }
    match fs::remove_dir(directory) {
        Err(source) if !gone(&source) => Err(failed("remove", directory)(source)),
        _ => Ok(()),
    }
}

fn make_all(directory: &Path) -> Result<(), CgroupError> {
    fs::create_dir_all(directory).map_err(failed("make", directory))
}

fn write(path: &Path, value: &str) -> Result<(), CgroupError> {
    fs::write(path, value).map_err(failed("write", path))
}

fn failed<'a>(act: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> CgroupError + 'a {
    move |source| CgroupError::File { act, path: path.into(), source }
}
