//! Starting VEs.

use std::{
    fs::File,
    io::{self, Write},
    os::fd::{AsFd, BorrowedFd},
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use ckpt_engine::{
    container::{Container, Spec},
    sys::namespace::as_user,
};
use ckpt_format::container::{Container as Plan, FRESH_LINKS};
use nix::{
    fcntl::{OFlag, OpenHow, ResolveFlag, openat2},
    sys::stat::Mode,
};
use tokio::task::spawn_blocking;
use tracing::{info, warn};

use super::{
    Running, Runtime, Settings, Ve, VeError, VeId, addresses::Question, exec::run_quietly, place,
};
use crate::{
    api::{Sink, chain},
    cgroup::Cgroups,
    network::{Announcer, Interface, InterfaceConfig, NetworkError},
};

/// How long `--wait` waits for the end of the boot.
const BOOT_MAX: Duration = Duration::from_secs(120);

/// How often we look whether the boot is complete.
const BOOT_INTERVAL: Duration = Duration::from_millis(50);

/// The name inside of a VE's first interface.
pub const INTERFACE: &str = "eth0";

impl Runtime {
    /// Starts a VE, whose lock the caller holds. Returns when its init runs.
    pub async fn start(self: &Arc<Self>, ve: &Arc<Ve>, force: bool) -> Result<(), VeError> {
        let id = ve.id;
        let settings = ve.settings();
        if ve.running().is_some() {
            return Err(VeError::Running { id });
        }
        if settings.disabled && !force {
            return Err(VeError::Disabled { id });
        }
        if ve.is_suspended() {
            return Err(VeError::Suspended { id });
        }
        self.set_desired(id, true).await?;
        let (runtime, new) = (self.clone(), ve.clone());
        let launched = spawn_blocking(move || runtime.launch(&new, &settings)).await;
        let running = match launched.map_err(VeError::from).and_then(|launched| launched) {
            Ok(running) => running,
            Err(problem) => {
                if let Err(second) = self.set_desired(id, false).await {
                    warn!(%id, "cannot take its start back: {}", chain(&second));
                }
                return Err(problem);
            }
        };
        info!(%id, init = running.init, "started");
        self.runs(ve, running);
        Ok(())
    }

    fn launch(&self, ve: &Arc<Ve>, settings: &Settings) -> Result<Running, VeError> {
        let place = ve.place();
        let id_base = place.id_base(self.config.ids.base);
        let cgroups = Undo::new(self.cgroups(ve.id, settings, id_base)?, |cgroups| {
            // The container, which is dropped before, has ended what was in them.
            let _ = cgroups.kill_all().and_then(|()| cgroups.remove());
        });
        let question = Question::ask(&self.bridge, &settings.addresses);
        let lower = self.templates.take(&place.template, ve.id.number(), &Sink::nowhere())?;
        let hostname = settings.hostname.clone().unwrap_or_else(|| format!("ve{}", ve.id));
        let mut plan = Plan::fresh(&hostname);
        let metadata = settings.ostemplate.as_ref();
        let metadata = metadata.and_then(|name| self.templates.metadata(name).ok());
        if metadata.is_some_and(|metadata| !metadata.console) {
            plan = plan.without_console();
        }
        let links = FRESH_LINKS.iter().map(|(name, to)| ((*name).into(), (*to).into()));
        let spec = Spec {
            plan,
            links: links.collect(),
            id_base,
            clock_offsets: None,
            layers: ve.paths.layers(lower),
            cgroups: cgroups.value().directories(),
        };
        let container = Container::create(&spec, Self::seed())?;
        if let Some(root) = container.trees.first() {
            write_names(root.mount.as_fd(), id_base, &hostname, settings)?;
        }
        question.answer()?;
        let interface = self.connect(ve.id, container.init, settings)?;
        let interface = Undo::new(interface, |interface| {
            let _ = interface.map(|it| it.detach());
        });
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let running = Running {
            init: container.init,
            pidfd: Arc::new(container.pidfd.try_clone().map_err(VeError::file("watch", "init"))?),
            cgroups: cgroups.value().clone(),
            interface: interface.value().clone(),
            started_s: now.as_secs(),
        };
        // Before init runs: a daemon that dies now leaves a VE that the next one finds. Should
        // it die before that, the container ends by itself.
        let record = running.record().map_err(VeError::file("read", "/proc"))?;
        place::write(&ve.paths.running(), &record)?;
        let environment = [("PATH", PATH), ("TERM", "linux"), ("container", "ferry")];
        let environment: Vec<_> =
            environment.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect();
        container.exec_init(&["/sbin/init".to_owned()], &environment)?;
        interface.keep();
        cgroups.keep();
        Ok(running)
    }

    /// Fresh cgroups with a VE's limits.
    pub(super) fn cgroups(
        &self,
        id: VeId,
        settings: &Settings,
        id_base: u32,
    ) -> Result<Cgroups, VeError> {
        let cgroups = Cgroups::create(&self.hierarchies, &self.config.cgroup.parent, id.number())?;
        let ready = cgroups.apply(&settings.limits).and_then(|()| cgroups.delegate(id_base));
        if let Err(problem) = ready {
            let _ = cgroups.remove();
            return Err(problem.into());
        }
        Ok(cgroups)
    }

    /// What a VE's interface is to be; `None` for a VE without addresses of its own hardware.
    pub(super) fn interface_config(id: VeId, settings: &Settings) -> Option<InterfaceConfig> {
        settings.mac.map(|mac| InterfaceConfig {
            host_name: format!("veth{id}.0"),
            name: INTERFACE.to_owned(),
            mac,
            addresses: settings.addresses.clone(),
            gateways: settings.gateways.clone(),
        })
    }

    fn connect(
        &self,
        id: VeId,
        init: i32,
        settings: &Settings,
    ) -> Result<Option<Interface>, NetworkError> {
        let Some(config) = Self::interface_config(id, settings) else {
            return Ok(None);
        };
        let netns = Interface::netns_of(init)?;
        let interface = Interface::attach(&netns, &self.bridge, &config)?;
        // A VE of this number may have been on another host a moment ago, where switches and
        // neighbours would look for it until it says something by itself.
        let addresses: Vec<_> = config.addresses.iter().map(|cidr| cidr.address()).collect();
        match Announcer::prepare(&netns, INTERFACE, interface.mac, &addresses) {
            Ok(announcer) => drop(announcer.send()),
            Err(error) => warn!(%id, "cannot announce its addresses: {}", chain(&error)),
        }
        Ok(Some(interface))
    }

    /// Waits until the boot of a VE is complete, as its template tells.
    pub async fn wait_booted(&self, ve: &Ve) -> Result<(), VeError> {
        let id = ve.id;
        let template = ve.settings().ostemplate;
        let metadata = template.and_then(|name| self.templates.metadata(&name).ok());
        let (ready_file, ready_command) = metadata
            .map(|metadata| (metadata.ready_file, metadata.ready_command))
            .unwrap_or_default();
        let booted = async {
            loop {
                let running = ve.running().ok_or(VeError::EndedEarly { id })?;
                let init = running.init;
                let there = ready_file.as_ref().is_none_or(|file| exists_inside(init, file));
                let ready = match &ready_command {
                    Some(script) if there => run_quietly(running, &["/bin/sh", "-c", script]).await,
                    _ => Ok(there),
                };
                // A system that is just coming up may not even have a shell to ask.
                if ready.unwrap_or(false) {
                    return Ok(());
                }
                tokio::time::sleep(BOOT_INTERVAL).await;
            }
        };
        let waited_s = BOOT_MAX.as_secs();
        let timed_out = |_| VeError::NotReady { id, waited_s };
        tokio::time::timeout(BOOT_MAX, booted).await.map_err(timed_out)?
    }
}

/// The search path of programs that we start in VEs.
pub(super) const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

pub(super) fn exists_inside(init: i32, path: &str) -> bool {
    let how = OpenHow::new()
        .flags(OFlag::O_PATH | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    File::open(format!("/proc/{init}/root")).is_ok_and(|root| openat2(&root, path, how).is_ok())
}

/// Writes the files that tell a VE who it is.
fn write_names(
    root: BorrowedFd<'_>,
    id_base: u32,
    hostname: &str,
    settings: &Settings,
) -> Result<(), VeError> {
    let short = hostname.split('.').next().unwrap_or(hostname);
    let own = settings.addresses.first().map(|it| it.address().to_string());
    let own = own.unwrap_or_else(|| "127.0.1.1".to_owned());
    let hosts = format!(
        "127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n{own} {hostname} {short}\n"
    );
    let mut files = vec![("etc/hostname", format!("{hostname}\n")), ("etc/hosts", hosts)];
    let mut resolver = String::new();
    for server in &settings.nameservers {
        resolver.push_str(&format!("nameserver {server}\n"));
    }
    if !settings.search_domains.is_empty() {
        resolver.push_str(&format!("search {}\n", settings.search_domains.join(" ")));
    }
    if !resolver.is_empty() {
        files.push(("etc/resolv.conf", resolver));
    }
    for (name, text) in files {
        as_user(id_base, || write_inside(root, name, &text))
            .map_err(VeError::file("write", name))?;
    }
    Ok(())
}

/// Writes a file of a VE. No link in the VE leads out of it.
fn write_inside(root: BorrowedFd<'_>, name: &str, text: &str) -> io::Result<()> {
    let how = OpenHow::new()
        .flags(
            OFlag::O_WRONLY
                | OFlag::O_CREAT
                | OFlag::O_TRUNC
                | OFlag::O_NONBLOCK
                | OFlag::O_CLOEXEC,
        )
        .mode(Mode::from_bits_truncate(0o644))
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    File::from(openat2(root, name, how)?).write_all(text.as_bytes())
}

/// A value with what undoes it, unless it is kept.
struct Undo<T, F: FnOnce(T)>(Option<(T, F)>);

impl<T, F: FnOnce(T)> Undo<T, F> {
    fn new(value: T, undo: F) -> Self {
        Self(Some((value, undo)))
    }

    fn value(&self) -> &T {
        &self.0.as_ref().expect("it is taken only by what consumes it").0
    }

    fn keep(mut self) {
        self.0 = None;
    }
}

impl<T, F: FnOnce(T)> Drop for Undo<T, F> {
    fn drop(&mut self) {
        if let Some((value, undo)) = self.0.take() {
            undo(value);
        }
    }
}
