//! Changing the settings of VEs.

use std::sync::Arc;

use ckpt_format::network::Cidr;
use nix::libc::EADDRNOTAVAIL;
use tokio::task::spawn_blocking;

use super::{Changes, Runtime, Settings, Ve, VeError, place};
use crate::network::{Interface, InterfaceConfig, Netlink, NetworkError};

impl Runtime {
    /// Changes a VE's settings, whose lock the caller holds: what can change while it runs does
    /// so at once. With `save` the change outlives the next stop.
    pub async fn set(
        self: &Arc<Self>,
        ve: &Arc<Ve>,
        changes: &Changes,
        save: bool,
    ) -> Result<(), VeError> {
        let old = ve.state().file.clone();
        let new = Settings::change(&old, changes, &self.networks())?;
        self.check_unique(ve.id, &new)?;
        let (before, after) = (Settings::read(&old), Settings::read(&new));
        let has =
            |address: &Cidr| before.addresses.iter().any(|it| it.address() == address.address());
        let added = after.addresses.iter().copied().filter(|address| !has(address)).collect();
        self.check_unclaimed(added).await?;
        let identity = before.name != after.name || before.addresses != after.addresses;
        if (save || identity)
            && let Some(registry) = self.registry()
        {
            registry.update(ve.entry(&new)).await?;
        }
        if let Some(running) = ve.running() {
            let id = ve.id;
            spawn_blocking(move || {
                running.cgroups.apply(&after.limits)?;
                if let Some(config) = Self::interface_config(id, &after) {
                    readdress(running.init, &config, &before.addresses)?;
                }
                Ok::<_, VeError>(())
            })
            .await??;
        }
        if save {
            place::write_bytes(&ve.paths.config(), new.to_string().as_bytes())?;
        }
        ve.state().file = new;
        Ok(())
    }
}

/// Gives the interface of a running VE other addresses. Those that stay are not touched.
fn readdress(init: i32, config: &InterfaceConfig, old: &[Cidr]) -> Result<(), NetworkError> {
    let new = &config.addresses;
    if new == old {
        return Ok(());
    }
    let mut netlink = Netlink::open_in(&Interface::netns_of(init)?)?;
    let index = netlink.index(&config.name)?;
    for address in old.iter().filter(|address| !new.contains(address)) {
        match netlink.remove_address(index, *address) {
            // Somebody in the VE was faster.
            Err(problem) if problem.errno() == Some(EADDRNOTAVAIL) => (),
            other => other?,
        }
    }
    for address in new.iter().filter(|address| !old.contains(address)) {
        netlink.add_address(index, *address)?;
    }
    Ok(())
}
