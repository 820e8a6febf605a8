//! The daemon's configuration: one TOML file, every key optional, unknown keys refused.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::network::BridgeConfig;

/// The settings of `vzd`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Where VEs, their configuration and the cluster's log live.
    pub state_dir: PathBuf,
    /// Where sockets and other things that need not survive a reboot live.
    pub run_dir: PathBuf,
    /// The API socket; `run_dir/vzd.sock` when not given.
    pub socket: Option<PathBuf>,
    /// Where template caches live; `state_dir/template` when not given. Several daemons on one
    /// machine may share it.
    pub template_dir: Option<PathBuf>,
    /// Building templates.
    pub template: Template,
    /// The bridge of the VEs.
    pub network: BridgeConfig,
    /// Limits of VEs.
    pub cgroup: Cgroup,
    /// Users and groups of VEs.
    pub ids: Ids,
    /// Figures for a monitoring system.
    pub metrics: Metrics,
}

/// Settings for building templates.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Template {
    /// The network namespace (a path such as `/run/netns/NAME`) in which packages are
    /// downloaded; the daemon's own when not given.
    pub network_namespace: Option<PathBuf>,
}

/// Settings for the cgroups of VEs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Cgroup {
    /// The cgroup that holds those of all VEs, as a path below each hierarchy's mount.
    pub parent: String,
}

impl Default for Cgroup {
    fn default() -> Self {
        Self { parent: "vz".to_owned() }
    }
}

/// Settings for monitoring systems.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Metrics {
    /// Where `GET /metrics` is answered over HTTP, to whoever asks; nowhere when not given.
    pub listen: Option<SocketAddr>,
}

/// Which users and groups of the host the VEs' own stand for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Ids {
    /// The first host id given to VEs. Each VE gets its own block of 65536 from here upwards.
    pub base: u32,
}

impl Default for Ids {
    fn default() -> Self {
        Self { base: 100_000 }
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            state_dir: "/var/lib/vz".into(),
            run_dir: "/run/vz".into(),
            socket: None,
            template_dir: None,
            template: Template::default(),
            network: BridgeConfig::default(),
            cgroup: Cgroup::default(),
            ids: Ids::default(),
            metrics: Metrics::default(),
        }
    }
}

/// Why a configuration file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// It cannot be read.
    #[error("cannot read the configuration {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It does not say what we understand; the source names line and key.
    #[error("the configuration {path} is not valid")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: Box<toml::de::Error>,
    },
    /// A value is out of its range.
    #[error("the configuration {path} has a bad {key}: {reason}")]
    Value {
        /// The file.
        path: PathBuf,
        /// The key, dotted.
        key: &'static str,
        /// What is wrong with it.
        reason: &'static str,
    },
}

impl Config {
    /// Reads a configuration file.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigError::Read { path: path.into(), source })?;
        let config: Self = toml::from_str(&text)
            .map_err(|source| ConfigError::Parse { path: path.into(), source: Box::new(source) })?;
        config.check().map_err(|(key, reason)| ConfigError::Value {
            path: path.into(),
            key,
            reason,
        })?;
        Ok(config)
    }

    fn check(&self) -> Result<(), (&'static str, &'static str)> {
        for (key, path) in [("state_dir", &self.state_dir), ("run_dir", &self.run_dir)] {
            if !path.is_absolute() {
                return Err((key, "it must be an absolute path"));
            }
        }
        let parts: Vec<_> = self.cgroup.parent.split('/').collect();
        if parts.iter().any(|part| part.is_empty() || part.starts_with('.')) {
            return Err(("cgroup.parent", "it must be a relative path of plain names"));
        }
        if self.ids.base < 65_536 {
            return Err(("ids.base", "the first 65536 ids belong to the host"));
        }
        Ok(())
    }

    /// The API socket.
    pub fn socket(&self) -> PathBuf {
        self.socket.clone().unwrap_or_else(|| self.run_dir.join("vzd.sock"))
    }

    /// Where template caches live.
    pub fn template_dir(&self) -> PathBuf {
        self.template_dir.clone().unwrap_or_else(|| self.state_dir.join("template"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(text: &str) -> Result<Config, ConfigError> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vzd.toml");
        std::fs::write(&path, text).unwrap();
        Config::load(&path)
    }

    #[test]
    fn an_empty_file_gives_the_defaults() {
        assert_eq!(load("").unwrap(), Config::default());
    }

    #[test]
    fn an_unknown_key_is_refused_by_name() {
        let problem = load("state_dir = '/a'\nstate_dri = '/b'").unwrap_err();
        assert!(crate::api::chain(&problem).contains("state_dri"), "{problem:?}");
    }

    #[test]
    fn an_address_for_metrics_has_a_port() {
        let config = load("[metrics]\nlisten = '127.0.0.1:9477'").unwrap();
        assert_eq!(config.metrics.listen.unwrap().port(), 9477);
        let problem = load("[metrics]\nlisten = '127.0.0.1'").unwrap_err();
        assert!(crate::api::chain(&problem).contains("listen"), "{problem:?}");
    }

    #[test]
    fn a_cgroup_parent_must_stay_below_the_mount() {
        for parent in ["../x", "/vz", "", "a//b"] {
            let text = format!("[cgroup]\nparent = '{parent}'");
            let problem = load(&text).unwrap_err();
            assert!(matches!(problem, ConfigError::Value { key: "cgroup.parent", .. }));
        }
    }
}
