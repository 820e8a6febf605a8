//! Writes a running VE into a file.
//!
//! ```text
//! look ──▶ rounds ──▶ Still ──▶ goes on ──▶ file complete     (--leave-running)
//!          (live)       └─────▶ file complete ──▶ sealed ──▶ ended
//! ```
//! Up to the seal any failure leaves the VE running, and no file. A VE that is to end stands still
//! until the file is on the disk, so that there is always one of the two.

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use ckpt_format::{
    container::Clocks,
    image::{Manifest, OwnFiles, Record, Summary},
};
use tokio::task::spawn_blocking;

use super::{
    CheckpointReport,
    error::CheckpointError,
    journal::{Journal, Step},
    outlet::Outlet,
};
use crate::{
    api::Sink,
    image::{ImageWriter, Written},
    migration::{
        blackout::{CopyError, Live, Still},
        facts,
        messages::Offer,
        pipe::Pipe,
        postcopy::later::Memory,
        source::{Context, look_at},
        vain::VainStops,
    },
    storage,
    ve::{Operation, StopMode},
};

/// How often a VE that goes on is copied before it stands still: the second round is what it wrote
/// during the first.
const LIVE_ROUNDS: u32 = 2;
/// How long a VE may stand still beside what its data takes on a slow disk.
const PATIENCE: Duration = Duration::from_secs(60);
const PATIENCE_GOES_ON: Duration = Duration::from_secs(10);
const SLOW_DISK_BYTES_PER_SECOND: u64 = 20 << 20;
/// Between two words about how far it is.
const PROGRESS: Duration = Duration::from_millis(200);

/// What the user asked for.
#[derive(Clone, Debug)]
pub(super) struct Wish {
    pub(super) path: PathBuf,
    pub(super) leave_running: bool,
    pub(super) with_files: bool,
    pub(super) level: u8,
}

/// Writes a VE into a file.
pub(super) async fn dump(
    context: &Context,
    operation: &Operation,
    wish: &Wish,
    sink: &Sink,
) -> Result<CheckpointReport, CheckpointError> {
    let start = Instant::now();
    let ve = operation.ve.clone();
    let handle = context.runtime.handle(&ve)?;
    let (path, level) = (wish.path.clone(), wish.level);
    let writer = spawn_blocking(move || ImageWriter::create(&path, level)).await??;
    let directory = ve.directory().to_owned();
    let with_files = wish.with_files || wish.leave_running;
    let looked = spawn_blocking(move || look_at(&handle, &directory, with_files)).await?;
    let (live, offer) = looked?;
    let journal = Journal::new(ve.directory());
    journal.write(Step::Dumping).map_err(CheckpointError::Journal)?;
    let outlet = Outlet::new(writer);
    let job = Job {
        outlet: outlet.clone(),
        rounds: if wish.leave_running { LIVE_ROUNDS } else { 0 },
        patience: patience(&offer, wish.leave_running),
        manifest: manifest(offer, with_files),
        upper: (!with_files).then(|| context.runtime.handle(&ve).map(|it| it.upper)).transpose()?,
        leave_running: wish.leave_running,
    };
    let dumped = watched(job, live, &outlet, sink).await;
    let done = match dumped {
        Ok(Dumped { written, standstill, still }) => match still {
            None => Ok((written, standstill)),
            Some(still) => {
                let ended = end(context, operation, &journal, still, wish).await;
                ended.map(|()| (written, standstill))
            }
        },
        Err(error) => Err(error),
    };
    // A VE that was to end and did not is ended by the next start of the daemon.
    if done.is_ok() || journal.read()? == Some(Step::Dumping) {
        journal.remove().map_err(CheckpointError::Journal)?;
    }
    let (written, standstill) = done?;
    Ok(CheckpointReport {
        ve: ve.id.number(),
        file: wish.path.clone(),
        bytes: written.bytes,
        memory_bytes: written.summary.memory_bytes,
        processes: written.summary.processes,
        with_files,
        left_running: wish.leave_running,
        standstill_ms: standstill.as_secs_f64() * 1000.0,
        total_ms: start.elapsed().as_secs_f64() * 1000.0,
    })
}

/// What the thread that writes the file needs.
struct Job {
    outlet: Outlet,
    rounds: u32,
    patience: Duration,
    manifest: Box<dyn FnOnce(Clocks, Summary) -> Manifest + Send>,
    /// The VE's own files, if they are to be listed.
    upper: Option<PathBuf>,
    leave_running: bool,
}

/// A VE that is in a file.
struct Dumped {
    written: Written,
    standstill: Duration,
    /// The VE itself, if it is to end.
    still: Option<Still>,
}

