//! Connections that write, read and check at a steady rate, each on a thread of its own.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::latency::{Histogram, Series};
use super::record::{difference, mix, value};
use super::resp::{Connection, Reply, ReplyError};

/// What the load looks like.
#[derive(Clone, Debug)]
pub struct LoadPlan {
    /// The server.
    pub address: SocketAddr,
    /// A number of this run, so that its keys are not those of an earlier run.
    pub run: u64,
    /// Connections, each with keys of its own.
    pub connections: u64,
    /// Requests that each connection makes in a second.
    pub requests_per_second: u32,
    /// Bytes of a value.
    pub value_bytes: usize,
    /// Keys of each connection.
    pub keys: u64,
    /// How long a reply may take before the connection counts as lost.
    pub patience: Duration,
    /// The dataset that was filled before, for reads all over it.
    pub dataset: Dataset,
}

/// Keys filled once and never changed again.
#[derive(Clone, Copy, Debug, Default)]
pub struct Dataset {
    /// Number of keys.
    pub keys: u64,
}

/// The writer number of the dataset's values.
const DATASET_WRITER: u64 = u64::MAX;
const DATASET_VALUE_BYTES: usize = 4096;
const BATCH: u64 = 64;

impl Dataset {
    /// A dataset of about this many MiB.
    pub fn of_mib(mib: u64) -> Self {
        Self { keys: mib * ((1 << 20) / DATASET_VALUE_BYTES as u64) }
    }

    /// Writes all of it, in batches.
    pub fn fill(&self, connection: &mut Connection) -> Result<(), ReplyError> {
        for start in (0..self.keys).step_by(BATCH as usize) {
            let end = (start + BATCH).min(self.keys);
            for key in start..end {
                let content = value(DATASET_WRITER, key, 0, DATASET_VALUE_BYTES);
                connection.push(&[b"SET", format!("dataset:{key}").as_bytes(), &content]);
            }
            connection.flush()?;
            for _ in start..end {
                connection.reply()?;
            }
        }
        Ok(())
    }

    /// Reads all of it and returns the keys that are wrong, with what is wrong.
    pub fn verify(&self, connection: &mut Connection) -> Result<Vec<String>, ReplyError> {
        let mut wrong = Vec::new();
        for start in (0..self.keys).step_by(BATCH as usize) {
            let end = (start + BATCH).min(self.keys);
            for key in start..end {
                connection.push(&[b"GET", format!("dataset:{key}").as_bytes()]);
            }
            connection.flush()?;
            for key in start..end {
                let reply = connection.reply()?;
                if let Some(problem) = Self::check(key, &reply) {
                    wrong.push(format!("dataset:{key}: {problem}"));
                }
            }
        }
        Ok(wrong)
    }

    fn check(key: u64, reply: &Reply) -> Option<String> {
        check_value(&value(DATASET_WRITER, key, 0, DATASET_VALUE_BYTES), reply)
    }
}

fn check_value(expected: &[u8], reply: &Reply) -> Option<String> {
    match reply {
        Reply::Value(found) => difference(expected, found.as_deref()),
        other => Some(format!("an answer of another kind: {other:?}")),
    }
}

/// What one connection counted since the last mark.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    /// How long the requests took.
    pub latencies: Histogram,
    /// Requests that the server refused.
    pub errors: u64,
    /// Answers that were not what the connection knows to be right.
    pub wrong_answers: u64,
    /// Connections that ended.
    pub lost_connections: u64,
    /// What was wrong, the first few.
    pub complaints: Vec<String>,
}

const COMPLAINTS_MAX: usize = 20;

impl Tally {
    /// Adds all that another tally counted.
    pub fn merge(&mut self, other: &Self) {
        self.latencies.merge(&other.latencies);
        self.errors += other.errors;
        self.wrong_answers += other.wrong_answers;
        self.lost_connections += other.lost_connections;
        let room = COMPLAINTS_MAX.saturating_sub(self.complaints.len());
        self.complaints.extend(other.complaints.iter().take(room).cloned());
    }

