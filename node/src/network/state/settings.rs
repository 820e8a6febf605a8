//! The settings below `/proc/sys/net`.
//!
//! A namespace has over a thousand, and hosts differ in what a fresh one has. Only those travel
//! that somebody has changed: that differ from a fresh namespace on the same host.

use std::{
    collections::BTreeMap,
    fs, io,
    os::unix::fs::PermissionsExt,
    path::{Component, Path, PathBuf},
};

use ckpt_engine::sys::netns::Netns;
use ckpt_format::network::Setting;

use crate::network::{NetworkError, interface::LOOPBACK, system};

const TOP: &str = "/proc/sys/net";

/// A setting is at most this long: the kernel's own buffer is a page.
const VALUE_BYTES_MAX: usize = 4096;

/// Writing these changes others, so they go first.
const FIRST: [&str; 2] = ["ipv4/ip_forward", "ipv6/conf/all/forwarding"];

/// What each setting is in a fresh namespace.
pub(super) fn fresh() -> Result<BTreeMap<String, String>, NetworkError> {
    let fresh = Netns::create().map_err(system("make a network namespace"))?;
    fresh.run(read_all).map_err(system("enter a network namespace"))
}

/// The settings that differ from those of a fresh namespace.
pub(super) fn capture(
    netns: &Netns,
    fresh: &BTreeMap<String, String>,
) -> Result<Vec<Setting>, NetworkError> {
    let found = netns.run(read_all).map_err(system("enter a network namespace"))?;
    // Setting one of the first for all sets it for each link, also where it had been set back.
    let forwards = FIRST.iter().any(|&path| found.get(path) != fresh.get(path));
    let mut settings: Vec<_> = found
        .into_iter()
        .filter(|(path, value)| {
            fresh_value(fresh, path) != Some(value) || forwards && path.ends_with("/forwarding")
        })
        .map(|(path, value)| Setting { path, value })
        .collect();
    settings.sort_by_key(|setting| !FIRST.contains(&setting.path.as_str()));
    Ok(settings)
}

/// What a setting is in a fresh namespace. One of an interface is as its default; where only
/// the host itself shows a default (`neigh`), loopback shows what that is.
fn fresh_value<'a>(fresh: &'a BTreeMap<String, String>, path: &str) -> Option<&'a String> {
    fresh.get(path).or_else(|| {
        let mut parts: Vec<_> = path.split('/').collect();
        let alike = match *parts.get(1)? {
            "conf" => "default",
            "neigh" => LOOPBACK,
            _ => return None,
        };
        *parts.get_mut(2)? = alike;
        fresh.get(&parts.join("/"))
    })
}

fn read_all() -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    let mut directories = vec![PathBuf::from(TOP)];
    while let Some(directory) = directories.pop() {
        // What vanishes meanwhile belonged to a link that is gone.
        let Ok(entries) = fs::read_dir(&directory) else { continue };
        for entry in entries.flatten() {
            let Ok(metadata) = entry.metadata() else { continue };
            if metadata.is_dir() {
                directories.push(entry.path());
            } else if metadata.permissions().mode() & 0o600 == 0o600
                // Some cannot be read until they are set, such as a secret.
                && let Ok(value) = fs::read_to_string(entry.path())
                && let Ok(path) = entry.path().strip_prefix(TOP)
            {
                found.insert(path.display().to_string(), value.trim_end().to_owned());
            }
        }
    }
    found
}

/// Sets what is not as captured.
pub(super) fn rebuild(netns: &Netns, settings: &[Setting]) -> Result<(), NetworkError> {
    if settings.is_empty() {
        return Ok(());
    }
    netns.run(|| settings.iter().try_for_each(set)).map_err(system("enter a network namespace"))?
}

fn set(setting: &Setting) -> Result<(), NetworkError> {
    let failed = |source: io::Error| NetworkError::Setting { path: setting.path.clone(), source };
    let inside = |part| matches!(part, Component::Normal(_));
    // It comes from another host: only a plain path below our directory.
    if setting.value.len() > VALUE_BYTES_MAX || !Path::new(&setting.path).components().all(inside) {
        return Err(failed(io::ErrorKind::InvalidInput.into()));
    }
    let path = Path::new(TOP).join(&setting.path);
    match fs::read_to_string(&path) {
        Ok(value) if value.trim_end() == setting.value => Ok(()),
        // A secret that is not set cannot be read.
        Ok(_) | Err(_) => fs::write(&path, &setting.value).map_err(failed),
    }
}
