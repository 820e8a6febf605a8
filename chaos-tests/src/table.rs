//! What becomes of each workload when its VE is moved, or checkpointed and restored.
//!
//! The workloads of an area run together in one VE. Where the VE itself fails (it cannot be moved,
//! or does not come back), each workload gets a VE of its own, to name the one that it was.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io;

use ckpt_engine::bits32;

use crate::pool::Pool;
use crate::scene::{Companion, Scene, SceneError, call};
use crate::testbed::Host;
use crate::workload::{AREAS, Area, Workload, named};

const VE: &str = "101";
const ADDRESS: &str = "10.77.1.1";
const ONE: Host = Host::Node(1);
const TWO: Host = Host::Node(2);

/// What is done to the VE of a workload.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Way {
    /// Nothing.
    Unmoved,
    /// It moves to the other node.
    Moved,
    /// It moves there and back.
    MovedTwice,
    /// It is written into a file and ended, and brought back.
    Restored,
}

impl Way {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Unmoved, Self::Moved, Self::MovedTwice, Self::Restored];
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Unmoved => "unmoved",
            Self::Moved => "moved",
            Self::MovedTwice => "moved twice",
            Self::Restored => "restored",
        })
    }
}

/// Workloads to which something cannot be done, and why.
const EXCEPTIONS: &[(&str, &[Way], &str)] =
    &[("udp-peer", &[Way::Restored], "a datagram for a VE that is not there is lost")];

fn exception(name: &str, way: Way) -> Option<&'static str> {
    let known = EXCEPTIONS.iter().find(|(it, ways, _)| *it == name && ways.contains(&way));
    known.map(|(.., why)| *why)
}

/// What came of one workload in one way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cell {
    /// It has noticed nothing, in so many checks.
    Good {
        /// How many.
        checks: u64,
    },
    /// It has noticed something, or its VE has failed.
    Bad {
        /// What it said.
        what: String,
    },
    /// It was not tried.
    None {
        /// Why.
        why: &'static str,
    },
}

/// One workload.
#[derive(Clone, Debug)]
pub struct Row {
    /// Its area.
    pub area: &'static str,
    /// Its name.
    pub name: &'static str,
    /// What came of it.
    pub cells: Vec<(Way, Cell)>,
}

/// The workloads of an area that are wanted.
#[derive(Clone, Debug)]
pub struct Chosen {
    area: &'static str,
    workloads: Vec<&'static Workload>,
}

/// The cluster on which workloads are tried.
#[derive(Debug)]
pub struct Table {
    scene: Scene,
    ostemplate: String,
    _companion: Companion,
    /// For the workloads that hold such, twice: on both nodes.
    pool: Pool,
    /// The node of the VE, if there is one.
    place: Option<Host>,
}

impl Table {
    /// Brings up a cluster.
    pub fn up(name: &str, ostemplate: &str) -> Result<Self, SceneError> {
        let scene = Scene::up(name, 2)?;
        let companion = scene.start_companion()?;
        let pool = Pool::with(16).map_err(call("set huge pages aside"))?;
        let ostemplate = ostemplate.to_owned();
        Ok(Self { scene, ostemplate, _companion: companion, pool, place: None })
    }

    /// The workloads of these names, by area; all if there are none.
    pub fn areas(&self, only: &[String]) -> Vec<Chosen> {
        let wanted = |workload: &&Workload| {
            only.is_empty()
                || only.iter().flat_map(|name| named(name)).any(|it| it.name == workload.name)
        };
        let chosen = |area: &Area| Chosen {
            area: area.name,
            workloads: area.workloads.iter().filter(wanted).collect(),
        };
        AREAS.iter().map(chosen).filter(|chosen| !chosen.workloads.is_empty()).collect()
    }

