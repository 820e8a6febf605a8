//! What the settings of a VE mean, and how they are changed.

use std::net::IpAddr;

use ckpt_format::network::{Cidr, Mac};
use serde::{Deserialize, Serialize};

use super::{VeError, VeId, config::ConfigFile};
use crate::cgroup::Limits;

/// OpenVZ counts memory in pages.
const PAGE: u64 = 4096;

/// The wait for an orderly stop unless the VE says otherwise, in seconds.
const STOP_TIMEOUT_S: u64 = 120;

/// Changes to a VE's settings, as given to `vzctl create` and `vzctl set`: the texts of the
/// options, not yet looked at.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[expect(missing_docs, reason = "they are the options of vzctl by name")]
pub struct Changes {
    pub name: Option<String>,
    pub hostname: Option<String>,
    pub description: Option<String>,
    pub ostemplate: Option<String>,
    pub ipadd: Vec<String>,
    pub ipdel: Vec<String>,
    pub gateway: Vec<String>,
    pub nameserver: Vec<String>,
    pub searchdomain: Vec<String>,
    pub ram: Option<String>,
    pub swap: Option<String>,
    pub numproc: Option<String>,
    pub cpuunits: Option<String>,
    pub cpulimit: Option<String>,
    pub cpus: Option<String>,
    pub onboot: Option<String>,
    pub disabled: Option<String>,
    pub stop_timeout: Option<String>,
}

/// The settings of a VE, understood.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// The name beside the number.
    pub name: Option<String>,
    /// The host name inside.
    pub hostname: Option<String>,
    /// What the VE is for.
    pub description: Option<String>,
    /// The template that it was made from.
    pub ostemplate: Option<String>,
    /// The addresses inside.
    pub addresses: Vec<Cidr>,
    /// The default gateways.
    pub gateways: Vec<IpAddr>,
    /// DNS servers.
    pub nameservers: Vec<String>,
    /// DNS search domains.
    pub search_domains: Vec<String>,
    /// The hardware address inside.
    pub mac: Option<Mac>,
    /// Limits of resources.
    pub limits: Limits,
    /// Started with the daemon.
    pub on_boot: bool,
    /// Not to be started.
    pub disabled: bool,
    /// How long an orderly stop may take, in seconds.
    pub stop_timeout_s: u64,
}

impl Settings {
    /// Understands a configuration file. What it does not understand is as if not there, because
    /// the file may come from another system.
    pub fn read(file: &ConfigFile) -> Self {
        let text = |key| file.get(key).filter(|text| !text.is_empty()).map(str::to_owned);
        let words = |key| -> Vec<String> {
            let text = file.get(key).unwrap_or("");
            text.split([' ', ',']).filter(|it| !it.is_empty()).map(str::to_owned).collect()
        };
        let number = |key| file.get(key).and_then(limit_of);
        let pages = |key| number(key).map(|pages: u64| pages.saturating_mul(PAGE));
        let interface = |key| interface_value(file.get("NETIF").unwrap_or(""), key);
        let cpus = number("CPUS").map(|cpus| cpus.saturating_mul(100));
        let percent = [number("CPULIMIT"), cpus].into_iter().flatten().filter(|it| *it > 0).min();
        Self {
            name: text("NAME"),
            hostname: text("HOSTNAME"),
            description: text("DESCRIPTION"),
            ostemplate: text("OSTEMPLATE"),
            addresses: words("IP_ADDRESS").iter().filter_map(|it| cidr(it, &[])).collect(),
            gateways: interface("gw")
                .map(|it| it.split('+').filter_map(|it| it.parse().ok()).collect())
                .unwrap_or_default(),
            nameservers: words("NAMESERVER"),
            search_domains: words("SEARCHDOMAIN"),
            mac: interface("mac").and_then(|it| it.parse().ok()),
            limits: Limits {
                memory_bytes: pages("PHYSPAGES"),
                swap_bytes: pages("SWAPPAGES"),
                processes: number("NUMPROC"),
                cpu_units: number("CPUUNITS"),
                cpu_percent: percent,
            },
            on_boot: file.get("ONBOOT") == Some("yes"),
            disabled: file.get("DISABLED") == Some("yes"),
            stop_timeout_s: number("STOP_TIMEOUT").unwrap_or(STOP_TIMEOUT_S),
        }
    }