    /// Whether every request was answered and every answer was right.
    pub fn is_clean(&self) -> bool {
        self.errors + self.wrong_answers + self.lost_connections == 0
    }

    fn complain(&mut self, what: String) {
        if self.complaints.len() < COMPLAINTS_MAX {
            self.complaints.push(what);
        }
    }
}

#[derive(Debug, Default)]
struct Shared {
    tally: Tally,
    series: Series,
    waiting_since: Option<Instant>,
}

/// Running connections.
#[derive(Debug)]
pub struct Load {
    stop: Arc<AtomicBool>,
    workers: Vec<(Arc<Mutex<Shared>>, JoinHandle<()>)>,
}

impl Load {
    /// Opens all connections, then starts them.
    pub fn start(plan: &LoadPlan, epoch: Instant) -> Result<Self, ReplyError> {
        let mut connections = Vec::new();
        for _ in 0..plan.connections {
            connections.push(Connection::open(plan.address, plan.patience)?);
        }
        let stop = Arc::new(AtomicBool::new(false));
        let mut workers = Vec::new();
        for (connection, writer) in connections.into_iter().zip(0..) {
            let shared = Arc::new(Mutex::new(Shared::default()));
            let worker = Worker {
                plan: plan.clone(),
                writer,
                epoch,
                written: vec![0; usize::try_from(plan.keys).unwrap_or(0)],
                counter: 0,
                shared: Arc::clone(&shared),
            };
            let stop = Arc::clone(&stop);
            workers.push((shared, std::thread::spawn(move || worker.run(connection, &stop))));
        }
        Ok(Self { stop, workers })
    }

    /// Takes what was counted since the last call. A request still waiting counts with the time
    /// that it has waited so far.
    pub fn take_tally(&self) -> Tally {
        self.sum_tallies(std::mem::take)
    }

    /// What was counted since the last [`take_tally`](Self::take_tally), which stays there.
    pub fn peek_tally(&self) -> Tally {
        self.sum_tallies(|tally| tally.clone())
    }

    fn sum_tallies(&self, read: impl Fn(&mut Tally) -> Tally) -> Tally {
        let mut sum = Tally::default();
        let mut waiting = Duration::ZERO;
        for (shared, _) in &self.workers {
            let mut shared = shared.lock().unwrap_or_else(PoisonError::into_inner);
            sum.merge(&read(&mut shared.tally));
            let since = shared.waiting_since.map_or(Duration::ZERO, |since| since.elapsed());
            waiting = waiting.max(since);
        }
        // It will be counted as a request when its answer comes; here it only lengthens the stall.
        sum.latencies.note_waiting(waiting);
        sum
    }

    /// The latencies of all connections over time.
    pub fn series(&self) -> Series {
        let mut sum = Series::default();
        for (shared, _) in &self.workers {
            sum.merge(&shared.lock().unwrap_or_else(PoisonError::into_inner).series);
        }
        sum
    }

    /// Whether all connections have ended, each for its own reason.
    pub fn is_over(&self) -> bool {
        self.workers.iter().all(|(_, thread)| thread.is_finished())
    }

    /// Lets every connection finish its request and end.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
        while !self.is_over() {
            std::thread::park_timeout(Duration::from_millis(1));
        }
    }
}

struct Worker {
    plan: LoadPlan,
    writer: u64,
    epoch: Instant,
    /// For each key, how often it was written.
    written: Vec<u64>,
    counter: i64,
    shared: Arc<Mutex<Shared>>,
}

/// One step of the load, chosen in turn.
enum Step {
    Write,
    Read,
    Count,
    ReadDataset,
}

impl Worker {
    fn run(mut self, mut connection: Connection, stop: &AtomicBool) {
        let pause = Duration::from_secs(1) / self.plan.requests_per_second.max(1);
        let mut random = mix(self.writer);
        let mut due = Instant::now();
        while !stop.load(Ordering::Relaxed) {
            random = mix(random);
            let step = match random % 8 {
                0..=2 => Step::Write,
                3..=5 => Step::Read,
                6 => Step::Count,
                _ if self.plan.dataset.keys > 0 => Step::ReadDataset,
                _ => Step::Read,
            };
            if !self.request(&mut connection, &step, mix(random)) {
                return;
            }
            due = (due + pause).max(Instant::now());
            let wait = due.saturating_duration_since(Instant::now());
            if !wait.is_zero() {
                std::thread::sleep(wait);
            }
        }
    }

