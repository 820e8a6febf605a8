//! The thread that builds a VE on the target.
//!
//! ptrace belongs to a thread, so one thread makes the skeleton, applies every piece of the
//! stream in order, and lets the finished VE go. What waits for it, the queue of pieces, is
//! short, so that a slow build holds the source back instead of filling memory.

use std::{
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use ckpt_engine::{
    container::{Handles, cgroups, host_clocks},
    files,
    freeze::{FreezeError, Frozen},
    rebuild::{Faults, Later, Ready, RebuildError, Skeleton},
    sys::netns::Netns,
};
use ckpt_format::{
    codec,
    container::Clocks,
    network::{Frame, Network},
    process::Process,
    stream::Record,
};
use tokio::sync::mpsc;

use super::{
    messages::{Item, State},
    postcopy::keeper::{self, Keeper, Kept},
    stopwatch::Stopwatch,
};
use crate::{
    cgroup::Cgroups,
    network::{
        Announcer, Hold, NetworkError,
        state::{self, Routes},
    },
    storage::{FileApplier, TreeError},
};

/// Pieces that may wait, of up to a mebibyte each.
const QUEUE: usize = 4;
/// How far the VE's clocks may be behind what the source showed; it is waited for.
const CLOCK_WAIT_MAX: Duration = Duration::from_secs(5);

/// Why a VE could not be built.
#[derive(Debug, thiserror::Error)]
pub(super) enum BuildError {
    /// Its processes.
    #[error(transparent)]
    Rebuild(#[from] RebuildError),
    /// Its files.
    #[error(transparent)]
    Files(#[from] TreeError),
    /// Its network.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// The cgroups that it manages itself.
    #[error(transparent)]
    Cgroups(#[from] cgroups::CgroupError),
    /// Its freezer.
    #[error(transparent)]
    Freeze(#[from] FreezeError),
    /// What the source sent.
    #[error("the source sent a damaged state")]
    State(#[from] codec::DecodeError),
    /// Its time.
    #[error("the clocks of the two nodes are {} ms apart", behind.as_millis())]
    Clocks {
        /// How far the VE's clock would have gone back.
        behind: Duration,
    },
    /// Something of the host.
    #[error("cannot {what}")]
    System {
        /// What was to be done.
        what: &'static str,
        /// Why not.
        source: std::io::Error,
    },
}

/// What the builder starts from: a container that waits, and everything around it.
pub(super) struct Site {
    /// The container's pid 1, as the host numbers it.
    pub(super) init: i32,
    /// Our end of its channel.
    pub(super) channel: OwnedFd,
    pub(super) id_base: u32,
    /// The namespaces that there are for programs inside.
    pub(super) nested: Handles,
    pub(super) cgroups: Cgroups,
    /// Taken by the thread.
    pub(super) applier: Option<FileApplier>,
    /// How far the clocks inside are ahead of ours.
    pub(super) clock_offsets: Clocks,
    /// The VE's networks, its own first, already as they were at the offer.
    pub(super) networks: Vec<Network>,
    /// Their namespaces.
    pub(super) namespaces: Vec<Netns>,
    pub(super) hold: Option<Hold>,
    pub(super) announcer: Option<Announcer>,
    /// Notes that the VE was let go, and whether pages of it are missing: from then on it lives on
    /// without the daemon.
    pub(super) released: Box<dyn Fn(bool) -> std::io::Result<()> + Send>,
    /// Where what this node keeps of it lies.
    pub(super) directory: PathBuf,
    /// The other ends of connections may be gone since: all are asked.
    pub(super) ask_peers: bool,
}

/// What the builder is told.
pub(super) enum Order {
    /// The next piece.
    Item(Item),
    /// The VE is ours: let it run, and give it these frames.
    Release(Vec<Frame>),
    /// Frames that came late.
    Late(Vec<Frame>),
}

/// What the builder tells.
#[derive(Debug)]
pub(super) enum News {
    /// Everything up to this barrier is applied.
    Applied(u32),
    /// The VE stands ready.
    Ready(Duration),
    /// The VE runs; some of its pages may be missing.
    Running(Duration, Option<Kept>),
    /// It did not work, and nothing of the VE runs here.
    Failed(BuildError),
}

/// The builder's thread. Dropped before [`News::Running`], everything built is killed.
pub(super) struct Builder {
    pub(super) orders: mpsc::Sender<Order>,
    pub(super) news: mpsc::UnboundedReceiver<News>,
    thread: JoinHandle<()>,
}

impl Builder {
    /// Call inside a runtime.
    pub(super) fn start(site: Site) -> std::io::Result<Self> {
        let (orders, mut queue) = mpsc::channel(QUEUE);
        let (sender, news) = mpsc::unbounded_channel();
        let runtime = tokio::runtime::Handle::current();
        let thread = std::thread::Builder::new().name("builder".into()).spawn(move || {
            // A keeper is collected by it.
            let _runtime = runtime.enter();
            if let Err(error) = build(site, &mut queue, &sender) {
                // The receiver may have given up already: then nobody wants to know.
                let _ = sender.send(News::Failed(error));
            }
        })?;
        Ok(Self { orders, news, thread })
    }

    /// Waits until the thread has ended, and with it everything that it still held.
    pub(super) fn end(self) {
        let Self { orders, news, thread } = self;
        drop(orders);
        drop(news);
        if thread.join().is_err() {
            tracing::error!("the builder of a VE panicked");
        }
    }
}

/// The whole life of the thread. A closed queue before the release means: give up.
fn build(
    mut site: Site,
    orders: &mut mpsc::Receiver<Order>,
    news: &mpsc::UnboundedSender<News>,
) -> Result<(), BuildError> {
    let channel = site.channel.try_clone();
    let channel = channel.map_err(system("copy a descriptor"))?;
    let mut skeleton = Skeleton::adopt(site.init, channel, site.id_base)?;
    skeleton.set_nested(std::mem::take(&mut site.nested))?;
    let Some(mut applier) = site.applier.take() else { return Ok(()) };
    let mut coming = Coming::default();
    let mut absent = Absent::default();
    let mut busy = Duration::ZERO;
    let (finished, start, mut watch) = loop {
        let Some(Order::Item(item)) = orders.blocking_recv() else { return Ok(()) };
        let begun = Instant::now();
        match item {
            Item::File(record) => applier.apply(record)?,
            Item::Memory(record) => {
                if matches!(record, Record::Layout(_)) {
                    // What it maps must be there.
                    applier.flush()?;
                    // The VE was stopped in vain: what was to come later comes now, and its processes are
                    // told anew.
                    absent.later.clear();
                    coming = Coming::default();
                }
                skeleton.apply(record)?;
            }
            Item::Barrier(barrier) => {
                busy = Duration::ZERO;
                drop(news.send(News::Applied(barrier)));
            }
            // The template was dealt with before there was a container.
            Item::Template(_) | Item::TemplateEnd => {}
            Item::Postcopy if absent.keeper.is_none() => {
                let keeper = Keeper::start(&site.directory, site.init);
                absent.keeper = Some(keeper.map_err(system("start the keeper of its memory"))?);
            }
            Item::Postcopy => {}
            Item::Descriptors(count) => make_room(count),
            Item::Connections(told) => skeleton.make_early(told)?,
            Item::Later { pid, runs } => absent.later.entry(pid).or_default().extend(runs),
            Item::Processes { bytes, last } => coming.processes(&bytes, last)?,
            Item::State { bytes, last } => {
                coming.encoded.extend_from_slice(&bytes);
                if last {
                    let (start, mut watch) = (Instant::now(), Stopwatch::start("rebuild of a VE"));
                    let state = coming.state()?;
                    watch.lap("state");
                    break (state, start, watch);
                }
            }
        }
        busy += begun.elapsed();
    };
    // Of all that came since the last round, while the source was reading the rest.
    Stopwatch::was_beside("contents at the target", busy);
    applier.finish()?;
    watch.lap("contents");
    let built = finish(&mut site, skeleton, &finished, absent, watch)?;
    let _ = news.send(News::Ready(start.elapsed()));
    let frames = match orders.blocking_recv() {
        Some(Order::Release(frames)) => frames,
        _ => return Ok(()),
    };
    let start = Instant::now();
    let (missing, released) = release(&mut site, built, &frames)?;
    let _ = news.send(News::Running(start.elapsed(), missing));
    drop(released);
    finish_network(site, orders)
}

/// What can wait until the VE runs: its routes as they were, and late frames.
fn finish_network(site: Site, orders: &mut mpsc::Receiver<Order>) -> Result<(), BuildError> {
    let Site { namespaces, networks, hold, .. } = site;
    if let Err(error) = state::set_routes(&namespaces, &networks, Routes::Exact) {
        tracing::warn!(%error, "the routes of a VE keep a large initial window");
    }
    while let Some(Order::Late(frames)) = orders.blocking_recv() {
        if let Some(hold) = &hold {
            hold.replay(&frames);
        }
    }
    if let Some(hold) = hold {
        hold.remove()?;
    }
    Ok(())
}

/// The state as it comes.
#[derive(Default)]
struct Coming {
    /// What came of the list or the state that is not complete yet.
    encoded: Vec<u8>,
    /// Processes that came before the rest.
    processes: Vec<Process>,
}

impl Coming {
    fn processes(&mut self, bytes: &[u8], last: bool) -> Result<(), BuildError> {
        self.encoded.extend_from_slice(bytes);
        if last {
            self.processes.extend(codec::decode::<Vec<Process>>(&self.encoded)?);
            self.encoded.clear();
        }
        Ok(())
    }

    /// All of it, the first process of the VE first.
    fn state(self) -> Result<State, BuildError> {
        let mut state = codec::decode::<State>(&self.encoded)?;
        let processes = &mut state.processes.processes;
        processes.extend(self.processes);
        processes.sort_by_key(|process| process.pid);
        Ok(state)
    }
}

/// What is to come when the VE runs already.
#[derive(Default)]
struct Absent {
    later: Later,
    keeper: Option<Keeper>,
}

impl Absent {
    /// Lets threads wait for what is missing, and hands it to the keeper.
    fn leave_out(
        self,
        skeleton: &Skeleton,
        faults: Faults,
        directory: &Path,
    ) -> Result<Option<Kept>, BuildError> {
        if self.later.is_empty() {
            // One that was started for nothing ends by itself.
            keeper::remove(directory);
            return Ok(None);
        }
        const WHAT: &str = "hand missing memory to its keeper";
        let Some(Keeper { mut client, .. }) = self.keeper else {
            return Err(system(WHAT)(std::io::ErrorKind::NotConnected.into()));
        };
        let mut kept = Vec::with_capacity(self.later.len());
        let mut bytes = 0;
        for incomplete in skeleton.leave_out(self.later, faults)? {
            bytes += incomplete.runs.iter().map(|run| run.end() - run.start).sum::<u64>();
            client
                .add(incomplete.pid, incomplete.runs, &incomplete.faults)
                .map_err(system(WHAT))?;
            kept.push(incomplete.faults);
        }
        Ok(Some(Kept { client, faults: kept, bytes }))
    }
}

/// A VE that only has to be let go.
struct Built {
    ready: Ready,
    files: files::Rebuilt,
    frozen: Frozen,
    missing: Option<Kept>,
}

fn finish(
    site: &mut Site,
    mut skeleton: Skeleton,
    state: &State,
    absent: Absent,
    mut watch: Stopwatch,
) -> Result<Built, BuildError> {
    let faults = skeleton.open_faults(&absent.later)?;
    // Those of programs are as at the offer when an older source does not tell them again.
    let nested = &state.nested_networks;
    let kept = if nested.is_empty() { site.networks.len() } else { 1 };
    site.networks.truncate(kept);
    site.networks.splice(..1, std::iter::once(&state.network).cloned());
    site.networks.extend(nested.iter().cloned());
    state::rebuild(&site.namespaces, &site.networks, site.id_base, Routes::ForRestore)?;
    watch.lap("network");
    // Both say how far the same clock, the VE's, is ahead of that of a host.
    skeleton.set_source_clock(site.clock_offsets.since(state.clock_offsets).monotonic_ns);
    let top = site.cgroups.visible();
    cgroups::prepare(&top, &state.cgroups, site.id_base)?;
    // Each process enters as a whole: before it has threads.
    skeleton.enter_cgroup_namespaces(&top)?;
    skeleton.populate(&state.processes, &state.tables)?;
    cgroups::rebuild(&top, &state.cgroups, site.id_base, &skeleton.hosts().collect())?;
    let mut files = skeleton.open_files(&state.files)?;
    watch.lap("files");
    state::set_filter(&site.namespaces, &site.networks)?;
    watch.lap("packet filter");
    skeleton.install(&state.processes, &state.tables, &files)?;
    watch.lap("processes");
    skeleton.renew_identities(&state.processes, &state.files, &state.tables, &files)?;
    watch.lap("identities");
    files.finish(&state.files, &state.tables, &mut skeleton).map_err(RebuildError::Files)?;
    let missing = absent.leave_out(&skeleton, faults, &site.directory)?;
    watch.lap("missing pages");
    let ready = skeleton.finalize(&state.processes)?;
    watch.lap("registers");
    let frozen = Frozen::freeze(site.cgroups.freezer())?;
    cgroups::freeze(&top, &state.cgroups)?;
    watch.lap("freeze");
    wait_for_clocks(site.clock_offsets, state.clocks)?;
    watch.lap("clocks");
    Ok(Built { ready, files, frozen, missing })
}

/// All that the VE has open is open here until it runs.
fn make_room(count: u32) {
    if let Err(error) = files::make_room(count as usize) {
        tracing::info!(%error, count, "no room was made for the descriptors of a VE");
    }
}

/// The VE's clocks must not show less than they showed on the source.
fn wait_for_clocks(offsets: Clocks, shown: Clocks) -> Result<(), BuildError> {
    let inside = |offset: i64, now: i64| now.saturating_add(offset);
    let now = host_clocks().map_err(system("read the clocks"))?;
    let behind = (shown.monotonic_ns - inside(offsets.monotonic_ns, now.monotonic_ns))
        .max(shown.boottime_ns - inside(offsets.boottime_ns, now.boottime_ns));
    match u64::try_from(behind).map(Duration::from_nanos) {
        Ok(behind) if behind > CLOCK_WAIT_MAX => Err(BuildError::Clocks { behind }),
        Ok(behind) => {
            std::thread::sleep(behind);
            Ok(())
        }
        Err(_) => Ok(()),
    }
}

/// From here on the VE runs here and nowhere else.
fn release(
    site: &mut Site,
    built: Built,
    frames: &[Frame],
) -> Result<(Option<Kept>, files::Released), BuildError> {
    let Built { ready, files, frozen, missing } = built;
    let mut watch = Stopwatch::start("release of a VE");
    ready.release(&frozen)?;
    watch.lap("detach");
    (site.released)(missing.is_some()).map_err(system("write the journal"))?;
    watch.lap("journal");
    if let Some(hold) = &mut site.hold {
        hold.open_outgoing()?;
    }
    if let Some(announcer) = &site.announcer {
        announcer.send();
    }
    watch.lap("announce");
    let released = files.release(site.ask_peers);
    watch.lap("connections");
    frozen.thaw()?;
    watch.lap("thaw");
    if let Some(hold) = &mut site.hold {
        hold.replay(frames);
        hold.release()?;
    }
    Ok((missing, released))
}

fn system(what: &'static str) -> impl FnOnce(std::io::Error) -> BuildError {
    move |source| BuildError::System { what, source }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::migration::messages::tests::plain;

    fn process(pid: i32) -> Process {
        Process { pid, ..plain() }
    }

    #[test]
    fn processes_that_come_before_the_state_are_in_it_and_the_first_one_is_first() {
        let mut coming = Coming::default();
        let list = codec::encode(&vec![process(7), process(3)]);
        let (begin, end) = list.split_at(10);
        coming.processes(begin, false).unwrap();
        coming.processes(end, true).unwrap();
        coming.processes(&codec::encode(&vec![process(4)]), true).unwrap();
        let mut rest: State = plain();
        rest.processes.processes = vec![process(5), process(1)];
        coming.encoded = codec::encode(&rest);
        let state = coming.state().unwrap();
        let pids: Vec<i32> = state.processes.processes.iter().map(|it| it.pid).collect();
        assert_eq!(pids, [1, 3, 4, 5, 7]);
    }

    #[test]
    fn a_list_of_processes_that_is_cut_off_is_refused() {
        let list = codec::encode(&vec![process(7), process(3)]);
        let refused = Coming::default().processes(&list[..list.len() - 1], true);
        assert!(matches!(refused, Err(BuildError::State(_))), "{refused:?}");
    }
}
