//! The target: carries missing pages from the source to the keeper.

use std::{
    collections::HashMap,
    os::fd::{AsFd, OwnedFd},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use ckpt_engine::{
    container::ended,
    lazy::{Client, FromKeeper},
};
use ckpt_format::{
    memory::{Run, Space},
    stream::Record,
};
use coordinator::MigrationId;
use tokio::sync::mpsc;
use transport::{ControlSender, LinkError, NodeId, Service};

use super::{Answer, Question, keeper, keeper::Kept};
use crate::{
    api::chain,
    migration::{
        journal::{Journal, Step},
        messages::Item,
        packing,
        source::Context,
        target::report_running,
    },
    ve::Ve,
};

/// How long a VE waits for a source that is not heard of before it is ended.
pub(in crate::migration) const PATIENCE: Duration = Duration::from_secs(120);
/// Between two attempts to reach the source.
const PAUSE: Duration = Duration::from_millis(200);

/// One VE that runs here and whose memory is not complete yet.
#[derive(Debug)]
pub(in crate::migration) struct Fetch {
    pub(in crate::migration) context: Context,
    pub(in crate::migration) migration: MigrationId,
    pub(in crate::migration) ve: Arc<Ve>,
    pub(in crate::migration) source: NodeId,
}

/// How it came out.
#[derive(Debug)]
enum Outcome {
    /// Everything is here.
    Complete { faults: u64 },
    /// The VE has ended itself, or was stopped.
    Ended,
    /// What is missing will never come.
    Lost { cause: &'static str },
}

/// How one link to the source ended.
#[derive(Debug)]
enum Carried {
    /// The whole fetch has ended.
    Over(Outcome),
    /// The link broke.
    Broken(LinkError),
}

impl Fetch {
    /// Fetches until nothing is missing, and tells the log then. If what is missing is lost, the VE
    /// is ended: it never runs with wrong memory.
    pub(in crate::migration) async fn run(self, kept: Kept) {
        let start = Instant::now();
        let (ve, bytes) = (self.ve.id, kept.bytes);
        self.ve.set_missing(Some(kept.bytes));
        let mut talk = match Talk::start(kept.client) {
            Ok(talk) => talk,
            Err(error) => {
                tracing::error!(%ve, %error, "cannot talk to the keeper of a VE's memory");
                self.end("this node cannot reach the keeper of its memory").await;
                return self.settle().await;
            }
        };
        match self.fetch(&mut talk).await {
            Outcome::Complete { faults } => {
                tracing::info!(
                    %ve,
                    faults,
                    mebibytes = bytes >> 20,
                    ms = start.elapsed().as_millis() as u64,
                    "all memory has come"
                );
                drop(kept.faults);
                talk.close_faults();
                // From here on nobody asks for the keeper any more.
                let journal = Journal::new(self.ve.directory());
                if let Err(error) = journal.write(self.migration, Step::Released) {
                    tracing::error!(%ve, %error, "cannot write the journal of a migration");
                }
                talk.tell(Word::Bye);
            }
            Outcome::Ended => tracing::info!(%ve, "ended before all its memory had come"),
            Outcome::Lost { cause } => {
                self.end(cause).await;
                // Only now: up to here threads that touch missing pages wait.
                drop(kept.faults);
                talk.close_faults();
            }
        }
        self.settle().await;
    }

    /// The same after a daemon has died in it.
    pub(in crate::migration) async fn resume(self) {
        match keeper::connect(self.ve.directory()) {
            Ok(client) => {
                let bytes = self.ve.missing().unwrap_or(0);
                self.run(Kept { client, faults: Vec::new(), bytes }).await;
            }
            Err(error) => {
                tracing::error!(ve = %self.ve.id, %error, "cannot reach the keeper of a VE's memory");
                if matches!(self.keeper_ended(), Outcome::Lost { .. }) {
                    self.end("the keeper of its memory has died").await;
                }
                self.settle().await;
            }
        }
    }

    /// The source is not needed any more.
    async fn settle(self) {
        let journal = Journal::new(self.ve.directory());
        report_running(&self.context.coordinator(), self.migration, &journal).await;
        keeper::remove(self.ve.directory());
        self.ve.set_missing(None);
    }

    async fn end(&self, cause: &'static str) {
        let ve = self.ve.id;
        let source = self.source_name();
        let missing = self.ve.missing().unwrap_or(0) >> 20;
        tracing::error!(
            %ve,
            "VE {ve} is ended: {missing} MiB of its memory were still to come from {source}, and \
             {cause}"
        );
        if let Err(error) = self.context.runtime.kill(&self.ve).await {
            tracing::error!(%ve, "cannot end a VE without its memory: {}", chain(&error));
        }
    }

    fn source_name(&self) -> String {
        let state = self.context.coordinator().state();
        state.node_name(self.source).unwrap_or("the source").to_owned()
    }

    async fn fetch(&self, talk: &mut Talk) -> Outcome {
        let mut heard = Instant::now();
        let mut told = false;
        loop {
            let broken = match self.carry(talk, &mut heard).await {
                Carried::Over(outcome) => return outcome,
                Carried::Broken(error) => error,
            };
            if !told {
                let source = self.source_name();
                tracing::warn!(
                    ve = %self.ve.id, %source, error = %broken,
                    "the source of missing memory is not there; trying again"
                );
                told = true;
            }
            if heard.elapsed() > PATIENCE {
                return Outcome::Lost { cause: "the source was not heard of for too long" };
            }
            if let Some(outcome) = self.listen(talk).await {
                return outcome;
            }
        }
    }

    /// Hears the keeper between two attempts. What it wants now, it wants again later.
    async fn listen(&self, talk: &mut Talk) -> Option<Outcome> {
        let end = tokio::time::Instant::now() + PAUSE;
        while let Ok(word) = tokio::time::timeout_at(end, talk.words.recv()).await {
            let Some(word) = word else { return Some(self.keeper_ended()) };
            let outcome = self.note(&word);
            if outcome.is_some() {
                return outcome;
            }
        }
        None
    }

    /// Carries pages over one link.
    async fn carry(&self, talk: &mut Talk, heard: &mut Instant) -> Carried {
        match self.carry_on(talk, heard).await {
            Ok(outcome) => Carried::Over(outcome),
            Err(error) => Carried::Broken(error),
        }
    }

    async fn carry_on(&self, talk: &mut Talk, heard: &mut Instant) -> Result<Outcome, LinkError> {
        let Some(peer) = self.context.cluster.peer(self.source) else {
            return Err(LinkError::Closed);
        };
        let link = match peer.link(Service::Pages).await {
            Ok(link) => link,
            Err(error) => return Err(LinkError::Lost { cause: error.to_string() }),
        };
        let (mut sender, mut receiver) = link.control.split();
        sender.send(&Question::Fetch { migration: self.migration }).await?;
        match receiver.recv::<Answer>().await? {
            Answer::Serving => {}
            Answer::Gone => return Ok(GONE),
            Answer::Able | Answer::Unable { .. } => return Err(LinkError::Closed),
        }
        let mut stream = link.bulk.accept().await?;
        talk.tell(Word::Begin);
        loop {
            *heard = Instant::now();
            tokio::select! {
                word = talk.words.recv() => {
                    let Some(word) = word else { return Ok(self.keeper_ended()) };
                    let outcome = self.note(&word);
                    if let FromKeeper::Want { pid, run, urgent } = word {
                        sender.send(&Question::Want { pid, run, urgent }).await?;
                    }
                    if let Some(outcome) = outcome {
                        tell_source(&mut sender, &outcome).await;
                        return Ok(outcome);
                    }
                }
                piece = stream.recv() => {
                    let Some(bytes) = piece? else { return Err(LinkError::Closed) };
                    match packing::unpack(bytes) {
                        Ok(Item::Memory(record)) => talk.pass_on(record),
                        Ok(Item::Postcopy) => {}
                        Ok(_) => return Err(LinkError::Closed),
                        Err(error) => {
                            tracing::warn!(%error, "a damaged piece of memory; asking again");
                            return Err(LinkError::Closed);
                        }
                    }
                }
                answer = receiver.recv::<Answer>() => match answer? {
                    Answer::Gone => return Ok(GONE),
                    _ => return Err(LinkError::Closed),
                },
            }
        }
    }

    /// What the keeper says, but for what it wants.
    fn note(&self, word: &FromKeeper) -> Option<Outcome> {
        match *word {
            FromKeeper::Left { bytes, .. } => {
                self.ve.set_missing(Some(bytes));
                None
            }
            FromKeeper::Complete { faults } => Some(Outcome::Complete { faults }),
            FromKeeper::Added
            | FromKeeper::Want { .. }
            | FromKeeper::Held { .. }
            | FromKeeper::Gone { .. } => None,
        }
    }

    /// The keeper ends when the VE has ended, and else only by force.
    fn keeper_ended(&self) -> Outcome {
        match self.ve.running() {
            Some(running) if !ended(running.pidfd.as_fd()) => {
                Outcome::Lost { cause: "the keeper of its memory has died" }
            }
            _ => Outcome::Ended,
        }
    }
}

const GONE: Outcome = Outcome::Lost { cause: "the source does not have them any more" };

/// It learns it from the log as well.
async fn tell_source(sender: &mut ControlSender, outcome: &Outcome) {
    let told = match *outcome {
        Outcome::Complete { faults } => sender.send(&Question::Complete { faults }).await,
        Outcome::Ended | Outcome::Lost { .. } => sender.send(&Question::Ended).await,
    };
    if let Err(error) = told {
        tracing::debug!(%error, "the source was not told that nothing is missing any more");
    }
}

/// What the keeper is told.
enum Word {
    Begin,
    Pages { pid: i32, runs: Vec<Run>, data: bytes::Bytes },
    Bye,
}

/// The two threads that talk to the keeper, whose socket blocks.
struct Talk {
    words: mpsc::UnboundedReceiver<FromKeeper>,
    /// The userfaultfds that the keeper has passed on.
    held: Arc<Mutex<HashMap<u64, OwnedFd>>>,
    tell: mpsc::UnboundedSender<Word>,
}

impl Talk {
    fn start(client: Client) -> std::io::Result<Self> {
        let mut receiver = client.receiver()?;
        let (heard, words) = mpsc::unbounded_channel();
        let held = Arc::<Mutex<HashMap<u64, OwnedFd>>>::default();
        let holding = held.clone();
        std::thread::Builder::new().name("keeper-hear".into()).spawn(move || {
            while let Ok(Some((word, beside))) = receiver.hear() {
                hold(&holding, &word, beside);
                if heard.send(word).is_err() {
                    break;
                }
            }
        })?;
        // Bounded by what the keeper has asked for.
        let (tell, queue) = mpsc::unbounded_channel();
        std::thread::Builder::new()
            .name("keeper-tell".into())
            .spawn(move || tell_all(client, queue))?;
        Ok(Self { words, held, tell })
    }

    fn close_faults(&self) {
        self.held.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    fn tell(&self, word: Word) {
        // A keeper that has ended is noticed where it is heard.
        let _ = self.tell.send(word);
    }

    fn pass_on(&self, record: Record) {
        match record {
            Record::Pages { space: Space::Process(pid), runs, data } => {
                self.tell(Word::Pages { pid, runs, data });
            }
            Record::Drop { space: Space::Process(pid), runs } => {
                self.tell(Word::Pages { pid, runs, data: bytes::Bytes::new() });
            }
            _ => {}
        }
    }
}

/// Holds what came beside a word for as long as the keeper does.
fn hold(held: &Mutex<HashMap<u64, OwnedFd>>, word: &FromKeeper, beside: Option<OwnedFd>) {
    let mut held = held.lock().unwrap_or_else(PoisonError::into_inner);
    match (word, beside) {
        (FromKeeper::Held { id }, Some(descriptor)) => drop(held.insert(*id, descriptor)),
        (FromKeeper::Gone { id }, _) => drop(held.remove(id)),
        _ => {}
    }
}

fn tell_all(mut client: Client, mut queue: mpsc::UnboundedReceiver<Word>) {
    while let Some(word) = queue.blocking_recv() {
        let told = match word {
            Word::Begin => client.begin(),
            Word::Pages { pid, runs, data } => client.pages(pid, runs, data),
            Word::Bye => client.bye(),
        };
        if let Err(error) = told {
            tracing::info!(%error, "the keeper of a VE's memory takes nothing any more");
            break;
        }
    }
    // The one who listens must not wait for a keeper that nobody talks to.
    if let Err(error) = client.close() {
        tracing::debug!(%error, "the keeper had gone already");
    }
}