    /// Makes one request and judges the answer. False when the connection is lost.
    fn request(&mut self, connection: &mut Connection, step: &Step, random: u64) -> bool {
        let key = random % self.plan.keys.max(1);
        let index = usize::try_from(key).unwrap_or(0);
        let name = format!("load:{}:{}:{key}", self.plan.run, self.writer);
        let content = value(
            self.writer,
            key,
            self.written.get(index).copied().unwrap_or(0) + u64::from(matches!(step, Step::Write)),
            self.plan.value_bytes,
        );
        let dataset_key = random % self.plan.dataset.keys.max(1);
        let dataset_name = format!("dataset:{dataset_key}");
        let counter = format!("count:{}:{}", self.plan.run, self.writer);
        let words: Vec<&[u8]> = match step {
            Step::Write => vec![b"SET", name.as_bytes(), &content],
            Step::Read => vec![b"GET", name.as_bytes()],
            Step::Count => vec![b"INCR", counter.as_bytes()],
            Step::ReadDataset => vec![b"GET", dataset_name.as_bytes()],
        };
        let (answer, began) = self.ask(connection, &words);
        let problem = match (&answer, step) {
            (Err(_), _) => None,
            (Ok(reply), Step::Write) => {
                if let Some(count) = self.written.get_mut(index) {
                    *count += 1;
                }
                (*reply != Reply::Status("OK".into())).then(|| format!("SET {name}: {reply:?}"))
            }
            (Ok(reply), Step::Read) if self.written.get(index) == Some(&0) => (*reply
                != Reply::Value(None))
            .then(|| format!("{name} exists before its first write")),
            (Ok(reply), Step::Read) => {
                check_value(&content, reply).map(|what| format!("{name}: {what}"))
            }
            (Ok(reply), Step::Count) => self.check_count(&counter, reply),
            (Ok(reply), Step::ReadDataset) => {
                Dataset::check(dataset_key, reply).map(|what| format!("{dataset_name}: {what}"))
            }
        };
        self.note(answer, began, problem)
    }

    fn ask(
        &self,
        connection: &mut Connection,
        words: &[&[u8]],
    ) -> (Result<Reply, ReplyError>, Instant) {
        let began = Instant::now();
        self.shared.lock().unwrap_or_else(PoisonError::into_inner).waiting_since = Some(began);
        (connection.ask(words), began)
    }

    /// A request carried out twice or not at all shows in the counter.
    fn check_count(&mut self, name: &str, reply: &Reply) -> Option<String> {
        let Reply::Integer(found) = reply else { return Some(format!("INCR {name}: {reply:?}")) };
        let expected = self.counter + 1;
        self.counter = *found;
        (expected != *found).then(|| format!("INCR {name}: {found} instead of {expected}"))
    }

    fn note(
        &self,
        answer: Result<Reply, ReplyError>,
        began: Instant,
        problem: Option<String>,
    ) -> bool {
        let latency = began.elapsed();
        let mut shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        shared.waiting_since = None;
        shared.tally.latencies.add(latency);
        shared.series.add(self.epoch.elapsed(), latency);
        if let Some(problem) = problem {
            shared.tally.wrong_answers += 1;
            shared.tally.complain(problem);
        }
        match answer {
            Ok(_) => true,
            Err(ReplyError::Refused { message }) => {
                shared.tally.errors += 1;
                shared.tally.complain(message);
                true
            }
            Err(error) => {
                shared.tally.lost_connections += 1;
                let cause = std::error::Error::source(&error).map(|cause| format!(": {cause}"));
                let what =
                    format!("connection {}: {error}{}", self.writer, cause.unwrap_or_default());
                shared.tally.complain(what);
                false
            }
        }
    }
}

#[cfg(test)]
mod tests;
