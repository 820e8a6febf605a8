//! How fast a VE goes to disk and comes back, how large the file is, and how far that is from the
//! disk itself and from CRIU with zstd.

use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use bench::arguments::{self, Common};
use bench::measure::statistics::median;
use bench::peers::criu;
use bench::show::chart::{self, Bar};
use bench::show::outcome::Outcome;
use bench::show::table::{Table, maybe};
use bench::stage::guard::Guard;
use bench::stage::{Stage, StageError, Ve, system};
use clap::Parser;
use node::migration::{CheckpointReport, RestoreReport};

/// How fast a VE goes to disk and comes back.
#[derive(Debug, Parser)]
struct Arguments {
    #[command(flatten)]
    common: Common,
    /// Size of the VE's memory in MiB [default: 1024, with --quick 256].
    #[arg(long)]
    mib: Option<usize>,
}

/// One way to the disk and back.
struct Way {
    name: &'static str,
    /// GiB of memory per second, each time.
    out: Vec<f64>,
    back: Vec<f64>,
    /// MiB on the disk.
    size: Vec<f64>,
}

impl Way {
    fn new(name: &'static str) -> Self {
        Self { name, out: Vec::new(), back: Vec::new(), size: Vec::new() }
    }

    fn add(&mut self, gib: f64, out: Duration, back: Duration, bytes: u64) {
        self.out.push(gib / out.as_secs_f64());
        self.back.push(gib / back.as_secs_f64());
        self.size.push(bytes as f64 / f64::from(1 << 20));
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    arguments::run("checkpoint", &arguments.common, |guard, outcome| {
        play(&arguments, guard, outcome)
    })
}

fn play(arguments: &Arguments, guard: &Guard, outcome: &mut Outcome) -> Result<(), StageError> {
    let common = &arguments.common;
    let mib = arguments.mib.unwrap_or(common.pick(1024, 256));
    let folder = tempfile::tempdir_in("/var/tmp").map_err(system("make a folder"))?;
    let stage = Stage::up(common, guard, "chk", |_| {})?;
    let mut ways = vec![disk(folder.path(), mib, common)?];
    for (name, kind) in [("checkpoint, random pages", "random"), ("checkpoint, zero pages", "zero")]
    {
        if guard.has_time_for(Duration::from_secs(10)) {
            let ballast = format!("--{kind}-mib {mib}");
            ways.push(checkpoints(&stage, common, folder.path(), name, &ballast, mib)?);
        }
    }
    if criu::is_here() {
        ways.push(dumps(&stage, common, folder.path(), mib)?);
    } else {
        outcome.notes.push("no working criu on this machine: not compared".to_owned());
    }
    tell(outcome, &ways, mib);
    Ok(())
}

/// The disk alone: written and synced, then read without help of the page cache where the kernel
/// lets go of it.
fn disk(folder: &Path, mib: usize, common: &Common) -> Result<Way, StageError> {
    let mut way = Way::new("the disk alone");
    let mut noise = vec![0u8; 1 << 20];
    rand::Rng::fill(&mut rand::rng(), noise.as_mut_slice());
    let path = folder.join("raw");
    for _ in 0..common.runs(3, 1) {
        let begun = Instant::now();
        let mut file = File::create(&path).map_err(system("make a file"))?;
        for _ in 0..mib {
            file.write_all(&noise).map_err(system("write a file"))?;
        }
        file.sync_all().map_err(system("sync a file"))?;
        let out = begun.elapsed();
        forget(&file);
        let begun = Instant::now();
        let mut file = File::open(&path).map_err(system("open a file"))?;
        let mut piece = vec![0; 1 << 20];
        while file.read(&mut piece).map_err(system("read a file"))? > 0 {}
        way.add(mib as f64 / 1024.0, out, begun.elapsed(), (mib as u64) << 20);
    }
    std::fs::remove_file(&path).map_err(system("remove a file"))?;
    Ok(way)
}

/// Lets the kernel drop what it keeps of a file.
fn forget(file: &File) {
    use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
    // It may keep it: then what is read comes quicker than from the disk.
    let _ = posix_fadvise(file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
}

fn checkpoints(
    stage: &Stage,
    common: &Common,
    folder: &Path,
    name: &'static str,
    ballast: &str,
    mib: usize,
) -> Result<Way, StageError> {
    eprintln!("{name}");
    let mut way = Way::new(name);
    let ve = Ve::new("debian-12-minimal", mib as u64 + 512);
    stage.make_ve(&ve)?;
    stage.start_ballast(&ve, ballast)?;
    let path = folder.join("checkpoint");
    let file = path.display().to_string();
    for _ in 0..common.runs(3, 1) {
        let words = ["vzctl", "chkpnt", ve.id, "--dumpfile", &file, "--json"];
        let dumped: CheckpointReport = told(&stage.scene.good(ve.home, &words)?)?;
        if let Ok(file) = File::open(&path) {
            forget(&file);
        }
        let words = ["vzctl", "restore", ve.id, "--dumpfile", &file, "--json"];
        let begun = Instant::now();
        let _: RestoreReport = told(&stage.scene.good(ve.home, &words)?)?;
        let back = begun.elapsed();
        let out = Duration::from_secs_f64(dumped.total_ms / 1e3);
        way.add(mib as f64 / 1024.0, out, back, dumped.bytes);
        std::fs::remove_file(&path).map_err(system("remove a checkpoint"))?;
    }
    stage.remove_ve(&ve)?;
    Ok(way)
}

/// Dumps with CRIU, packed and unpacked by zstd with all processors.
fn dumps(stage: &Stage, common: &Common, folder: &Path, mib: usize) -> Result<Way, StageError> {
    let mut way = Way::new("criu and zstd -1 -T0");
    for _ in 0..common.runs(3, 1) {
        let done = criu::dump_and_restore(&stage.part, mib, folder)?;
        let images = folder.join("images");
        let packed = folder.join("images.tar.zst");
        let begun = Instant::now();
        shell(&format!(
            "tar -C {} -c . | zstd -q -1 -T0 > {}",
            images.display(),
            packed.display()
        ))?;
        let pack = begun.elapsed();
        let begun = Instant::now();
        shell(&format!("zstd -q -d -c {} > /dev/null", packed.display()))?;
        let unpack = begun.elapsed();
        let bytes = std::fs::metadata(&packed).map_err(system("look at a file"))?.len();
        let whole = |seconds: f64, more: Duration| Duration::from_secs_f64(seconds) + more;
        let (out, back) = (whole(done.dump_s, pack), whole(done.restore_s, unpack));
        way.add(mib as f64 / 1024.0, out, back, bytes);
        std::fs::remove_dir_all(&images).map_err(system("remove images"))?;
    }
    Ok(way)
}

fn shell(line: &str) -> Result<(), StageError> {
    let mut command = Command::new("sh");
    command.args(["-c", line]).stdin(Stdio::null());
    let status = command.status().map_err(system("run a shell"))?;
    if status.success() {
        return Ok(());
    }
    Err(StageError::Said { program: line.to_owned(), said: status.to_string() })
}

fn told<T: for<'a> serde::Deserialize<'a>>(said: &str) -> Result<T, StageError> {
    let line = said.lines().last().unwrap_or_default();
    serde_json::from_str(line)
        .map_err(|_| StageError::Said { program: "vzctl".to_owned(), said: line.to_owned() })
}

fn tell(outcome: &mut Outcome, ways: &[Way], mib: usize) {
    let head = ["way", "GiB/s out", "GiB/s back", "MiB on the disk", "runs"];
    let mut table = Table::new(&format!("{mib} MiB of memory to disk and back, medians"), &head);
    let mut bars = Vec::new();
    for way in ways {
        let (out, back) = (median(&way.out), median(&way.back));
        table.row([
            way.name.to_owned(),
            maybe(out),
            maybe(back),
            maybe(median(&way.size)),
            way.out.len().to_string(),
        ]);
        outcome.more(&format!("{}: out", way.name), "GiB/s", &way.out);
        outcome.more(&format!("{}: back", way.name), "GiB/s", &way.back);
        outcome.less(&format!("{}: size", way.name), "MiB", &way.size);
        for (what, rate) in [("out", out), ("back", back)] {
            let name = format!("{}, {what}", way.name);
            bars.push(Bar { name, pieces: vec![rate.unwrap_or(0.0)] });
        }
    }
    outcome.tables.push(table);
    let title = "Memory to disk and back, median";
    outcome.pictures.push(("checkpoint".into(), chart::bars(title, "GiB/s", &["rate"], &bars)));
}