/// Does the work on a thread of its own, tells how far it is, and gives it up with its user.
async fn watched(
    job: Job,
    live: Live,
    outlet: &Outlet,
    sink: &Sink,
) -> Result<Dumped, CheckpointError> {
    let mut working = spawn_blocking(move || write(job, live));
    let mut cancelled = false;
    loop {
        tokio::select! {
            done = &mut working => {
                return match done? {
                    Err(CheckpointError::Copy(_)) if cancelled => Err(CheckpointError::Cancelled),
                    other => other,
                };
            }
            () = sink.closed(), if !cancelled => {
                outlet.close();
                cancelled = true;
            }
            () = tokio::time::sleep(PROGRESS), if !cancelled => {
                sink.progress("writing the checkpoint", outlet.bytes(), None, "bytes");
            }
        }
    }
}

fn write(job: Job, live: Live) -> Result<Dumped, CheckpointError> {
    let outlet = job.outlet;
    let pipe = Pipe::to_file(outlet.clone());
    // Why the file takes no more says more than that it does not.
    let because = |error: CopyError| match outlet.failure() {
        Some(failure) => CheckpointError::Image(failure),
        None => error.into(),
    };
    let still = copy(live, &pipe, job.rounds, job.patience).map_err(because)?;
    let (clocks, start) = (still.clocks(), still.start);
    let Some(mut writer) = outlet.take() else { return Err(CheckpointError::Cancelled) };
    if job.leave_running {
        drop(still);
        let standstill = start.elapsed();
        let written = writer.finish(|summary| (job.manifest)(clocks, summary))?;
        return Ok(Dumped { written, standstill, still: None });
    }
    if let Some(upper) = &job.upper {
        list(upper, &mut writer)?;
        storage::settle(upper)?;
    }
    let written = writer.finish(|summary| (job.manifest)(clocks, summary))?;
    Ok(Dumped { written, standstill: start.elapsed(), still: Some(still) })
}

/// Copies the VE, at last while it stands still.
fn copy(mut live: Live, pipe: &Pipe, rounds: u32, patience: Duration) -> Result<Still, CopyError> {
    for number in 0..rounds {
        live.round(number, pipe)?;
    }
    let mut vain = VainStops::default();
    loop {
        let mut still = live.freeze(patience).map_err(|(_, error)| error)?;
        let Err(cause) = still.send_rest(Memory::Whole, pipe) else { return Ok(still) };
        let Some(pause) = cause.is_passing().then(|| vain.next()).flatten() else {
            return Err(cause);
        };
        tracing::info!(%cause, "stopped in vain; trying again");
        live = still.back()?;
        std::thread::sleep(pause);
    }
}

/// Notes what the VE's own files are.
fn list(upper: &std::path::Path, writer: &mut ImageWriter) -> Result<(), CheckpointError> {
    for file in storage::list_own(upper)? {
        writer.record(&Record::Own(file))?;
    }
    Ok(())
}

/// The file is complete: the VE ends here.
async fn end(
    context: &Context,
    operation: &Operation,
    journal: &Journal,
    mut still: Still,
    wish: &Wish,
) -> Result<(), CheckpointError> {
    if let Err(error) = tokio::task::block_in_place(|| still.may_seal()) {
        // It goes on, so the file is not what has become of it.
        if let Err(source) = std::fs::remove_file(&wish.path) {
            tracing::warn!(path = %wish.path.display(), %source, "cannot remove a checkpoint");
        }
        return Err(error.into());
    }
    journal.write(Step::Stopping).map_err(CheckpointError::Journal)?;
    let (sealed, _) = still.seal()?;
    context.runtime.stop(&operation.ve, StopMode::Fast).await?;
    drop(sealed);
    Ok(())
}

fn patience(offer: &Offer, goes_on: bool) -> Duration {
    let bytes = offer.memory_bytes.saturating_add(offer.disk_bytes);
    let least = if goes_on { PATIENCE_GOES_ON } else { PATIENCE };
    least + Duration::from_secs(bytes / SLOW_DISK_BYTES_PER_SECOND)
}

fn manifest(offer: Offer, with_files: bool) -> Box<dyn FnOnce(Clocks, Summary) -> Manifest + Send> {
    Box::new(move |clocks, summary| {
        let mut container = offer.container;
        container.clocks = clocks;
        Manifest {
            ve: offer.ve.0,
            configuration: offer.configuration,
            template: offer.template.to_string(),
            container,
            network: offer.network,
            host: facts::host(),
            own_files: if with_files { OwnFiles::Included } else { OwnFiles::Listed },
            summary,
            huge_bytes: offer.huge_bytes,
            vdso_32: offer.vdso_32,
        }
    })
}
