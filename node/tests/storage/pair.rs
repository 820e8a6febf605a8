//! Two containers over one template: the source of the files and their target.

use std::{
    fs::{self, File},
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    path::{Path, PathBuf},
    process::Command,
};

use ckpt_engine::{
    container::{Container, Layers, Spec, Tree, capture},
    sys::namespace::as_user,
};
use ckpt_format::{codec, container::Container as Plan, tree::FileRecord};
use node::storage::{
    FileApplier, FileRound, FileTracker, MappedFiles, SourceTree, TreeError, source_trees,
    target_trees,
};

/// A container whose pid 1 does nothing, and its files.
pub(crate) struct Side {
    pub(crate) container: Container,
    pub(crate) id_base: u32,
    pub(crate) upper: PathBuf,
}

/// Both sides with what moves files from one to the other. Kept in the order in which it must go.
pub(crate) struct Pair {
    pub(crate) tracker: FileTracker,
    pub(crate) applier: Option<FileApplier>,
    pub(crate) source: Side,
    pub(crate) target: Side,
    pub(crate) mapped: MappedFiles,
    /// The numbers of the trees.
    pub(crate) numbers: Vec<usize>,
    pub(crate) directory: tempfile::TempDir,
}

impl Pair {
    /// Makes both sides; `fill` makes the template.
    pub(crate) fn new(fill: impl FnOnce(&Path)) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let lower = directory.path().join("lower");
        for name in ["proc", "sys", "dev", "run", "tmp"] {
            fs::create_dir_all(lower.join(name)).unwrap();
        }
        fill(&lower);
        let source = Side::new(directory.path(), "source", 1_000_000, Plan::fresh("ve"));
        let plan = source.plan();
        let mut target = Side::new(directory.path(), "target", 2_000_000, plan.clone());
        let trees = source.trees(&plan);
        let tracker = FileTracker::new(trees);
        let numbers = target.container.trees.iter().map(number).collect();
        let trees = std::mem::take(&mut target.container.trees);
        let copies = trees
            .iter()
            .map(|tree| Tree {
                filesystem: tree.filesystem,
                part: tree.part,
                mount: tree.mount.try_clone().unwrap(),
            })
            .collect();
        target.container.trees = trees;
        let applier = FileApplier::new(target_trees(&plan, copies), target.id_base).unwrap();
        let mapped = MappedFiles::new();
        Self { tracker, applier: Some(applier), source, target, mapped, numbers, directory }
    }

    /// One round, and waits until the target has it.
    pub(crate) fn round(&mut self, last: bool) -> Result<FileRound, TreeError> {
        let mut failure = None;
        let applier = self.applier.as_mut().unwrap();
        let sink = &mut |record: FileRecord| {
            // What arrives is what went through the codec.
            let record = codec::decode(&codec::encode(&record)).unwrap();
            if std::env::var_os("SHOW_RECORDS").is_some() {
                eprintln!("{}", brief(&record));
            }
            applier.apply(record).map_err(|error| {
                failure = Some(error);
                node::storage::SinkClosed
            })
        };
        let round = self.tracker.round(&self.mapped, last, sink);
        if let Some(error) = failure {
            return Err(error);
        }
        let round = round?;
        self.applier().flush()?;
        Ok(round)
    }

    pub(crate) fn applier(&mut self) -> &mut FileApplier {
        self.applier.as_mut().unwrap()
    }

    pub(crate) fn finish(&mut self) -> Result<(), TreeError> {
        self.applier.take().unwrap().finish()
    }
}

fn brief(record: &FileRecord) -> String {
    let mut text = format!("{record:?}");
    let mut end = text.len().min(300);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.truncate(end);
    text
}

/// The number of a tree in the records.
fn number(tree: &Tree) -> usize {
    tree.part.map_or(0, |part| part + 1)
}

impl Side {
    fn new(directory: &Path, name: &str, id_base: u32, plan: Plan) -> Self {
        let store = directory.join(name);
        fs::create_dir_all(store.join("upper")).unwrap();
        fs::create_dir_all(store.join("work")).unwrap();
        let spec = Spec {
            plan,
            links: Vec::new(),
            id_base,
            clock_offsets: None,
            layers: Layers {
                lower: directory.join("lower"),
                upper: store.join("upper"),
                work: store.join("work"),
            },
            cgroups: Vec::new(),
        };
        let mut seed = Command::new(env!("CARGO_BIN_EXE_vzd"));
        seed.arg(node::ve::SEED_ARGUMENT);
        let container = Container::create(&spec, seed).unwrap();
        Self { container, id_base, upper: store.join("upper") }
    }

    /// What its container looks like.
    pub(crate) fn plan(&self) -> Plan {
        let init = self.container.init;
        capture(init, &[init]).unwrap().unwrap().plan
    }

    pub(crate) fn trees(&self, plan: &Plan) -> Vec<SourceTree> {
        let mounts = File::open(format!("/proc/{}/ns/mnt", self.container.init)).unwrap();
        source_trees(&[mounts.into()], plan, &self.upper, self.id_base).unwrap()
    }

    /// The number of the tree of this file system of the plan.
    pub(crate) fn tree_of(&self, filesystem: u32) -> usize {
        let mut trees = self.container.trees.iter();
        let tree = trees.find(|tree| u32::try_from(tree.filesystem) == Ok(filesystem));
        number(tree.unwrap())
    }

    /// A tree by its number; 0 is the VE's own files.
    pub(crate) fn mount(&self, wanted: usize) -> &OwnedFd {
        let tree = self.container.trees.iter().find(|tree| number(tree) == wanted);
        &tree.unwrap().mount
    }

    pub(crate) fn path(&self, tree: usize) -> PathBuf {
        format!("/proc/self/fd/{}", self.mount(tree).as_fd().as_raw_fd()).into()
    }

    /// Runs `work` as root of the VE, with the path of a tree.
    pub(crate) fn inside<T: Send>(
        &self,
        tree: usize,
        work: impl FnOnce(&Path) -> io::Result<T> + Send,
    ) -> T {
        let path = self.path(tree);
        as_user(self.id_base, || work(&path)).unwrap()
    }
}
