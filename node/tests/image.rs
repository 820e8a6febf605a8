//! Checkpoint files: what was written is read, and what is damaged is refused, whatever the damage.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use ckpt_format::{
    container::{Clocks, Container},
    files::Files,
    image::{
        Chunk, ChunkKind, ENTRY_LEN, Header, Host, ImageError, Manifest, OwnFile, OwnFiles, Record,
        codec,
    },
    memory::{PAGE, Run, Space},
    network::Network,
    process::{Layout, Processes, Shape},
    state::State,
    stream,
    tree::{FileRecord, Node, Step},
};
use node::image::{Image, ImageFileError, ImageWriter, Inspection};
use rand::{Rng, SeedableRng, rngs::SmallRng};

const PAGES: usize = 64;

fn shape(pid: i32, parent: i32) -> Shape {
    Shape {
        below: Default::default(),
        pid,
        life: 1,
        parent,
        group: pid,
        session: pid,
        exit_signal: 17,
        zombie: None,
        heir: false,
        common: Default::default(),
        namespaces: Default::default(),
    }
}

/// Pages that no compression makes smaller, each another one.
fn noise(seed: u64) -> Vec<u8> {
    let mut bytes = vec![0; PAGES * PAGE as usize];
    SmallRng::seed_from_u64(seed).fill(&mut bytes[..]);
    bytes
}

fn pages(pid: i32, data: Vec<u8>) -> stream::Record {
    let runs = vec![Run { start: 0x40_0000, pages: data.len() as u64 / PAGE }];
    stream::Record::Pages { space: Space::Process(pid), runs, data: data.into() }
}

fn state() -> State {
    State {
        processes: Processes::default(),
        files: Files::default(),
        tables: BTreeMap::new(),
        cgroups: Vec::new(),
        network: Network::default(),
        nested_networks: Vec::new(),
        clocks: Clocks::default(),
        clock_offsets: Clocks::default(),
    }
}

fn file(step: Step) -> FileRecord {
    FileRecord { tree: 4, step }
}

/// Writes a checkpoint of a VE that nobody could run.
fn write(path: &Path, level: u8, seed: u64) -> node::image::Written {
    let mut writer = ImageWriter::create(path, level).expect("it works");
    let processes = vec![shape(1, 0), shape(7, 1)];
    let layout = Layout { processes, shared: Vec::new() };
    writer.memory(&stream::Record::Layout(layout)).expect("it works");
    writer.memory(&pages(1, noise(seed))).expect("it works");
    writer.memory(&pages(7, noise(seed))).expect("it works");
    writer.memory(&pages(7, vec![0; 16 * PAGE as usize])).expect("it works");
    let made = Step::Make { path: b"run/file".to_vec(), node: Node::File };
    writer.file(&file(made)).expect("it works");
    let data = b"what is in it".to_vec();
    let path_inside = b"run/file".to_vec();
    writer
        .file(&file(Step::Data { path: path_inside, offset: 7, data: data.into() }))
        .expect("it works");
    writer.state(&state()).expect("it works");
    let own = OwnFile {
        path: b"etc/hosts".to_vec(),
        mode: 0o100_644,
        uid: 0,
        gid: 0,
        device: 0,
        contents: None,
    };
    writer.record(&Record::Own(own)).expect("it works");
    writer
        .finish(|summary| Manifest {
            ve: 101,
            configuration: "HOSTNAME=\"a\"\n".to_owned(),
            template: "00".repeat(32),
            container: Container::fresh("a"),
            network: Network::default(),
            host: Host::default(),
            own_files: OwnFiles::Listed,
            summary,
            huge_bytes: BTreeMap::new(),
            vdso_32: None,
        })
        .expect("it works")
}

fn verify(path: &Path) -> Result<u64, ImageFileError> {
    let mut records = 0;
    Image::open(path)?.verify(&mut |_, _| {}, &mut |_| {
        records += 1;
        Ok(())
    })?;
    Ok(records)
}

fn place() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().expect("it works");
    let path = folder.path().join("image");
    (folder, path)
}

#[test]
fn what_was_written_is_read() {
    let (_folder, path) = place();
    for level in [0, 1, 19] {
        let written = write(&path, level, 1);
        assert_eq!(written.bytes, fs::metadata(&path).expect("it works").len());
        assert_eq!(verify(&path).expect("it works"), 8);
        let image = Image::open(&path).expect("it works");
        let (mut records, mut contents) = (image.records(), image.contents());
        let mut found = Vec::new();
        while let Some(record) = records.next().expect("it works") {
            match record {
                Record::Pages { data, .. } => found.push(contents.get(&data).expect("it works")),
                Record::FileData { data, offset, .. } => {
                    assert_eq!(offset, 7);
                    found.push(contents.get(&data).expect("it works"));
                }
                _ => {}
            }
        }
        let zeros = vec![0; 16 * PAGE as usize];
        assert_eq!(found, [noise(1), noise(1), zeros, b"what is in it".to_vec()]);
    }
}

