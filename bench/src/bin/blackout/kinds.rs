//! The kinds of VE whose clients are watched.

use std::process::{Child, Stdio};

use bench::ballast;
use bench::client::exchange::Exchange;
use bench::stage::{Stage, StageError, Ve, services, templates};
use chaos_tests::client::remote::RemoteLoad;
use chaos_tests::testbed::Host;
use clap::ValueEnum;

use crate::Clients;

/// A VE and what is done to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Kind {
    /// A Debian that does nothing.
    Idle,
    /// A large redis with 1,000 writes per second.
    #[value(name = "redis-1k")]
    Redis1k,
    /// With 10,000.
    #[value(name = "redis-10k")]
    Redis10k,
    /// With 50,000.
    #[value(name = "redis-50k")]
    Redis50k,
    /// PostgreSQL under pgbench.
    Postgres,
    /// nginx under wrk.
    Nginx,
    /// A hundred processes that do nothing.
    #[value(name = "processes-100")]
    Processes100,
    /// A thousand.
    #[value(name = "processes-1000")]
    Processes1000,
    /// A thousand established connections.
    #[value(name = "connections-1000")]
    Connections1000,
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.to_possible_value().expect("none is skipped").get_name())
    }
}

impl Kind {
    pub(crate) const ALL: &[Self] = &[
        Self::Idle,
        Self::Redis1k,
        Self::Redis10k,
        Self::Redis50k,
        Self::Postgres,
        Self::Nginx,
        Self::Processes100,
        Self::Processes1000,
        Self::Connections1000,
    ];

    fn writes_per_second(self) -> Option<u32> {
        match self {
            Self::Redis1k => Some(1_000),
            Self::Redis10k => Some(10_000),
            Self::Redis50k => Some(50_000),
            _ => None,
        }
    }

    /// Whether it is moved without pre-copy as well.
    pub(crate) fn is_stopped(self) -> bool {
        matches!(self, Self::Idle | Self::Redis10k)
    }

    /// The VE, not made yet.
    pub(crate) fn ve(self, dataset_mib: u64) -> Ve {
        match self {
            // The keys, and what redis needs beside the values, come on top.
            _ if self.writes_per_second().is_some() => {
                Ve::new("debian-12-minimal", 512 + dataset_mib * 2)
            }
            Self::Postgres | Self::Nginx => Ve::new(templates::SERVICES, 1024),
            _ => Ve::new("debian-12-minimal", 1024),
        }
    }
}

/// A VE with its clients.
pub(crate) struct Playing {
    pub(crate) ve: Ve,
    pub(crate) probe: RemoteLoad,
    /// Clients of our own that report.
    pub(crate) clients: Clients,
    /// Load generators of others.
    generators: Vec<Generator>,
}

/// A program that puts load on a VE; killed when this is dropped.
struct Generator(Child);

impl Drop for Generator {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Playing {
    /// Makes the VE, and waits until its clients have what they want.
    pub(crate) fn start(stage: &Stage, kind: Kind, dataset_mib: u64) -> Result<Self, StageError> {
        let ve = kind.ve(dataset_mib);
        stage.make_ve(&ve)?;
        let mut clients = Clients::new();
        let mut generators = Vec::new();
        let (exchange, port) = match kind {
            Kind::Redis1k | Kind::Redis10k | Kind::Redis50k => {
                stage.scene.open_redis(ve.home, ve.id)?;
                clients.push(start_writes(stage, &ve, kind, dataset_mib)?);
                (Exchange::Redis, 6379)
            }
            Kind::Postgres => {
                services::start_postgres(stage, &ve)?;
                let load = ["pgbench", "-h", ve.address, "-U", "postgres", "-c", "4"];
                generators.push(start_generator(
                    stage,
                    &[&load[..], &["-T", "3600", "postgres"]].concat(),
                )?);
                (Exchange::Postgres, 5432)
            }
            Kind::Nginx => {
                services::start_nginx(stage, &ve)?;
                let page = format!("http://{}/", ve.address);
                let load = ["wrk", "-t", "1", "-c", "32", "-d", "3600s", &page];
                generators.push(start_generator(stage, &load)?);
                (Exchange::Http, 80)
            }
            Kind::Idle => with_ballast(stage, &ve, "")?,
            Kind::Processes100 => with_ballast(stage, &ve, "--processes 100")?,
            Kind::Processes1000 => with_ballast(stage, &ve, "--processes 1000")?,
            Kind::Connections1000 => {
                let place = with_ballast(stage, &ve, "")?;
                let address = format!("{}:{}", ve.address, ballast::PORT);
                let hold = ["hold", "--address", &address, "--count", "1000"];
                let mut hold = stage.start_client(&hold.map(str::to_owned))?;
                hold.mark("there")?;
                clients.push(hold);
                place
            }
        };
        let exchange = exchange.to_possible_value().expect("none is skipped");
        let address = format!("{}:{port}", ve.address);
        let words = ["probe", "--exchange", exchange.get_name(), "--address", &address];
        let probe = stage.start_client(&words.map(str::to_owned))?;
        Ok(Self { ve, probe, clients, generators })
    }

    /// From here on everything counts.
    pub(crate) fn mark(&mut self) -> Result<(), StageError> {
        for client in &mut self.clients {
            client.mark("before")?;
        }
        self.probe.mark("before")?;
        Ok(())
    }

    /// Ends the clients, then the VE.
    pub(crate) fn end(self, stage: &Stage) -> Result<(), StageError> {
        let Self { ve, probe, clients, generators } = self;
        drop((probe, clients, generators));
        stage.remove_ve(&ve)
    }
}

fn with_ballast(stage: &Stage, ve: &Ve, options: &str) -> Result<(Exchange, u16), StageError> {
    stage.start_ballast(ve, options)?;
    Ok((Exchange::Echo, ballast::PORT))
}

fn start_writes(
    stage: &Stage,
    ve: &Ve,
    kind: Kind,
    dataset_mib: u64,
) -> Result<RemoteLoad, StageError> {
    let (address, rate) = (format!("{}:6379", ve.address), kind.writes_per_second().unwrap_or(0));
    let (mib, rate) = (dataset_mib.to_string(), rate.to_string());
    let words = ["writes", "--address", &address, "--fill-mib", &mib, "--rate", &rate];
    let mut writes = stage.start_client(&words.map(str::to_owned))?;
    // Answered when the dataset is there.
    writes.mark("filled")?;
    Ok(writes)
}

fn start_generator(stage: &Stage, words: &[&str]) -> Result<Generator, StageError> {
    let mut command = std::process::Command::new(words[0]);
    command.args(&words[1..]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    Ok(Generator(stage.scene.testbed.spawn(&Host::Client, &mut command)?))
}
