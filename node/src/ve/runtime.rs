//! All VEs of the node.

use std::{
    collections::BTreeMap,
    fs,
    os::fd::{AsFd, OwnedFd},
    path::Path,
    process::Command,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use ckpt_engine::container::reap;
use ckpt_format::network::Cidr;
use nix::sys::{signal::Signal, wait::WaitStatus};
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::watch,
    task::spawn_blocking,
};
use tracing::{error, info, warn};

use super::{
    Entry, Place, Registry, Running, Settings, VeError, VeId,
    config::ConfigFile,
    place::{self, Paths},
    running::Record,
};
use crate::{
    api::chain,
    cgroup::{Cgroups, Hierarchies},
    config::Config,
    network::{Bridge, Gate, Interface, Netlink},
    template::Templates,
};

/// The hidden argument with which the daemon's program is the seed of a container.
pub const SEED_ARGUMENT: &str = "container-seed";

/// The operation of a daemon that finishes or undoes what another left half done.
pub const RECOVER: &str = "recover";

/// The operation under way while a VE is made here that still runs on another node.
pub const ARRIVE: &str = "arrive";
/// How long users' operations wait for it.
const RECOVER_PATIENCE: Duration = Duration::from_secs(15);

/// All VEs of the node.
#[derive(Debug)]
pub struct Runtime {
    pub(super) config: Config,
    pub(super) templates: Templates,
    pub(super) hierarchies: Hierarchies,
    pub(super) bridge: Bridge,
    ves: Mutex<BTreeMap<VeId, Arc<Ve>>>,
    /// VEs that are being made or that arrive, with their blocks of host ids.
    reserved: Mutex<BTreeMap<VeId, u32>>,
    registry: OnceLock<Arc<dyn Registry>>,
}

/// One VE.
#[derive(Debug)]
pub struct Ve {
    /// Its number.
    pub id: VeId,
    pub(super) paths: Paths,
    operation: watch::Sender<Option<&'static str>>,
    state: Mutex<State>,
    /// How much of its memory is still on the node that it came from, in bytes.
    missing: watch::Sender<Option<u64>>,
    /// It runs on another node already, which still needs its memory here.
    leaving: AtomicBool,
    /// True while it runs.
    pub(super) runs: watch::Sender<bool>,
}

#[derive(Debug)]
pub(super) struct State {
    pub(super) file: ConfigFile,
    pub(super) place: Place,
    pub(super) running: Option<Running>,
    /// Set by an orderly stop: the end of init is no surprise and no wish for a restart.
    pub(super) stopping: bool,
}

/// The right to change a VE, until dropped.
#[derive(Debug)]
pub struct Operation {
    /// The VE.
    pub ve: Arc<Ve>,
}

impl Drop for Operation {
    fn drop(&mut self) {
        self.ve.operation.send_replace(None);
    }
}

