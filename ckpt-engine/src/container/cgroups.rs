//! The tree of cgroups (cgroup v2) that a VE manages itself: read while it stands still, and made
//! again around processes that wait.
//!
//! Only what the VE sees is looked at. What the host does to the VE as a whole it does further
//! up.

use std::{
    collections::HashMap,
    ffi::CString,
    fs::{self, File},
    io,
    os::{
        fd::AsFd,
        unix::{
            ffi::OsStrExt,
            fs::{MetadataExt, PermissionsExt, chown},
        },
    },
    path::{Component, Path, PathBuf},
};

use ckpt_format::{
    blocker::Blocker,
    container::{Cgroup, Setting},
};

use crate::{
    procfs::{self, Status},
    sys::{namespace::as_user, xattr},
};

/// The files that whoever manages a cgroup is given.
const DELEGATED: [&str; 5] = [
    "cgroup.procs",
    "cgroup.threads",
    "cgroup.subtree_control",
    "memory.oom.group",
    "memory.reclaim",
];

/// What can be set with or without controllers.
const CORE: [&str; 3] = ["cgroup.max.depth", "cgroup.max.descendants", "cgroup.pressure"];

/// What can be set when there are controllers, the tighter limits last.
const CONTROLLED: [&str; 21] = [
    "cpuset.cpus",
    "cpuset.mems",
    "cpu.weight",
    "cpu.idle",
    "cpu.max",
    "cpu.max.burst",
    "cpu.uclamp.min",
    "cpu.uclamp.max",
    "io.weight",
    "memory.min",
    "memory.low",
    "memory.oom.group",
    "memory.swap.high",
    "memory.swap.max",
    "memory.zswap.max",
    "memory.zswap.writeback",
    "memory.high",
    "memory.max",
    "hugetlb.2MB.max",
    "hugetlb.1GB.max",
    "pids.max",
];

/// Why a cgroup could not be read or made.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// A file or directory of the tree.
    #[error("cannot {act} {}", path.display())]
    File {
        /// What was to be done.
        act: &'static str,
        /// To what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The name leads out of the tree.
    #[error("{path:?} is no place for a cgroup")]
    Path {
        /// The name.
        path: String,
    },
}

fn at<'a>(act: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> CgroupError + 'a {
    move |source| CgroupError::File { act, path: path.to_owned(), source }
}

/// Reads all cgroups from `top` on, parents first.
pub fn capture(top: &Path, id_base: u32) -> Result<Vec<Cgroup>, CgroupError> {
    let mut found = Vec::new();
    let mut pending = vec![(top.to_owned(), String::new())];
    while let Some((directory, path)) = pending.pop() {
        let mut children = Vec::new();
        let is_gone = |error: &io::Error| error.kind() == io::ErrorKind::NotFound;
        let entries = match fs::read_dir(&directory) {
            // A VE that runs may remove it while we look.
            Err(error) if is_gone(&error) => continue,
            entries => entries.map_err(at("list", &directory))?,
        };
        for entry in entries {
            let entry = entry.map_err(at("list", &directory))?;
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                let name = entry.file_name().to_string_lossy().into_owned();
                let below = if path.is_empty() { name } else { format!("{path}/{name}") };
                children.push((entry.path(), below));
            }
        }
        children.sort();
        pending.extend(children.into_iter().rev());
        match read(&directory, path, id_base) {
            Err(CgroupError::File { source, .. }) if is_gone(&source) => (),
            read => found.push(read?),
        }
    }
    Ok(found)
}

fn read(directory: &Path, path: String, id_base: u32) -> Result<Cgroup, CgroupError> {
    let metadata = fs::metadata(directory).map_err(at("look at", directory))?;
    // What belongs to the host's own root is root's inside, too.
    let id = |host: u32| host.saturating_sub(id_base);
    let owner = (id(metadata.uid()), id(metadata.gid()));
    let opened = File::open(directory).map_err(at("open", directory))?;
    let files = DELEGATED.iter().filter_map(|name| {
        let file = fs::metadata(directory.join(name)).ok()?;
        let found = (id(file.uid()), id(file.gid()), file.mode() & 0o7777);
        // What they are when the owner of the directory makes it.
        let usual = (owner.0, owner.0, 0o644);
        (found != usual).then(|| ((*name).to_owned(), found.0, found.1, found.2))
    });
    let text = |name: &str| fs::read_to_string(directory.join(name)).unwrap_or_default();
    let is_top = path.is_empty();
    let threaded = !is_top && text("cgroup.type").trim() == "threaded";
    let members = match (is_top, threaded) {
        (true, _) => String::new(),
        (_, true) => text("cgroup.threads"),
        (_, false) => text("cgroup.procs"),
    };
    Ok(Cgroup {
        owner,
        mode: metadata.mode() & 0o7777,
        files: files.collect(),
        attributes: attributes(&opened).map_err(at("read the attributes of", directory))?,
        settings: settings(directory, is_top),
        threaded,
        frozen: !is_top && text("cgroup.freeze").trim() == "1",
        members: numbers(&members).filter_map(inner_number).collect(),
        path,
    })
}

