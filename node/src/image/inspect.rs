//! What there is to tell about a checkpoint file.

use std::{
    collections::BTreeMap,
    fmt::{self, Write as _},
    path::Path,
};

use ckpt_format::{
    files,
    image::{OwnFiles, Record, Summary},
    memory::{PAGE, Run, Space},
    process::Layout,
    state::State,
    stream,
};
use serde::{Deserialize, Serialize};

use super::{Image, ImageFileError};

/// What `vzckpt inspect` tells.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inspection {
    /// The version of the format.
    pub version: u32,
    /// What wrote it.
    pub writer: String,
    /// When, in seconds since 1970.
    pub created_s: u64,
    /// How long the file is, in bytes.
    pub file_bytes: u64,
    /// How many chunks it has.
    pub chunks: u64,
    /// The number of the VE.
    pub ve: u32,
    /// Its host name.
    pub hostname: String,
    /// Its addresses.
    pub addresses: Vec<String>,
    /// The digest of its template.
    pub template: String,
    /// The kernel that it ran on.
    pub kernel: String,
    /// Whether all of its own files are in it.
    pub with_files: bool,
    /// How many of its own files it only lists.
    pub listed_files: u64,
    /// How much of everything there is.
    pub summary: Summary,
    /// Its processes.
    pub processes: Vec<InspectedProcess>,
    /// Open files by kind.
    pub open_files: BTreeMap<String, u64>,
}

/// A process in a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InspectedProcess {
    /// Its number in the VE.
    pub pid: i32,
    /// Its parent's.
    pub parent: i32,
    /// Its name.
    pub command: String,
    /// The user that it runs as.
    pub uid: u32,
    /// How many threads it has; none for a zombie.
    pub threads: u64,
    /// How many descriptors.
    pub descriptors: u64,
    /// How many areas its memory has.
    pub areas: u64,
    /// How much of its own memory is in the file, in bytes.
    pub memory_bytes: u64,
}

impl Inspection {
    /// Reads a file, and verifies all of it on the way.
    pub fn of(path: &Path, progress: &mut dyn FnMut(u64, u64)) -> Result<Self, ImageFileError> {
        let image = Image::open(path)?;
        let mut seen = Seen::default();
        image.verify(progress, &mut |record| {
            seen.take(record);
            Ok(())
        })?;
        let (header, manifest) = (image.header(), image.manifest());
        let state = seen.state.unwrap_or_default();
        Ok(Self {
            version: ckpt_format::image::VERSION,
            writer: header.writer.clone(),
            created_s: header.created_s,
            file_bytes: header.file_len,
            chunks: header.chunks,
            ve: manifest.ve,
            hostname: manifest.container.hostname.clone(),
            addresses: manifest
                .network
                .addresses
                .iter()
                .filter(|address| address.link != "lo")
                .map(|address| format!("{}/{}", address.local, address.prefix))
                .collect(),
            template: manifest.template.clone(),
            kernel: manifest.host.kernel.clone(),
            with_files: manifest.own_files == OwnFiles::Included,
            listed_files: seen.listed,
            summary: manifest.summary.clone(),
            processes: processes(&seen.layout, &state, &seen.areas, &seen.pages),
            open_files: state.kinds,
        })
    }
}

/// What of the records is told.
#[derive(Default)]
struct Seen {
    layout: Layout,
    /// How many areas each process has, and whether all of them have come.
    areas: BTreeMap<i32, (u64, bool)>,
    /// Distinct pages would take memory to count; the last word on a page is close.
    pages: BTreeMap<i32, u64>,
    listed: u64,
    state: Option<Told>,
}

/// What is told of the state.
#[derive(Default)]
struct Told {
    processes: BTreeMap<i32, (String, u32, u64)>,
    descriptors: BTreeMap<i32, u64>,
    kinds: BTreeMap<String, u64>,
}

impl Seen {
    fn take(&mut self, record: &Record) {
        let bytes = |runs: &[Run]| runs.iter().map(|run| run.pages).sum::<u64>() * PAGE;
        match record {
            Record::Memory(stream::Record::Layout(layout)) => self.layout = layout.clone(),
            Record::Memory(stream::Record::Areas { pid, areas, complete }) => {
                let (count, whole) = self.areas.entry(*pid).or_default();
                *count = if *whole { 0 } else { *count } + areas.len() as u64;
                *whole = *complete;
            }
            Record::Pages { space: Space::Process(pid), runs, .. } => {
                *self.pages.entry(*pid).or_default() += bytes(runs);
            }
            Record::Own(_) => self.listed += 1,
            Record::State(state) => self.state = Some(Told::of(state)),
            _ => {}
        }
    }
}

impl Told {
    fn of(state: &State) -> Self {
        let mut this = Self::default();
        for process in &state.processes.processes {
            let leader = process.threads.first();
            let name = leader.map(|it| {
                String::from_utf8_lossy(&it.name).trim_end_matches(['\0', '\n']).to_owned()
            });
            let uid = leader.map_or(0, |it| it.credentials.users[0]);
            let told = (name.unwrap_or_default(), uid, process.threads.len() as u64);
            this.processes.insert(process.pid, told);
        }
        for (&pid, table) in &state.tables {
            this.descriptors.insert(pid, table.len() as u64);
        }
        for file in &state.files.files {
            *this.kinds.entry(kind(file)).or_default() += 1;
        }
        this
    }
}

/// The word for a kind of open file: the name of its variant.
fn kind(file: &files::File) -> String {
    let mut word = Word::default();
    // Ends with the word: a kind may hold much.
    let _ = write!(word, "{:?}", file.kind);
    word.0.to_lowercase()
}

/// Takes the first word of a text.
#[derive(Default)]
struct Word(String);

impl fmt::Write for Word {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let end = text.find(|c: char| !c.is_alphanumeric()).unwrap_or(text.len());
        self.0.push_str(&text[..end]);
        if end == text.len() { Ok(()) } else { Err(fmt::Error) }
    }
}

fn processes(
    layout: &Layout,
    told: &Told,
    areas: &BTreeMap<i32, (u64, bool)>,
    pages: &BTreeMap<i32, u64>,
) -> Vec<InspectedProcess> {
    let process = |shape: &ckpt_format::process::Shape| {
        let known = told.processes.get(&shape.pid);
        let (command, uid, threads) = known.cloned().unwrap_or_default();
        InspectedProcess {
            pid: shape.pid,
            parent: shape.parent,
            command: if shape.zombie.is_some() { "(dead)".to_owned() } else { command },
            uid,
            threads,
            descriptors: told.descriptors.get(&shape.pid).copied().unwrap_or(0),
            areas: areas.get(&shape.pid).map_or(0, |(count, _)| *count),
            memory_bytes: pages.get(&shape.pid).copied().unwrap_or(0),
        }
    };
    layout.processes.iter().map(process).collect()
}