/// A panic while a lock was held leaves plain data behind, which is still good.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Ve {
    pub(super) fn new(id: VeId, paths: Paths, file: ConfigFile, place: Place) -> Arc<Self> {
        let state = State { file, place, running: None, stopping: false };
        Arc::new(Self {
            id,
            paths,
            operation: watch::channel(None).0,
            state: Mutex::new(state),
            missing: watch::channel(None).0,
            leaving: AtomicBool::new(false),
            runs: watch::channel(false).0,
        })
    }

    /// Takes the VE's lock, or says who has it.
    pub fn operate(self: &Arc<Self>, operation: &'static str) -> Result<Operation, VeError> {
        let mut holder = None;
        let taken = self.operation.send_if_modified(|current| {
            holder = *current;
            current.get_or_insert(operation);
            holder.is_none()
        });
        match holder {
            Some(operation) if !taken => Err(VeError::Locked { id: self.id, operation }),
            _ => Ok(Operation { ve: self.clone() }),
        }
    }

    /// As [`Ve::operate`], for a user: what the daemon itself puts right after a restart is
    /// waited for.
    pub async fn operate_for_user(
        self: &Arc<Self>,
        operation: &'static str,
    ) -> Result<Operation, VeError> {
        let recovered = |current: &Option<_>| *current != Some(RECOVER);
        let mut current = self.operation.subscribe();
        // One that takes longer is told to the user below.
        let _ = tokio::time::timeout(RECOVER_PATIENCE, current.wait_for(recovered)).await;
        self.operate(operation)
    }

    /// The operation under way.
    pub fn operation(&self) -> Option<&'static str> {
        *self.operation.borrow()
    }

    /// Where what this node keeps of it lies.
    pub fn directory(&self) -> &Path {
        &self.paths.directory
    }

    /// The settings.
    pub fn settings(&self) -> Settings {
        Settings::read(&self.state().file)
    }

    /// The text of the configuration file.
    pub fn config_text(&self) -> String {
        self.state().file.to_string()
    }

    /// What ties it to this node.
    pub fn place(&self) -> Place {
        self.state().place.clone()
    }

    /// What runs, if it does.
    pub fn running(&self) -> Option<Running> {
        self.state().running.clone()
    }

    /// What runs; an error if nothing does.
    pub fn must_run(&self) -> Result<Running, VeError> {
        self.running().ok_or(VeError::NotRunning { id: self.id })
    }

    /// How much of its memory is still to come from the node that ran it before, in bytes.
    pub fn missing(&self) -> Option<u64> {
        *self.missing.borrow()
    }

    /// Tells how much is still to come; nothing when all of it is here.
    pub fn set_missing(&self, bytes: Option<u64>) {
        self.missing.send_replace(bytes);
    }

    /// Whether it was given away: another node runs it, or may, and what is here stands still until
    /// the log has spoken or its memory is needed no more.
    pub fn is_leaving(&self) -> bool {
        self.leaving.load(Ordering::Relaxed)
    }

    /// Tells so.
    pub fn set_leaving(&self, leaving: bool) {
        self.leaving.store(leaving, Ordering::Relaxed);
    }

    /// Refuses what cannot be done with a part of the memory.
    pub fn must_be_whole(&self) -> Result<(), VeError> {
        match self.missing() {
            Some(bytes) => {
                Err(VeError::Incomplete { id: self.id, mebibytes: bytes.div_ceil(1 << 20) })
            }
            None => Ok(()),
        }
    }

    /// Resolves when nothing is to come any more: until then the cluster still counts it as moving.
    pub(super) async fn settled(&self) {
        // The sender is in `self`, so the only error cannot happen.
        let _ = self.missing.subscribe().wait_for(Option::is_none).await;
    }

    /// Resolves when the VE does not run.
    pub async fn stopped(&self) {
        // The sender is in `self`, so the only error cannot happen.
        let _ = self.runs.subscribe().wait_for(|runs| !runs).await;
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// What the cluster keeps of it.
    pub(crate) fn own_entry(&self) -> Entry {
        let file = self.state().file.clone();
        self.entry(&file)
    }

    pub(super) fn entry(&self, file: &ConfigFile) -> Entry {
        let settings = Settings::read(file);
        Entry {
            id: self.id,
            name: settings.name,
            addresses: settings.addresses.iter().map(|it| it.address()).collect(),
            config: file.to_string(),
        }
    }
}

