//! The target's side: takes the records as orders and makes the same trees.
//!
//! The work is done by a thread of its own, as the user that root inside the VE is on the host:
//! files made by anybody else could not be expressed on the VE's mounts. Records are checked
//! before anything is touched, and no path leaves its tree.

use std::{
    os::fd::OwnedFd,
    sync::mpsc::{Receiver, SyncSender, sync_channel},
    thread::JoinHandle,
};

use ckpt_engine::sys::namespace::become_user;
use ckpt_format::tree::FileRecord;
use tracing::warn;

use super::{
    attributes::Ids,
    check::check,
    error::{TreeError, at, show},
    limits::Raised,
    make::Maker,
};

/// How many records may wait; with [`FILE_DATA_MAX`](ckpt_format::tree::FILE_DATA_MAX) this
/// bounds the memory.
const WAITING_MAX: usize = 8;

/// A tree of a VE that is being made here.
#[derive(Debug)]
pub struct TargetTree {
    /// Its number in the records.
    pub number: u32,
    /// All of it, without what is mounted in it.
    pub top: OwnedFd,
    /// The places in it that something of the VE is mounted on. They are never removed: the
    /// kernel would take the mount away with its place.
    pub mount_points: Vec<Vec<u8>>,
    /// Nothing in it can be changed once it is complete.
    pub read_only: bool,
}

/// Makes the files of a VE as records tell.
#[derive(Debug)]
pub struct FileApplier {
    orders: Option<SyncSender<Order>>,
    failed: bool,
    answers: Receiver<Result<(), TreeError>>,
    thread: Option<JoinHandle<()>>,
}

enum Order {
    Apply(Box<FileRecord>),
    Flush,
    Finish,
}

impl FileApplier {
    /// Starts on the trees of a container whose ids begin at `id_base`.
    pub fn new(trees: Vec<TargetTree>, id_base: u32) -> Result<Self, TreeError> {
        let (orders, receiver) = sync_channel(WAITING_MAX);
        let (answer, answers) = sync_channel(1);
        let work = move || {
            let mut worker = Worker { makers: Vec::new(), raised: Raised::default(), answer };
            worker.run(trees, id_base, &receiver);
        };
        let thread = std::thread::Builder::new()
            .name("files".to_owned())
            .spawn(work)
            .map_err(at("start a thread for", b""))?;
        let mut this = Self { orders: Some(orders), failed: false, answers, thread: Some(thread) };
        // The thread must have become the VE's root before anything is promised.
        this.flush()?;
        Ok(this)
    }

    /// Takes a record. It is carried out later, in the order of the calls; an error may be about
    /// an earlier record. After an error nothing more is done.
    pub fn apply(&mut self, record: FileRecord) -> Result<(), TreeError> {
        if let Ok(Err(error)) = self.answers.try_recv() {
            self.failed = true;
            return Err(error);
        }
        self.order(Order::Apply(Box::new(record)))
    }

    /// Waits until all records are carried out.
    pub fn flush(&mut self) -> Result<(), TreeError> {
        self.answer_to(Order::Flush)
    }

    /// Waits until all records are carried out and ends the work: each tmpfs has its own limits
    /// again. To be called before the VE runs.
    pub fn finish(mut self) -> Result<(), TreeError> {
        self.answer_to(Order::Finish)
    }

    fn answer_to(&mut self, order: Order) -> Result<(), TreeError> {
        self.order(order)?;
        match self.answers.recv() {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => {
                self.failed = true;
                Err(error)
            }
            Err(_) => Err(TreeError::Stopped),
        }
    }

    fn order(&mut self, order: Order) -> Result<(), TreeError> {
        let sent = match &self.orders {
            Some(orders) if !self.failed => orders.send(order).is_ok(),
            _ => false,
        };
        if sent {
            return Ok(());
        }
        // The thread ends only after an error; this may be the first to hear of it.
        match self.answers.try_recv() {
            Ok(Err(error)) if !self.failed => {
                self.failed = true;
                Err(error)
            }
            _ => Err(TreeError::Stopped),
        }
    }
}

impl Drop for FileApplier {
    fn drop(&mut self) {
        self.orders = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            warn!("the thread that makes a VE's files has panicked");
        }
    }
}

/// The other end of a [`FileApplier`].
struct Worker {
    makers: Vec<(u32, Maker)>,
    raised: Raised,
    answer: SyncSender<Result<(), TreeError>>,
}

impl Worker {
    fn run(&mut self, trees: Vec<TargetTree>, id_base: u32, orders: &Receiver<Order>) {
        let mut result = self.start(trees, id_base);
        while result.is_ok() {
            result = match orders.recv() {
                Ok(Order::Apply(record)) => self.apply(*record),
                Ok(Order::Flush) => self.answer.send(Ok(())).map_err(|_| TreeError::Closed),
                Ok(Order::Finish) => {
                    let raised = &mut self.raised;
                    let mut makers = self.makers.iter_mut();
                    let done = makers.try_for_each(|(_, maker)| maker.finish(raised));
                    let _ = self.answer.send(done);
                    return;
                }
                // The container goes, or is kept as it is.
                Err(_) => return,
            };
        }
        // Nobody may be listening any more; then nobody misses it.
        let _ = self.answer.send(result);
    }

    fn start(&mut self, trees: Vec<TargetTree>, id_base: u32) -> Result<(), TreeError> {
        become_user(id_base).map_err(at("become the owner of", b""))?;
        for tree in trees {
            self.raised.raise(&tree.top).map_err(at("make room in", b""))?;
            let number = tree.number;
            self.makers.push((number, Maker::new(tree, Ids { base: id_base })));
        }
        Ok(())
    }

    fn apply(&mut self, record: FileRecord) -> Result<(), TreeError> {
        check(&record.step)?;
        let maker = self.makers.iter_mut().find(|(number, _)| *number == record.tree);
        let Some((_, maker)) = maker else {
            return Err(TreeError::Refused { path: show(b""), reason: "a tree that the VE lacks" });
        };
        maker.step(record.step)
    }
}
