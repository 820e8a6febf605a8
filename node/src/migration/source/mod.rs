//! Moves one running VE to another node.
//!
//! Each phase is a type; moving on consumes it. A phase that fails leaves the VE running here,
//! whatever the cause: what stands still goes on when its guard is dropped. The one exception is
//! [`Copied::hand_over`]: from there only the log knows who owns the VE.
//!
//! ```text
//! Offer ──▶ Precopy ──▶ Stopped ──▶ Copied ──▶ Moved
//! └──── runs here ───┘ └─ stands still ─┘  └─ or stayed, as the log says
//! ```

mod offer;
mod remote;
mod talk;

use std::{
    pin::pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use ckpt_format::blocker::Blocker;
use coordinator::{Coordinator, MigrationId, Verdict};
use tokio::task::{JoinHandle, spawn_blocking};
use transport::{LinkError, NodeId};

pub(in crate::migration) use self::offer::look_at;
use self::{offer::Offer, talk::Talk};
use super::{
    blackout::{CopyError, Live, Still},
    error::MigrateError,
    experience::Experience,
    journal::Journal,
    limiter::Limiter,
    messages::{ToSource, ToTarget},
    pipe::Pipe,
    postcopy::{later::Memory, shelf::Shelves},
    report::{Downtime, Report, RoundReport},
    rounds::{Fixed, Measured, Next, Policy, Prediction},
    sealed::SealedVe,
    settle,
    vain::VainStops,
};
use crate::{
    api::{Sink, chain},
    cluster::Cluster,
    ve::{Operation, Runtime},
};

/// How long the target may take for an answer while the VE runs.
const ANSWER: Duration = Duration::from_secs(60);
/// How long the target may take to rebuild a VE that stands still.
const REBUILD: Duration = Duration::from_secs(10);
/// How long the target may take to let the VE run before the log is asked.
const RUN: Duration = Duration::from_secs(5);
/// How long a freeze may last beyond three times what was predicted, before the VE goes on.
const FREEZE: Duration = Duration::from_secs(10);
/// How long the reason may take after the target has stopped to listen.
const LAST_WORDS: Duration = Duration::from_secs(2);
/// How often the user is told why a move does not end.
const TELL_EVERY: Duration = Duration::from_secs(5);
/// How long frames that still arrive here are passed on.
const TAIL: Duration = Duration::from_millis(300);
const TAIL_STEP: Duration = Duration::from_millis(20);

/// What the user asked for.
#[derive(Clone, Debug)]
pub(super) struct Wish {
    /// The name of the target.
    pub(super) target: String,
    /// The blackout that the user accepts.
    pub(super) max_downtime: Duration,
    /// Keep the files here, without the right to run them.
    pub(super) keep: bool,
    /// Rather stay than stand still for longer.
    pub(super) strict: bool,
    /// The most that is sent while the VE runs, in bytes per second.
    pub(super) bandwidth: Option<u64>,
    /// Copy while the VE runs.
    pub(super) precopy: bool,
    /// If nothing else meets `max_downtime`, let memory come after the switch.
    pub(super) postcopy: bool,
}

/// The parts of the daemon that a migration needs.
#[derive(Clone, Debug)]
pub(super) struct Context {
    pub(super) runtime: Arc<Runtime>,
    pub(super) cluster: Arc<Cluster>,
    pub(super) experience: Arc<Mutex<Experience>>,
    /// What all moves from here may send together.
    pub(super) limiter: Arc<Limiter>,
    /// What VEs that moved away have left here for a while.
    pub(super) shelves: Arc<Shelves>,
}

impl Context {
    /// The log, as of now: it is another one after this node has joined a cluster.
    pub(super) fn coordinator(&self) -> Coordinator {
        self.cluster.coordinator()
    }

    /// What the moves so far have taught.
    pub(super) fn experience(&self) -> MutexGuard<'_, Experience> {
        self.experience.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Moves a VE. Whatever happens, the VE runs on exactly one node afterwards.
pub(super) async fn migrate(
    context: &Context,
    operation: Operation,
    wish: &Wish,
    sink: &Sink,
) -> Result<Report, MigrateError> {
    let start = Instant::now();
    let offer = Offer::look(context, operation, &wish.target).await?;
    let precopy = offer.propose(wish, sink).await?;
    let (mut precopy, rounds) = match wish.precopy {
        true => precopy.copy(wish, sink).await?,
        false => precopy.copy_nothing(),
    };
    let copied = loop {
        match precopy.stop(&rounds).await?.send_rest(rounds.memory).await? {
            Rest::Sent(copied) => break copied,
            Rest::NotNow(running) => precopy = *running,
        }
    };
    copied.hand_over(start, rounds, wish.keep, sink).await
}

/// What would stop any move of a VE now.
pub(super) async fn blockers(
    context: &Context,
    operation: Operation,
) -> Result<Vec<Blocker>, MigrateError> {
    let ve = &operation.ve;
    if ve.running().is_none() {
        return Err(MigrateError::NotRunning { ve: ve.id.number() });
    }
    let handle = context.runtime.handle(ve)?;
    spawn_blocking(move || offer::blockers(&handle)).await?
}

/// Only looks whether a move would work.
pub(super) async fn check(
    context: &Context,
    operation: Operation,
    target: &str,
) -> Result<(), MigrateError> {
    Offer::look(context, operation, target).await?.ask_only().await
}

/// What lasts from the offer to the end.
struct Session {
    begun: Begun,
    operation: Operation,
    talk: Talk,
    pipe: Pipe,
    pump: JoinHandle<Result<(), LinkError>>,
    target: NodeId,
    /// This node's name and the target's.
    names: (String, String),
    vain: VainStops,
}

/// A migration that the log knows of. Dropped unsettled, the log is told that it is off.
struct Begun {
    context: Context,
    migration: MigrationId,
    journal: Journal,
    settled: bool,
}

impl Drop for Begun {
    fn drop(&mut self) {
        if self.settled {
            return;
        }
        let coordinator = self.context.coordinator();
        let (migration, journal) = (self.migration, self.journal.clone());
        tokio::spawn(async move { settle::abort(&coordinator, migration, &journal).await });
    }
}

/// The VE runs here; the target's copy of it grows.
struct Precopy {
    session: Session,
    live: Live,
}

/// What pre-copy measured.
struct Rounds {
    reports: Vec<RoundReport>,
    predicted: Prediction,
    /// What is sent while the VE stands still.
    memory: Memory,
}

impl Precopy {
    /// Rounds, until freezing is worth it.
    async fn copy(mut self, wish: &Wish, sink: &Sink) -> Result<(Self, Rounds), MigrateError> {
        let budget = wish.max_downtime;
        let factor = self.session.begun.context.experience().factor(self.session.ve());
        let mut policy = Policy::new(budget, factor, self.live.brake.own().is_some());
        let mut reports: Vec<RoundReport> = Vec::new();
        loop {
            let waited = self.session.pipe.waited();
            let (back, report, fixed) = self.round(reports.len() as u32, sink).await?;
            self = back;
            reports.push(report);
            let time = Duration::from_secs_f64(report.ms / 1000.0);
            let waited = self.session.pipe.waited() - waited;
            match policy.after(Measured { bytes: report.bytes, time, waited }, fixed) {
                Next::Again => {}
                Next::Slow { percent } => match self.live.brake.press(percent) {
                    Ok(()) => sink.log(format!(
                        "the VE writes faster than it can be copied: it is left {percent} % of \
                         its CPU time until it has moved"
                    )),
                    // Rounds without it are better than no move.
                    Err(error) => sink.log(format!("cannot slow the VE down: {}", chain(&error))),
                },
                Next::Freeze(predicted) => {
                    let over = policy.is_over_budget(predicted);
                    let plain = (over && wish.postcopy).then_some(self.live.plain);
                    let (predicted, memory) = remote::choose(predicted, plain, sink);
                    if policy.is_over_budget(predicted) {
                        if wish.strict {
                            let expected = predicted.total;
                            return Err(MigrateError::OverBudget { budget, expected });
                        }
                        sink.log(format!(
                            "the VE writes too much to meet {} ms: about {:.0} ms are expected",
                            budget.as_millis(),
                            ms(predicted.total)
                        ));
                    }
                    tracing::info!(ve = self.session.ve(), ?predicted, factor, "a VE is frozen");
                    return Ok((self, Rounds { reports, predicted, memory }));
                }
            }
        }
    }

    /// No round: all of it is copied while the VE stands still.
    fn copy_nothing(self) -> (Self, Rounds) {
        let predicted = Prediction::of_all(offer::memory_bytes(&self.live.freezer));
        (self, Rounds { reports: Vec::new(), predicted, memory: Memory::Whole })
    }

    /// One round, until the target has applied it.
    async fn round(
        self,
        number: u32,
        sink: &Sink,
    ) -> Result<(Self, RoundReport, Fixed), MigrateError> {
        let Self { mut session, live } = self;
        let (start, before) = (Instant::now(), session.pipe.bytes());
        let throttle_percent = live.brake.percent();
        let filled = session.fill(sink, move |pipe| {
            let mut live = live;
            let round = live.round(number, &pipe);
            (live, round)
        });
        let (live, round) = filled.await?;
        let fixed = live.fixed;
        let round = match round {
            Ok(round) => round,
            Err(error) => return Err(session.reason(error).await),
        };
        match session.talk.answer_or_cancel(ANSWER, sink).await? {
            ToSource::Applied { barrier } if barrier == number => {}
            _ => return Err(MigrateError::Protocol),
        }
        let bytes = session.pipe.bytes() - before;
        let ms = ms(start.elapsed());
        sink.progress(&format!("round {number}"), bytes, Some(bytes), "bytes");
        let report = RoundReport { pages: round.pages, bytes, ms, throttle_percent };
        Ok((Self { session, live }, report, fixed))
    }

    /// Stops the VE; the downtime clock starts.
    async fn stop(self, rounds: &Rounds) -> Result<Stopped, MigrateError> {
        let Self { session, live } = self;
        let patience = FREEZE + rounds.predicted.total * 3;
        session.pipe.lift_limit(true);
        if rounds.memory == Memory::Later {
            session.announce_postcopy().await?;
        }
        let still =
            spawn_blocking(move || live.freeze(patience)).await?.map_err(|(_, error)| error)?;
        Ok(Stopped { session, still })
    }
}

/// The VE stands still here, and goes on when this is dropped.
struct Stopped {
    session: Session,
    still: Still,
}

/// What came of sending the rest.
enum Rest {
    /// The target stands ready.
    Sent(Box<Copied>),
    /// Something passing was in the way; the VE runs and is copied on.
    NotNow(Box<Precopy>),
}

impl Stopped {
    /// Sends all that is left and waits until the target stands ready.
    async fn send_rest(self, memory: Memory) -> Result<Rest, MigrateError> {
        let Self { mut session, still } = self;
        let pipe = session.pipe.clone();
        let (mut still, sent) = spawn_blocking(move || {
            let mut still = still;
            let sent = still.send_rest(memory, &pipe);
            (still, sent)
        })
        .await?;
        if let Err(cause) = sent {
            let Some(pause) = cause.is_passing().then(|| session.vain.next()).flatten() else {
                // The VE need not wait for what the target has to say.
                drop(still);
                return Err(session.reason(cause).await);
            };
            tracing::info!(%cause, "stopped in vain; trying again");
            let live = spawn_blocking(move || still.back()).await??;
            session.pipe.lift_limit(false);
            tokio::time::sleep(pause).await;
            return Ok(Rest::NotNow(Box::new(Precopy { session, live })));
        }
        match session.talk.answer(REBUILD).await? {
            ToSource::Ready { restore_ms } => {
                still.watch.lap_without("ready", restore_ms);
                let ready_ms = ms(still.start.elapsed());
                let copied = Copied { session, still, restore_ms, ready_ms };
                Ok(Rest::Sent(Box::new(copied)))
            }
            _ => Err(MigrateError::Protocol),
        }
    }
}

/// The target could run the VE; it still is ours.
struct Copied {
    session: Session,
    still: Still,
    restore_ms: f64,
    ready_ms: f64,
}

impl Copied {
    /// Gives the VE away. What happens to it is now in the log alone.
    async fn hand_over(
        self,
        start: Instant,
        rounds: Rounds,
        keep: bool,
        sink: &Sink,
    ) -> Result<Report, MigrateError> {
        let Self { mut session, mut still, restore_ms, ready_ms } = self;
        let freeze_ms = ms(still.freeze);
        still.watch.turn("seal of a VE");
        tokio::task::block_in_place(|| still.may_seal())?;
        still.watch.lap("watchdog");
        let left = session.shelve(&still)?;
        still.watch.lap("journal");
        session.begun.settled = true;
        let (mut sealed, mut watch) = still.seal()?;
        session.operation.ve.set_leaving(true);
        watch.lap("connections");
        let frames = sealed.drain();
        watch.lap("frames");
        watch.turn("answer of a VE");
        let told = session.talk.sender.send(&ToTarget::Sealed { frames }).await;
        let answer = match told {
            Ok(()) => session.talk.answer(RUN).await,
            Err(error) => Err(error.into()),
        };
        let (total, switched) = (sealed.start.elapsed(), Instant::now());
        let total_ms = ms(total);
        let ve = session.ve();
        match answer {
            Ok(ToSource::Running { commit_ms, release_ms }) => {
                watch.lap_without("running", commit_ms + release_ms);
                let factors = {
                    let mut experience = session.begun.context.experience();
                    experience.learn(ve, rounds.predicted, total);
                    experience.of(ve)
                };
                // Without it the target expects of this VE what it does of others. One that does not
                // know the message would take none after it.
                if session.talk.version >= ToTarget::COSTS_SINCE {
                    let _ = session.talk.sender.send(&ToTarget::Costs { factors }).await;
                }
                pass_on_late_frames(&mut session.talk, &mut sealed).await
            }
            other => {
                let cause = other.err().unwrap_or(MigrateError::Protocol);
                session.settle(&mut sealed, &cause, sink).await?;
            }
        }
        let postcopy = match left {
            Some(left) => Some(session.give_out(left, switched, sink).await),
            None => None,
        };
        let bytes = session.pipe.bytes() + postcopy.map_or(0, |postcopy| postcopy.bytes);
        let names = session.names.clone();
        if let Err(error) = session.leave(sealed, keep).await {
            // The VE has moved all the same; its journal has the rest removed at the next start.
            tracing::error!(ve, "cannot remove the copy of a moved VE: {}", chain(&error));
        }
        Ok(Report {
            ve,
            source: names.0,
            target: names.1,
            rounds: rounds.reports,
            downtime_ms: Downtime {
                freeze: freeze_ms,
                delta: (ready_ms - freeze_ms - restore_ms).max(0.0),
                restore: restore_ms,
                switch: (total_ms - ready_ms).max(0.0),
                total: total_ms,
            },
            predicted_downtime_ms: ms(rounds.predicted.total),
            total_ms: ms(start.elapsed()),
            bytes,
            postcopy,
        })
    }
}

/// Switches learn slowly: what still arrives here is sent after the VE.
async fn pass_on_late_frames(talk: &mut Talk, sealed: &mut SealedVe) {
    let end = Instant::now() + TAIL;
    while Instant::now() < end {
        let frames = sealed.drain();
        if !frames.is_empty() && talk.sender.send(&ToTarget::Late { frames }).await.is_err() {
            return;
        }
        tokio::time::sleep(TAIL_STEP).await;
    }
}

impl Session {
    fn ve(&self) -> u32 {
        self.operation.ve.id.number()
    }

    /// Runs work that fills the pipe, on a thread of its own. A user who changes their mind
    /// breaks the pipe, which ends the work however slow the link is.
    async fn fill<T: Send + 'static>(
        &mut self,
        sink: &Sink,
        work: impl FnOnce(Pipe) -> T + Send + 'static,
    ) -> Result<T, MigrateError> {
        let pipe = self.pipe.clone();
        let mut working = spawn_blocking(move || work(pipe));
        tokio::select! {
            done = &mut working => Ok(done?),
            () = sink.closed() => {
                self.pump.abort();
                working.await?;
                Err(MigrateError::Cancelled)
            }
        }
    }

    /// Why the VE was not copied. A stream that broke has its reason at the other end, and the
    /// target may have told it.
    async fn reason(&mut self, error: CopyError) -> MigrateError {
        if self.pipe.is_broken()
            && let Err(told @ MigrateError::TargetFailed(_)) = self.talk.answer(LAST_WORDS).await
        {
            return told;
        }
        error.into()
    }

    /// The target's answer is missing: only the log can say what happened. Returns when the VE
    /// runs on the target; an error when it is ours again, and runs.
    async fn settle(
        &mut self,
        sealed: &mut SealedVe,
        cause: &MigrateError,
        sink: &Sink,
    ) -> Result<(), MigrateError> {
        let ve = self.ve();
        tracing::warn!(ve, %cause, "no answer from the target; asking the log");
        let coordinator = self.begun.context.coordinator();
        let mut asking = pin!(settle::ask(&coordinator, self.begun.migration));
        let verdict = loop {
            tokio::select! {
                verdict = &mut asking => break verdict,
                () = tokio::time::sleep(TELL_EVERY) => sink.log(format!(
                    "VE {ve} may have been taken over by {target}, which does not answer: \
                     waiting for the log and for {target}. VE {ve} stands still, its copy here is \
                     kept. Ctrl-C ends this wait, not the move.",
                    target = self.names.1,
                )),
            }
        };
        match verdict {
            Verdict::Moved => Ok(()),
            Verdict::Stays => {
                self.begun.context.shelves.clear(self.begun.migration);
                tokio::task::block_in_place(|| sealed.resume())?;
                self.operation.ve.set_leaving(false);
                self.begun.journal.remove().map_err(MigrateError::Inside)?;
                Err(MigrateError::Stayed { cause: chain(cause) })
            }
        }
    }

    /// The VE runs on the target: nothing of it stays here.
    async fn leave(self, sealed: SealedVe, keep: bool) -> Result<(), MigrateError> {
        let Self { begun, operation, mut talk, pump, .. } = self;
        drop(sealed);
        begun.context.runtime.leave(operation, keep).await?;
        // The target may have been told already that nothing follows.
        let _ = talk.sender.send(&ToTarget::Finished).await;
        pump.abort();
        settle::finish(&begun.context.coordinator(), begun.migration).await;
        Ok(())
    }
}

/// Milliseconds with their fraction.
fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}