impl Runtime {
    /// Reads what is there and takes over the VEs that run. Call [`Runtime::boot`] after that.
    pub fn open(config: &Config) -> Result<Arc<Self>, VeError> {
        let this = Arc::new(Self {
            templates: Templates::new(config),
            hierarchies: Hierarchies::find()?,
            bridge: Bridge::ensure(&config.network)?,
            config: config.clone(),
            ves: Mutex::default(),
            reserved: Mutex::default(),
            registry: OnceLock::new(),
        });
        let directory = config.state_dir.join("ve");
        fs::create_dir_all(&directory).map_err(VeError::file("make", &directory))?;
        let entries = fs::read_dir(&directory).map_err(VeError::file("list", &directory))?;
        for entry in entries.flatten() {
            let number = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok());
            let Some(id) = number.and_then(|number| VeId::try_from(number).ok()) else {
                continue;
            };
            if let Err(problem) = this.load(id) {
                // One damaged VE must not keep the others from running.
                error!(%id, "cannot use this VE: {}", chain(&problem));
            }
        }
        this.sweep()?;
        Ok(this)
    }

    /// Removes the cgroups of VEs that were arriving when the last daemon ended.
    fn sweep(&self) -> Result<(), VeError> {
        let ours: Vec<_> = self.all().iter().filter_map(|ve| ve.running()).collect();
        let keep: Vec<&Cgroups> = ours.iter().map(|running| &running.cgroups).collect();
        Ok(Cgroups::sweep(&self.hierarchies, &self.config.cgroup.parent, &keep)?)
    }

    /// Starts the VEs that are to be started with the node.
    pub async fn boot(self: &Arc<Self>) {
        for ve in self.all() {
            let settings = ve.settings();
            let wanted = settings.on_boot
                && !settings.disabled
                && ve.running().is_none()
                && !ve.is_suspended();
            let Some(operation) = wanted.then(|| ve.operate("start").ok()).flatten() else {
                continue;
            };
            if let Err(problem) = self.start(&operation.ve, false).await {
                error!(id = %ve.id, "cannot start this VE: {}", chain(&problem));
            }
        }
    }

    fn load(self: &Arc<Self>, id: VeId) -> Result<(), VeError> {
        let paths = Paths::new(&self.config.state_dir, id);
        let Some(place) = place::read::<Place>(&paths.place())? else {
            // The daemon died while it made or removed this one.
            info!(%id, "removing the rest of a VE");
            return paths.remove();
        };
        let path = paths.config();
        let text = fs::read_to_string(&path).map_err(VeError::file("read", &path))?;
        let ve = Ve::new(id, paths, ConfigFile::parse(&text), place);
        if let Some(record) = place::read::<Record>(&ve.paths.running())? {
            self.take_over(&ve, record);
        }
        self.insert(ve);
        Ok(())
    }

    /// Finds a VE that was running when the last daemon ended.
    fn take_over(self: &Arc<Self>, ve: &Arc<Ve>, record: Record) {
        let interface = record.interface.as_ref().and_then(|(name, mac)| {
            let found = Interface::find(&self.bridge, name, *mac);
            found.inspect_err(|problem| warn!(id = %ve.id, "{}", chain(problem))).ok()
        });
        let Some(pidfd) = record.find() else {
            info!(id = %ve.id, "ended while no daemon ran");
            return clean(ve, &record.cgroups, interface.as_ref());
        };
        // Whoever puts a move right that was under way knows whether it may be open.
        if let Some(interface) = interface.as_ref().filter(|_| !ve.paths.moves()) {
            let opened = Netlink::open()
                .map_err(Into::into)
                .and_then(|mut netlink| interface.set_gate(&mut netlink, Gate::Open));
            if let Err(problem) = opened {
                warn!(id = %ve.id, "cannot open its way to the network: {}", chain(&problem));
            }
        }
        info!(id = %ve.id, init = record.init, "runs already");
        let Record { init, cgroups, started_s, .. } = record;
        self.runs(ve, Running { init, pidfd: Arc::new(pidfd), cgroups, interface, started_s });
    }

    /// Notes that a VE runs, and waits for its end in the background.
    pub(super) fn runs(self: &Arc<Self>, ve: &Arc<Ve>, running: Running) {
        let pidfd = running.pidfd.clone();
        {
            let mut state = ve.state();
            state.running = Some(running);
            state.stopping = false;
        }
        ve.runs.send_replace(true);
        ve.forget_undone_restore();
        tokio::spawn(self.clone().watch(ve.clone(), pidfd));
    }

    /// Waits for the end of a VE's init and tidies up behind it.
    async fn watch(self: Arc<Self>, ve: Arc<Ve>, pidfd: Arc<OwnedFd>) {
        if let Err(source) = process_end(pidfd.clone()).await {
            return error!(id = %ve.id, %source, "cannot watch this VE");
        }
        // An init that another daemon started is not ours to collect.
        let status = reap(pidfd.as_fd());
        let (running, stopping) = {
            let state = ve.state();
            (state.running.clone(), state.stopping)
        };
        info!(id = %ve.id, ?status, "ended");
        let again = ve.clone();
        let cleaned = spawn_blocking(move || {
            if let Some(running) = running {
                clean(&again, &running.cgroups, running.interface.as_ref());
            }
        });
        if let Err(problem) = cleaned.await {
            error!(id = %ve.id, %problem, "cannot tidy up");
        }
        ve.state().running = None;
        ve.runs.send_replace(false);
        if stopping {
            return;
        }
        // What the kernel makes of reboot(2) inside a pid namespace.
        let reboot = matches!(status, Some(WaitStatus::Signaled(_, Signal::SIGHUP, _)));
        ve.settled().await;
        let outcome = match reboot {
            true => match ve.operate("start") {
                Ok(operation) => self.start(&operation.ve, false).await,
                Err(problem) => Err(problem),
            },
            false => self.set_desired(ve.id, false).await,
        };
        if let Err(problem) = outcome {
            warn!(id = %ve.id, reboot, "after its end: {}", chain(&problem));
        }
    }

    /// All VEs by number.
    pub fn all(&self) -> Vec<Arc<Ve>> {
        lock(&self.ves).values().cloned().collect()
    }

    /// A VE by its number or name.
    pub fn find(&self, ve: &str) -> Result<Arc<Ve>, VeError> {
        let all = lock(&self.ves);
        let by_number = ve.parse::<u32>().ok().and_then(|number| VeId::try_from(number).ok());
        let found = match by_number {
            Some(id) => all.get(&id).cloned(),
            None => all.values().find(|it| it.settings().name.as_deref() == Some(ve)).cloned(),
        };
        found.ok_or_else(|| VeError::Unknown { ve: ve.to_owned() })
    }

    /// Where everything of this node lies.
    pub fn state_dir(&self) -> &Path {
        &self.config.state_dir
    }

    /// The templates of this node.
    pub fn templates(&self) -> &Templates {
        &self.templates
    }

    /// The bridge of this node's VEs.
    pub fn bridge(&self) -> &Bridge {
        &self.bridge
    }

    /// From now on the cluster is asked. Can be set once.
    pub fn set_registry(&self, registry: Arc<dyn Registry>) {
        if self.registry.set(registry).is_err() {
            warn!("the cluster was set twice; the first one counts");
        }
    }

    /// Tells the cluster what this VE is to do.
    pub(super) async fn set_desired(&self, id: VeId, running: bool) -> Result<(), VeError> {
        match self.registry() {
            Some(registry) => Ok(registry.set_desired(id, running).await?),
            None => Ok(()),
        }
    }

    pub(super) fn registry(&self) -> Option<&Arc<dyn Registry>> {
        self.registry.get()
    }

    pub(super) fn insert(&self, ve: Arc<Ve>) {
        lock(&self.ves).insert(ve.id, ve);
    }

    pub(super) fn take(&self, id: VeId) {
        lock(&self.ves).remove(&id);
    }

    /// Reserves a number and a free block of host ids.
    pub(super) fn reserve(self: &Arc<Self>, id: VeId) -> Result<Reservation, VeError> {
        let ves = lock(&self.ves);
        let mut reserved = lock(&self.reserved);
        if ves.contains_key(&id) || reserved.contains_key(&id) {
            return Err(VeError::Exists { id });
        }
        let mut used: Vec<u32> = ves.values().map(|ve| ve.place().slot).collect();
        used.extend(reserved.values());
        let slot = (0..).find(|slot| !used.contains(slot)).unwrap_or(u32::MAX);
        reserved.insert(id, slot);
        Ok(Reservation { runtime: self.clone(), id, slot })
    }

    /// Checks that no other VE of this node has the name or an address of this one.
    pub(super) fn check_unique(&self, id: VeId, file: &ConfigFile) -> Result<(), VeError> {
        let own = Settings::read(file);
        for other in self.all().into_iter().filter(|other| other.id != id) {
            let settings = other.settings();
            if let Some(name) = own.name.clone().filter(|_| own.name == settings.name) {
                return Err(VeError::NameInUse { name, by: other.id });
            }
            let theirs: Vec<_> = settings.addresses.iter().map(|it| it.address()).collect();
            let mut addresses = own.addresses.iter().map(|it| it.address());
            if let Some(address) = addresses.find(|it| theirs.contains(it)) {
                return Err(VeError::AddressInUse { address, by: other.id });
            }
        }
        Ok(())
    }

    /// The program that becomes the seed of a container.
    pub(super) fn seed() -> Command {
        let mut seed = Command::new("/proc/self/exe");
        seed.arg(SEED_ARGUMENT);
        seed
    }

    /// How much more memory VEs of this node may use, in bytes, if their cgroups have a limit.
    pub fn memory_room(&self) -> Option<u64> {
        self.hierarchies.memory_room(&self.config.cgroup.parent)
    }

    /// The networks of the host's LAN.
    pub(super) fn networks(&self) -> Vec<Cidr> {
        self.bridge.addresses()
    }
}