    /// Applies changes to a configuration file. Nothing is changed if one of them is bad.
    ///
    /// An address without a prefix length gets that of the one of `networks` that it is in.
    pub fn change(
        file: &ConfigFile,
        changes: &Changes,
        networks: &[Cidr],
    ) -> Result<ConfigFile, VeError> {
        let mut new = file.clone();
        let old = Self::read(file);
        let texts = [
            ("--name", "NAME", &changes.name, checked_name as Check),
            ("--hostname", "HOSTNAME", &changes.hostname, checked_hostname),
            ("--description", "DESCRIPTION", &changes.description, checked_text),
            ("--ostemplate", "OSTEMPLATE", &changes.ostemplate, checked_text),
            ("--ram", "PHYSPAGES", &changes.ram, checked_pages),
            ("--swap", "SWAPPAGES", &changes.swap, checked_pages),
            ("--numproc", "NUMPROC", &changes.numproc, checked_count),
            ("--cpuunits", "CPUUNITS", &changes.cpuunits, checked_units),
            ("--cpulimit", "CPULIMIT", &changes.cpulimit, checked_percent),
            ("--cpus", "CPUS", &changes.cpus, checked_number),
            ("--onboot", "ONBOOT", &changes.onboot, checked_choice),
            ("--disabled", "DISABLED", &changes.disabled, checked_choice),
            ("--stop-timeout", "STOP_TIMEOUT", &changes.stop_timeout, checked_number),
        ];
        for (option, key, value, check) in texts {
            if let Some(value) = value {
                let bad = || VeError::BadValue { option, value: value.clone() };
                new.set(key, &check(value).ok_or_else(bad)?);
            }
        }
        let addresses = addresses(&old, changes, networks)?;
        if addresses != old.addresses {
            let texts: Vec<_> = addresses.iter().map(ToString::to_string).collect();
            new.set("IP_ADDRESS", &texts.join(" "));
        }
        for (option, key, values) in [
            ("--nameserver", "NAMESERVER", &changes.nameserver),
            ("--searchdomain", "SEARCHDOMAIN", &changes.searchdomain),
        ] {
            let fits = |value: &String| checked_hostname(value).is_some() || is_address(value);
            if let Some(bad) = values.iter().find(|value| !fits(value)) {
                return Err(VeError::BadValue { option, value: bad.clone() });
            }
            if !values.is_empty() {
                new.set(key, &values.join(" "));
            }
        }
        if let Some(bad) = changes.gateway.iter().find(|value| !is_address(value)) {
            return Err(VeError::BadAddress { value: bad.clone() });
        }
        if !changes.gateway.is_empty() {
            let value = changes.gateway.join("+");
            let netif = with_interface_value(new.get("NETIF").unwrap_or(""), "gw", &value);
            new.set("NETIF", &netif);
        }
        Ok(new)
    }

    /// Gives the VE an interface with this hardware address, unless it has one.
    pub fn give_interface(file: &mut ConfigFile, id: VeId, mac: Mac) {
        let old = file.get("NETIF").unwrap_or("").to_owned();
        if interface_value(&old, "mac").is_none() {
            let new = with_interface_value(&old, "ifname", "eth0");
            let new = with_interface_value(&new, "mac", &mac.to_string());
            let new = with_interface_value(&new, "host_ifname", &format!("veth{id}.0"));
            file.set("NETIF", &new);
        }
    }
}

fn addresses(old: &Settings, changes: &Changes, networks: &[Cidr]) -> Result<Vec<Cidr>, VeError> {
    let parse = |value: &String| {
        cidr(value, networks).ok_or_else(|| VeError::BadAddress { value: value.clone() })
    };
    let mut addresses = old.addresses.clone();
    for value in &changes.ipdel {
        if value == "all" {
            addresses.clear();
            continue;
        }
        let gone = parse(value)?;
        addresses.retain(|address| address.address() != gone.address());
    }
    for value in &changes.ipadd {
        let new = parse(value)?;
        addresses.retain(|address| address.address() != new.address());
        addresses.push(new);
    }
    Ok(addresses)
}