#[test]
fn repeated_pages_and_zeros_take_no_room() {
    let (_folder, path) = place();
    let written = write(&path, 1, 1);
    let once = PAGES as u64 * PAGE;
    assert_eq!(written.summary.memory_bytes, 2 * once + 16 * PAGE);
    assert_eq!(written.summary.repeated_bytes, once);
    assert_eq!(written.summary.zero_bytes, 16 * PAGE);
    assert!(written.bytes < once + (8 << 10), "{} bytes", written.bytes);
}

#[test]
fn an_inspection_tells_what_is_there() {
    let (_folder, path) = place();
    write(&path, 1, 1);
    let found = Inspection::of(&path, &mut |_, _| {}).expect("it works");
    assert_eq!((found.ve, found.hostname.as_str(), found.listed_files), (101, "a", 1));
    let told: Vec<_> = found.processes.iter().map(|it| (it.pid, it.memory_bytes)).collect();
    assert_eq!(told, [(1, 64 * PAGE), (7, 80 * PAGE)]);
}

/// A small file, so that each of its bytes is hit often.
fn small(path: &Path) -> Vec<u8> {
    let mut writer = ImageWriter::create(path, 1).expect("it works");
    let layout = Layout { processes: vec![shape(1, 0)], shared: Vec::new() };
    writer.memory(&stream::Record::Layout(layout)).expect("it works");
    writer.memory(&pages(1, noise(3)[..PAGE as usize].to_vec())).expect("it works");
    writer.state(&state()).expect("it works");
    let manifest = |summary| Manifest {
        ve: 101,
        configuration: String::new(),
        template: "00".repeat(32),
        container: Container::default(),
        network: Network::default(),
        host: Host::default(),
        own_files: OwnFiles::Included,
        summary,
        huge_bytes: BTreeMap::new(),
        vdso_32: None,
    };
    writer.finish(manifest).expect("it works");
    fs::read(path).expect("it works")
}

const MUTATIONS: usize = 12_000;

/// Any damage of a file is found when it is verified, and in little time.
#[test]
fn every_damage_is_refused() {
    let (_folder, path) = place();
    let good = small(&path);
    let mut random = SmallRng::seed_from_u64(7);
    let mut longest = Duration::ZERO;
    for turn in 0..MUTATIONS {
        let mut bytes = good.clone();
        match turn % 5 {
            0 => bytes.truncate(random.random_range(0..good.len())),
            1 | 2 => bytes[random.random_range(0..good.len())] ^= 1 << random.random_range(0..8),
            3 => {
                let from = random.random_range(0..good.len());
                let to = (from + random.random_range(1..64)).min(good.len());
                random.fill(&mut bytes[from..to]);
            }
            _ => bytes.extend((0..random.random_range(1..64)).map(|_| 0)),
        }
        if bytes == good {
            continue;
        }
        fs::write(&path, &bytes).expect("it works");
        let start = Instant::now();
        assert!(verify(&path).is_err(), "mutation {turn} was not found");
        longest = longest.max(start.elapsed());
    }
    assert!(longest < Duration::from_secs(2), "one took {longest:?}");
    fs::write(&path, good).expect("it works");
    verify(&path).expect("it works");
}

/// Puts other bytes into a file so that all its hashes are right: what somebody would do who wants
/// to harm, and not what a disk does.
fn forge(good: &[u8], change: &mut dyn FnMut(ChunkKind, &mut Vec<u8>)) -> Vec<u8> {
    let header = Header::decode(good, good.len() as u64).expect("it works");
    let at = |offset: u64| usize::try_from(offset).expect("it works");
    let table = &good[at(header.table_at)..at(header.manifest_at)];
    let mut out = vec![0; 256];
    let mut entries = Vec::new();
    for entry in table.chunks(ENTRY_LEN) {
        let chunk = Chunk::decode(entry.try_into().expect("it works")).expect("it works");
        let stored = good[at(chunk.at)..at(chunk.end())].to_vec();
        let mut plain = chunk.open(stored).expect("it works");
        change(chunk.kind, &mut plain);
        let forged = Chunk {
            hash: *blake3::hash(&plain).as_bytes(),
            at: out.len() as u64,
            stored: plain.len() as u32,
            plain: plain.len() as u32,
            kind: chunk.kind,
            coding: ckpt_format::image::Coding::Plain,
        };
        out.extend(plain);
        entries.extend(forged.encode());
    }
    let manifest = good[at(header.manifest_at)..].to_vec();
    let table_at = out.len() as u64;
    out.extend(&entries);
    let manifest_at = out.len() as u64;
    out.extend(&manifest);
    let forged = Header {
        file_len: out.len() as u64,
        chunks_hash: *blake3::hash(&out[256..usize::try_from(table_at).expect("it works")])
            .as_bytes(),
        table_at,
        table_hash: *blake3::hash(&entries).as_bytes(),
        manifest_at,
        ..header
    };
    out[..256].copy_from_slice(&forged.encode());
    out
}