/// What stands in the way of moving what is in these cgroups.
pub fn check(top: &Path, id_base: u32) -> Result<Vec<Blocker>, CgroupError> {
    let found = capture(top, id_base)?;
    let frozen = found.iter().filter(|cgroup| cgroup.frozen);
    let blocker = |cgroup: &Cgroup| Blocker {
        pid: cgroup.members.first().copied().unwrap_or(1),
        command: "in a cgroup".to_owned(),
        fd: None,
        object: format!("the cgroup {} is frozen by the VE itself", cgroup.path),
        hint: "let it go on: write 0 to its cgroup.freeze".to_owned(),
    };
    Ok(frozen.map(blocker).collect())
}

fn numbers(text: &str) -> impl Iterator<Item = i32> {
    text.lines().filter_map(|line| line.parse().ok())
}

/// How a process or thread of the host is numbered in the VE.
fn inner_number(host: i32) -> Option<i32> {
    Status::read(host).and_then(|status| status.in_ve("NSpid")).ok()
}

fn attributes(directory: &File) -> io::Result<Vec<(Vec<u8>, Vec<u8>)>> {
    let mut found = Vec::new();
    for name in xattr::list(directory.as_fd())? {
        let bytes = name.to_bytes();
        // The rest is made up by the host's security modules.
        let travels = bytes.starts_with(b"user.") || bytes.starts_with(b"trusted.");
        if travels && let Some(value) = xattr::get(directory.as_fd(), &name)? {
            found.push((bytes.to_vec(), value));
        }
    }
    Ok(found)
}

/// What is set; the limits on the top itself are the host's.
fn settings(directory: &Path, is_top: bool) -> Vec<Setting> {
    let read = |name: &str| {
        let value = fs::read_to_string(directory.join(name)).ok()?;
        Some(Setting { name: name.to_owned(), value: value.trim().to_owned() })
    };
    let own = if is_top { &[][..] } else { &CORE[..] };
    let mut found: Vec<Setting> = own.iter().filter_map(|name| read(name)).collect();
    let controllers = read("cgroup.controllers").unwrap_or_default().value;
    if controllers.is_empty() {
        return found;
    }
    found.extend(read("cgroup.subtree_control"));
    if !is_top {
        found.extend(CONTROLLED.iter().filter_map(|name| read(name)));
    }
    found
}

/// Makes the cgroups of a VE below `top`, with nobody in them.
pub fn prepare(top: &Path, cgroups: &[Cgroup], id_base: u32) -> Result<(), CgroupError> {
    cgroups.iter().try_for_each(|cgroup| make(&place(top, &cgroup.path)?, cgroup, id_base))
}

/// The directory of a cgroup of a VE, named as its cgroup namespaces are.
pub(crate) fn directory(top: &Path, path: &str) -> Result<PathBuf, CgroupError> {
    place(top, path)
}

/// Puts a process, as numbered on the host, into a cgroup.
pub(crate) fn enter(directory: &Path, host: i32) -> Result<(), CgroupError> {
    write(directory, "cgroup.procs", &host.to_string())
}

/// Makes the cgroups of a VE below `top`, and puts its processes where they belong. `processes`
/// are numbers inside the VE and on the host.
pub fn rebuild(
    top: &Path,
    cgroups: &[Cgroup],
    id_base: u32,
    processes: &HashMap<i32, i32>,
) -> Result<(), CgroupError> {
    prepare(top, cgroups, id_base)?;
    for cgroup in cgroups.iter().filter(|cgroup| cgroup.threaded) {
        write(&place(top, &cgroup.path)?, "cgroup.type", "threaded")?;
    }
    let threads = match cgroups.iter().any(|cgroup| cgroup.threaded) {
        true => threads(processes),
        false => HashMap::new(),
    };
    // Threads are moved within what their process is in.
    for threaded in [false, true] {
        let (file, hosts) = match threaded {
            true => ("cgroup.threads", &threads),
            false => ("cgroup.procs", processes),
        };
        for cgroup in cgroups.iter().filter(|cgroup| cgroup.threaded == threaded) {
            let directory = place(top, &cgroup.path)?;
            for host in cgroup.members.iter().filter_map(|member| hosts.get(member)) {
                write(&directory, file, &host.to_string())?;
            }
        }
    }
    // With processes at the top no controller could be given to what is below.
    for cgroup in cgroups {
        let directory = place(top, &cgroup.path)?;
        for setting in &cgroup.settings {
            set(&directory, setting)?;
        }
    }
    Ok(())
}