/// A number and a block of host ids that are kept for a VE that is not there yet.
#[derive(Debug)]
pub(super) struct Reservation {
    runtime: Arc<Runtime>,
    pub(super) id: VeId,
    pub(super) slot: u32,
}

impl Drop for Reservation {
    fn drop(&mut self) {
        lock(&self.runtime.reserved).remove(&self.id);
    }
}

/// Resolves when a process has ended.
pub(super) async fn process_end(pidfd: Arc<OwnedFd>) -> std::io::Result<()> {
    #[expect(deprecated, reason = "sound for an owned descriptor, which stays what it is")]
    let watched = AsyncFd::with_interest(pidfd, Interest::READABLE)?;
    watched.readable().await.map(drop)
}

/// Removes what is left of a VE that has run.
fn clean(ve: &Ve, cgroups: &Cgroups, interface: Option<&Interface>) {
    let warn = |problem: &dyn std::error::Error| {
        warn!(id = %ve.id, "cannot tidy up: {}", chain(problem));
    };
    if let Err(problem) = cgroups.kill_all().and_then(|()| cgroups.remove()) {
        warn(&problem);
    }
    if let Some(Err(problem)) = interface.map(Interface::detach) {
        warn(&problem);
    }
    match fs::remove_file(ve.paths.running()) {
        Err(source) if source.kind() != std::io::ErrorKind::NotFound => warn(&source),
        _ => (),
    }
}