/// Records that were changed on purpose never panic, hang, or take memory without bound.
#[test]
fn forged_records_are_refused_or_make_sense() {
    let (_folder, path) = place();
    let good = small(&path);
    let mut random = SmallRng::seed_from_u64(11);
    let mut refused = 0;
    for _ in 0..MUTATIONS {
        let forged = forge(&good, &mut |kind, plain| {
            if kind == ChunkKind::Records {
                for _ in 0..random.random_range(1..4) {
                    let at = random.random_range(0..plain.len());
                    plain[at] = random.random();
                }
            }
        });
        fs::write(&path, &forged).expect("it works");
        let start = Instant::now();
        refused += usize::from(verify(&path).is_err());
        assert!(start.elapsed() < Duration::from_secs(2));
    }
    // Many a number can be another number.
    assert!(refused > MUTATIONS / 4, "{refused}");
}

#[test]
fn references_to_nothing_are_refused() {
    let (_folder, path) = place();
    let good = small(&path);
    // An honest file survives being packed anew.
    fs::write(&path, forge(&good, &mut |_, _| {})).expect("it works");
    verify(&path).expect("it works");
    for (chunk, at, what) in [(9, 0, "not there"), (1, 4000, "no data"), (2, 0, "no data")] {
        let runs = vec![Run { start: 0, pages: 1 }];
        let data = vec![ckpt_format::image::Piece(chunk, at, 4096)];
        let bad = Record::Pages { space: Space::Process(1), runs, data };
        let forged = forge(&good, &mut |kind, plain| {
            if kind == ChunkKind::Records {
                let mut with = codec::encode(&bad);
                with.append(plain);
                *plain = with;
            }
        });
        fs::write(&path, forged).expect("it works");
        let told = verify(&path).unwrap_err();
        let ImageFileError::Contents { source: ImageError::Damaged { what: told }, .. } = told
        else {
            panic!("{told}");
        };
        assert!(told.contains(what) || told.contains("not there"), "{told}");
    }
}

#[test]
fn other_files_are_told_from_checkpoints() {
    let (folder, path) = place();
    let told = |path: &Path| Image::open(path).unwrap_err().to_string();
    assert!(told(&path).starts_with("cannot open"));
    assert!(told(folder.path()).ends_with("is no path of a file"));
    for other in [&b""[..], b"#!/bin/sh\n", &[0; 4096]] {
        fs::write(&path, other).expect("it works");
        let error = Image::open(&path).unwrap_err();
        let foreign = matches!(error, ImageFileError::Contents { source: ImageError::Foreign, .. });
        assert!(foreign, "{error:?}");
    }
}

/// A file of each version stays readable for ever. Where this fails because a type has a new
/// field: give the field `#[serde(default)]`, which is what it is for older files.
#[test]
fn golden_files_of_every_version_are_read() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden");
    let mut versions = Vec::new();
    for entry in fs::read_dir(&folder).expect("it works") {
        let path = entry.expect("it works").path();
        if path.extension().is_none_or(|it| it != "ckpt") {
            continue;
        }
        let found = Inspection::of(&path, &mut |_, _| {}).expect("it works");
        assert!(!found.processes.is_empty() && found.summary.memory_bytes > 0, "{found:?}");
        assert!(found.processes.iter().all(|process| !process.command.is_empty()), "{found:?}");
        let name = path.file_name().expect("it works").to_string_lossy().into_owned();
        versions.extend(name.strip_prefix('v').and_then(|it| it[..1].parse::<u32>().ok()));
    }
    for version in 1..=ckpt_format::image::VERSION {
        assert!(versions.contains(&version), "no file of version {version}: {versions:?}");
    }
}