/// Freezes what the VE itself had frozen. To be called when nothing has to run any more.
pub fn freeze(top: &Path, cgroups: &[Cgroup]) -> Result<(), CgroupError> {
    for cgroup in cgroups.iter().filter(|cgroup| cgroup.frozen) {
        write(&place(top, &cgroup.path)?, "cgroup.freeze", "1")?;
    }
    Ok(())
}

fn place(top: &Path, path: &str) -> Result<PathBuf, CgroupError> {
    let mut parts = Path::new(path).components();
    match parts.all(|part| matches!(part, Component::Normal(_))) {
        true => Ok(top.join(path)),
        false => Err(CgroupError::Path { path: path.to_owned() }),
    }
}

fn make(directory: &Path, cgroup: &Cgroup, id_base: u32) -> Result<(), CgroupError> {
    let id = |inner: u32| id_base.saturating_add(inner);
    if !cgroup.path.is_empty() {
        // Its files belong to whoever makes it.
        let made = as_user(id(cgroup.owner.0), || fs::create_dir(directory));
        // A VE that was stopped in vain before tells its cgroups a second time.
        made.or_else(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => Ok(()),
            _ => Err(error),
        })
        .map_err(at("make", directory))?;
        let mode = fs::Permissions::from_mode(cgroup.mode);
        fs::set_permissions(directory, mode).map_err(at("protect", directory))?;
        if cgroup.owner.0 != cgroup.owner.1 {
            chown(directory, None, Some(id(cgroup.owner.1))).map_err(at("chown", directory))?;
        }
    }
    for (name, user, group, mode) in &cgroup.files {
        let path = place(directory, name)?;
        if path.exists() {
            chown(&path, Some(id(*user)), Some(id(*group))).map_err(at("chown", &path))?;
            fs::set_permissions(&path, fs::Permissions::from_mode(*mode))
                .map_err(at("protect", &path))?;
        }
    }
    if cgroup.attributes.is_empty() {
        return Ok(());
    }
    let opened = File::open(directory).map_err(at("open", directory))?;
    for (name, value) in &cgroup.attributes {
        let name = CString::new(name.as_slice()).map_err(io::Error::other);
        name.and_then(|name| xattr::set(opened.as_fd(), &name, value))
            .map_err(at("set the attributes of", directory))?;
    }
    Ok(())
}

/// All threads of processes: numbers inside the VE and on the host.
fn threads(processes: &HashMap<i32, i32>) -> HashMap<i32, i32> {
    let all = processes.values().flat_map(|&host| procfs::threads(host).unwrap_or_default());
    all.filter_map(|host| Some((inner_number(host)?, host))).collect()
}

/// Sets what is not so already.
fn set(directory: &Path, setting: &Setting) -> Result<(), CgroupError> {
    let path = place(directory, &setting.name)?;
    let now = match fs::read_to_string(&path) {
        Ok(now) => now,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let cgroup = directory.as_os_str().as_bytes();
            let cgroup = String::from_utf8_lossy(cgroup);
            tracing::warn!(%cgroup, name = setting.name, "this host cannot keep a limit of a VE");
            return Ok(());
        }
        Err(source) => return Err(at("read", &path)(source)),
    };
    if now.trim() == setting.value {
        return Ok(());
    }
    let value = match setting.name.as_str() {
        "cgroup.subtree_control" => {
            let names = setting.value.split(' ').filter(|name| !name.is_empty());
            names.map(|name| format!("+{name}")).collect::<Vec<_>>().join(" ")
        }
        _ => setting.value.clone(),
    };
    write(directory, &setting.name, &value)
}

fn write(directory: &Path, name: &str, value: &str) -> Result<(), CgroupError> {
    let path = directory.join(name);
    fs::write(&path, value).map_err(at("write", &path))
}