type Check = fn(&str) -> Option<String>;

fn checked_text(text: &str) -> Option<String> {
    (!text.contains(['"', '\n', '\r'])).then(|| text.to_owned())
}

fn checked_name(text: &str) -> Option<String> {
    let fits = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    // A name of digits alone would hide a number; an empty one takes the name away.
    let number = !text.is_empty() && text.chars().all(|c| c.is_ascii_digit());
    (text.len() <= 64 && !number && !text.starts_with('-') && text.chars().all(fits))
        .then(|| text.to_owned())
}

fn checked_hostname(text: &str) -> Option<String> {
    let label = |label: &str| {
        let fits = |c: char| c.is_ascii_alphanumeric() || c == '-';
        (1..=63).contains(&label.len())
            && label.chars().all(fits)
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    (text.len() <= 64 && text.split('.').all(label)).then(|| text.to_owned())
}

fn checked_choice(text: &str) -> Option<String> {
    ["yes", "no"].contains(&text).then(|| text.to_owned())
}

fn checked_number(text: &str) -> Option<String> {
    text.parse::<u32>().ok().map(|number| number.to_string())
}

fn checked_percent(text: &str) -> Option<String> {
    checked_number(text.strip_suffix('%').unwrap_or(text))
}

fn checked_units(text: &str) -> Option<String> {
    let units: u64 = text.parse().ok()?;
    (8..=500_000).contains(&units).then(|| units.to_string())
}

/// OpenVZ takes `barrier:limit`; the limit is what we can enforce.
fn checked_count(text: &str) -> Option<String> {
    let limit = text.rsplit(':').next()?;
    match limit {
        "unlimited" => Some(limit.to_owned()),
        _ => limit.parse::<u64>().ok().filter(|it| *it > 0).map(|it| it.to_string()),
    }
}

/// A size such as `512M` as `0:PAGES`.
fn checked_pages(text: &str) -> Option<String> {
    if text == "unlimited" {
        return Some("unlimited".to_owned());
    }
    let (number, unit) = match text.find(|c: char| !c.is_ascii_digit()) {
        Some(index) => text.split_at(index),
        None => (text, "B"),
    };
    let factor = match unit.to_ascii_uppercase().as_str() {
        "B" => 1,
        "P" => PAGE,
        "K" => 1 << 10,
        "M" => 1 << 20,
        "G" => 1 << 30,
        "T" => 1_u64 << 40,
        _ => return None,
    };
    let bytes = number.parse::<u64>().ok()?.checked_mul(factor)?;
    Some(format!("0:{}", bytes / PAGE))
}

/// The limit of a `barrier:limit` value. `None` for none.
fn limit_of(text: &str) -> Option<u64> {
    let number: u64 = text.rsplit(':').next()?.parse().ok()?;
    // OpenVZ writes the largest long for unlimited.
    (number < i64::MAX.cast_unsigned()).then_some(number)
}

fn is_address(text: &str) -> bool {
    text.parse::<IpAddr>().is_ok()
}

/// An address with or without its prefix length.
fn cidr(text: &str, networks: &[Cidr]) -> Option<Cidr> {
    let Ok(address) = text.parse::<IpAddr>() else {
        return text.parse().ok();
    };
    let network = networks.iter().find(|network| contains(**network, address));
    let usual = if address.is_ipv4() { 24 } else { 64 };
    Cidr::new(address, network.map_or(usual, |network| network.prefix()))
}

fn contains(network: Cidr, address: IpAddr) -> bool {
    let bits = |address: IpAddr| match address {
        IpAddr::V4(v4) => (u128::from(v4.to_bits()) << 96, 4),
        IpAddr::V6(v6) => (v6.to_bits(), 6),
    };
    let ((a, family), (b, other)) = (bits(network.address()), bits(address));
    let differs = (a ^ b).checked_shr(128 - u32::from(network.prefix())).unwrap_or(0);
    family == other && differs == 0
}

/// A value of the first interface in a `NETIF` line: `ifname=eth0,mac=…;ifname=eth1,…`.
fn interface_value(netif: &str, key: &str) -> Option<String> {
    let first = netif.split(';').next()?;
    let mut pairs = first.split(',').filter_map(|pair| pair.split_once('='));
    pairs.find(|(found, _)| *found == key).map(|(_, value)| value.to_owned())
}

fn with_interface_value(netif: &str, key: &str, value: &str) -> String {
    let mut interfaces: Vec<&str> = netif.split(';').collect();
    let first = interfaces.remove(0);
    let mut pairs: Vec<String> = first
        .split(',')
        .filter(|pair| !pair.is_empty() && pair.split('=').next() != Some(key))
        .map(str::to_owned)
        .collect();
    pairs.push(format!("{key}={value}"));
    let mut all = vec![pairs.join(",")];
    all.extend(interfaces.into_iter().map(str::to_owned));
    all.join(";")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn changed(changes: Changes) -> Result<Settings, VeError> {
        Settings::change(&ConfigFile::default(), &changes, &[]).map(|file| Settings::read(&file))
    }

    #[test]
    fn sizes_have_openvz_suffixes() {
        for (text, bytes) in
            [("512M", 512 << 20), ("1g", 1 << 30), ("1048576", 1 << 20), ("10P", 40_960)]
        {
            let settings = changed(Changes { ram: Some(text.into()), ..Changes::default() });
            assert_eq!(settings.unwrap().limits.memory_bytes, Some(bytes), "{text}");
        }
        let unlimited = Changes { ram: Some("unlimited".into()), ..Changes::default() };
        assert_eq!(changed(unlimited).unwrap().limits.memory_bytes, None);
    }

    #[test]
    fn addresses_come_and_go() {
        let add = |ipadd: &[&str]| Changes {
            ipadd: ipadd.iter().map(|it| (*it).to_owned()).collect(),
            ..Changes::default()
        };
        let added = add(&["10.77.1.1/16", "fd00::1/64"]);
        let file = Settings::change(&ConfigFile::default(), &added, &[]).unwrap();
        assert_eq!(file.get("IP_ADDRESS"), Some("10.77.1.1/16 fd00::1/64"));
        let delete = Changes { ipdel: vec!["10.77.1.1".into()], ..add(&["10.77.1.2"]) };
        let networks = ["10.78.0.1/16".parse().unwrap(), "10.77.255.1/16".parse().unwrap()];
        let file = Settings::change(&file, &delete, &networks).unwrap();
        assert_eq!(file.get("IP_ADDRESS"), Some("fd00::1/64 10.77.1.2/16"));
    }

    #[test]
    fn bad_values_are_named_and_change_nothing() {
        let bad = |changes: Changes| changed(changes).unwrap_err().to_string();
        let some = |text: &str| Some(text.to_owned());
        assert!(bad(Changes { cpuunits: some("7"), ..Changes::default() }).contains("--cpuunits"));
        assert!(bad(Changes { ram: some("12X"), ..Changes::default() }).contains("12X"));
        assert!(bad(Changes { name: some("123"), ..Changes::default() }).contains("--name"));
        assert!(
            bad(Changes { ipadd: vec!["10.0.0.256".into()], ..Changes::default() })
                .contains("10.0.0.256")
        );
    }

    #[test]
    fn the_smaller_of_cpus_and_cpulimit_counts() {
        let file = ConfigFile::parse("CPUS=2\nCPULIMIT=150\nNUMPROC=\"10:20\"");
        let limits = Settings::read(&file).limits;
        assert_eq!((limits.cpu_percent, limits.processes), (Some(150), Some(20)));
    }

    #[test]
    fn an_interface_keeps_its_address() {
        let id = VeId::try_from(101).unwrap();
        let mut file = ConfigFile::default();
        Settings::give_interface(&mut file, id, "02:00:00:00:00:01".parse().unwrap());
        Settings::give_interface(&mut file, id, "02:00:00:00:00:02".parse().unwrap());
        assert_eq!(
            file.get("NETIF"),
            Some("ifname=eth0,mac=02:00:00:00:00:01,host_ifname=veth101.0")
        );
    }
}