    /// Why a workload is not tried in a way.
    fn exception(&self, name: &str, way: Way) -> Option<&'static str> {
        let pages = name.starts_with("hugetlb") && !self.pool.is_whole();
        let bits = name.starts_with("bits32") && bits32::host().is_none();
        exception(name, way)
            .or(pages.then_some("the host sets no huge pages aside"))
            .or(bits.then_some("the host runs no programs of 32 bits"))
    }

    /// Tries the workloads of an area in all ways.
    pub fn area(&mut self, chosen: &Chosen) -> Result<Vec<Row>, SceneError> {
        let Chosen { area, workloads } = chosen;
        let row =
            |workload: &&'static Workload| Row { area, name: workload.name, cells: Vec::new() };
        let mut rows: Vec<Row> = workloads.iter().map(row).collect();
        for way in Way::ALL {
            let names: Vec<_> = rows.iter().map(|row| row.name).collect();
            let tried: Vec<_> =
                names.into_iter().filter(|name| self.exception(name, way).is_none()).collect();
            let mut found = match tried.is_empty() {
                true => BTreeMap::new(),
                false => self.together(&tried, way)?,
            };
            for row in &mut rows {
                let cell = match self.exception(row.name, way) {
                    Some(why) => Cell::None { why },
                    None => found
                        .remove(row.name)
                        .unwrap_or_else(|| Cell::Bad { what: "it has left no verdict".to_owned() }),
                };
                row.cells.push((way, cell));
            }
        }
        self.remove()?;
        Ok(rows)
    }

    /// Tries workloads in one VE, or each alone if that VE fails.
    fn together(&mut self, names: &[&str], way: Way) -> Result<BTreeMap<String, Cell>, SceneError> {
        match self.attempt(names, way) {
            Ok(cells) => Ok(cells),
            Err(SceneError::Command { ran }) if names.len() == 1 => {
                self.remove()?;
                let what = ran.to_string().trim().replace('\n', "; ");
                Ok(BTreeMap::from([(names[0].to_owned(), Cell::Bad { what })]))
            }
            Err(SceneError::Command { .. }) => {
                self.remove()?;
                let mut all = BTreeMap::new();
                for name in names {
                    all.extend(self.together(&[name], way)?);
                }
                Ok(all)
            }
            Err(error) => Err(error),
        }
    }

    fn attempt(&mut self, names: &[&str], way: Way) -> Result<BTreeMap<String, Cell>, SceneError> {
        let place = self.make()?;
        if names.iter().any(|name| name.starts_with("hugetlb")) {
            self.allow_segments(place)?;
        }
        let peer = Scene::peer();
        let list = names.join(",");
        let line = format!("selfcheck run --detach --only {list} --peer {peer}");
        self.scene.inside(place, VE, &line)?;
        // Also lets each of them do something before its VE is moved.
        let _ = self.scene.run(place, &["vzctl", "exec2", VE, "selfcheck status"])?;
        self.act(way)?;
        let place = self.place.unwrap_or(place);
        let _ = self.scene.run(place, &["vzctl", "exec2", VE, "selfcheck status"])?;
        let ran = self.scene.run(place, &["vzctl", "exec2", VE, "selfcheck verify"])?;
        match ran.code {
            Some(0 | 1) => Ok(verdicts(&ran.stdout)),
            _ => Err(SceneError::Command { ran: Box::new(ran) }),
        }
    }

    /// Lets root of the VE make segments of huge pages.
    fn allow_segments(&self, place: Host) -> Result<(), SceneError> {
        let map = self.scene.inside(place, VE, "cat /proc/self/gid_map")?;
        let group = map.split_whitespace().nth(1).and_then(|group| group.parse().ok());
        let group = group.ok_or(io::ErrorKind::InvalidData.into());
        let allowed = group.and_then(|group| self.pool.allow_segments(group));
        allowed.map_err(call("let the VE make segments of huge pages"))
    }

    /// Does to the VE what the way says.
    fn act(&mut self, way: Way) -> Result<(), SceneError> {
        match way {
            Way::Unmoved => Ok(()),
            Way::Moved => self.move_on(),
            Way::MovedTwice => self.move_on().and_then(|()| self.move_on()),
            Way::Restored => {
                let place = self.place.unwrap_or(ONE);
                let file = self.scene.testbed.node_directory(&place).join("dump");
                let file = file.to_string_lossy();
                self.scene.good(place, &["vzctl", "chkpnt", VE, "--dumpfile", &file])?;
                self.scene.good(place, &["vzctl", "restore", VE, "--dumpfile", &file])?;
                Ok(())
            }
        }
    }

    fn move_on(&mut self) -> Result<(), SceneError> {
        let place = self.place.unwrap_or(ONE);
        let target = if place == ONE { TWO } else { ONE };
        self.scene.good(place, &["vzmigrate", "--online", &target.to_string(), VE])?;
        self.place = Some(target);
        Ok(())
    }

    /// The VE, with the program in it.
    fn make(&mut self) -> Result<Host, SceneError> {
        if let Some(place) = self.place {
            return Ok(place);
        }
        self.scene.make_ve_of(ONE, VE, ADDRESS, &self.ostemplate)?;
        self.place = Some(ONE);
        let program = self.scene.program("selfcheck");
        let file = File::open(&program)
            .map_err(|source| SceneError::Call { what: "open selfcheck", source })?;
        let copy = "cat > /usr/local/bin/selfcheck && chmod 755 /usr/local/bin/selfcheck";
        self.scene.run_with(ONE, &["vzctl", "exec2", VE, copy], file.into())?.good()?;
        Ok(ONE)
    }

    fn remove(&mut self) -> Result<(), SceneError> {
        let Some(place) = self.place.take() else { return Ok(()) };
        // It may not run.
        let _ = self.scene.run(place, &["vzctl", "stop", VE, "--fast"])?;
        self.scene.good(place, &["vzctl", "destroy", VE])?;
        Ok(())
    }
}

/// What `selfcheck verify` has printed, by workload.
fn verdicts(table: &str) -> BTreeMap<String, Cell> {
    let mut found = BTreeMap::new();
    for line in table.lines().skip(1) {
        let mut words = line.split_whitespace();
        let (Some(name), Some(checks)) = (words.next(), words.next()) else { continue };
        let Ok(checks) = checks.parse() else { continue };
        let cell = match words.next() {
            Some("ok") => Cell::Good { checks },
            Some("FAIL") => Cell::Bad { what: words.collect::<Vec<_>>().join(" ") },
            _ => continue,
        };
        found.insert(name.to_owned(), cell);
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verdicts_are_understood() {
        let text = "workload       checks  result\npipes            440  ok\n\
                    udp-peer         383  FAIL  a call failed: (os error 11)\n1 ok, 1 failed\n";
        let found = verdicts(text);
        assert_eq!(found["pipes"], Cell::Good { checks: 440 });
        assert_eq!(found["udp-peer"], Cell::Bad { what: "a call failed: (os error 11)".into() });
        assert_eq!(found.len(), 2);
    }
}
