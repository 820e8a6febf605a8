//! Why a VE was not checkpointed, or not restored, as the user reads it.

use ckpt_engine::capture::CaptureError;

use crate::{
    api::{Failure, chain},
    image::ImageFileError,
    migration::{blackout::CopyError, builder::BuildError, error::MigrateError},
    storage::{Change, TreeError},
    ve::{VeError, VeId},
};

/// Why a VE was not checkpointed: it runs on. Or not restored: it is as it was.
#[derive(Debug, thiserror::Error)]
pub(super) enum CheckpointError {
    /// The VE cannot be looked at, or holds something that cannot be captured.
    #[error(transparent)]
    Look(#[from] MigrateError),
    /// It could not be copied.
    #[error(transparent)]
    Copy(#[from] CopyError),
    /// The file could not be written, or is no checkpoint.
    #[error(transparent)]
    Image(#[from] ImageFileError),
    /// The runtime refused.
    #[error(transparent)]
    Ve(#[from] VeError),
    /// The VE's files could not be looked at.
    #[error(transparent)]
    Files(#[from] TreeError),
    /// The VE could not be built.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// The user changed their mind.
    #[error("given up; nothing has changed")]
    Cancelled,
    /// The VE does not lie suspended.
    #[error("Container {id} is not suspended")]
    NotSuspended {
        /// The VE.
        id: VeId,
    },
    /// The checkpoint is of another VE.
    #[error("the checkpoint is of container {of}, not of {asked}")]
    OtherVe {
        /// Whose it is.
        of: u32,
        /// Whose it should be.
        asked: String,
    },
    /// A file of the VE is not what it was.
    #[error("the files of the VE are not those of the checkpoint: {0}")]
    FilesChanged(#[source] Change),
    /// The files of the VE are not here.
    #[error("the files of container {ve} are not here, and the checkpoint does not have them")]
    FilesMissing {
        /// The VE.
        ve: u32,
    },
    /// The VE's addresses are not what they were.
    #[error("the checkpoint has the addresses {then}, the VE's configuration {now}")]
    OtherAddresses {
        /// In the checkpoint.
        then: String,
        /// Now.
        now: String,
    },
    /// The template is not here.
    #[error("the template {digest} of the checkpoint is not here")]
    TemplateMissing {
        /// Its digest.
        digest: String,
    },
    /// The kernel does not fit.
    #[error("the checkpoint was made on kernel {kernel}, whose vdso is another than here")]
    OtherKernel {
        /// The release of the kernel.
        kernel: String,
    },
    /// The CPU does not fit.
    #[error("the CPU here lacks what the VE may use: {missing}")]
    OtherCpu {
        /// What is missing.
        missing: String,
    },
    /// The memory does not suffice.
    #[error("there are {available_mib} MiB of free memory, the VE needs {needed_mib} MiB")]
    NoMemory {
        /// What there is.
        available_mib: u64,
        /// What it takes.
        needed_mib: u64,
    },
    /// There are too few huge pages.
    #[error("there are {missing}")]
    NoHugePages {
        /// How many there are, are needed, and what helps.
        missing: String,
    },
    /// The VE runs programs of 32 bits.
    #[error("this host {why}")]
    Without32Bits {
        /// What is not as it must be, and what helps.
        why: &'static str,
    },
    /// The journal.
    #[error("cannot write the journal of the checkpoint")]
    Journal(#[source] std::io::Error),
    /// A part of the daemon panicked.
    #[error("a part of the daemon failed")]
    Daemon(#[from] tokio::task::JoinError),
}

impl CheckpointError {
    /// As `vzctl` tells it; `exit` is 16 for a checkpoint and 17 for a restore, where the failure
    /// has no number of its own.
    pub(super) fn failure(self, exit: i32) -> Failure {
        let own = |code: &str| Failure::new(code, exit, chain(&self));
        match &self {
            Self::Ve(_) => match self {
                Self::Ve(error) => error.into(),
                other => Failure::new("system", exit, chain(&other)),
            },
            Self::Look(MigrateError::Ve(VeError::NotRunning { .. })) => {
                Failure::new("ve-not-running", 31, chain(&self))
                    .with_hint("start it with vzctl start")
            }
            Self::Look(MigrateError::Blocked(_))
            | Self::Copy(CopyError::Capture(CaptureError::Blocked(_)))
            | Self::Look(MigrateError::Copy(CopyError::Capture(CaptureError::Blocked(_)))) => {
                own("blocked").with_hint("end what is named, or wait for its end, and try again")
            }
            Self::Image(error) if error.code() == "no-space" => {
                let hint = "make room there, or give another place with --dumpfile";
                Failure::new("no-space", 46, chain(&self)).with_hint(hint)
            }
            Self::Build(BuildError::Files(TreeError::Full { .. })) => {
                Failure::new("no-space", 46, chain(&self)).with_hint("make room and try again")
            }
            Self::NotSuspended { .. } => own("ve-not-suspended")
                .with_hint("vzctl suspend makes it so; vzctl start starts it"),
            Self::Image(ImageFileError::Path { .. }) => {
                Failure::new("bad-value", 21, chain(&self)).with_hint("--dumpfile takes a file")
            }
            Self::Image(error) => {
                let told = own(error.code());
                told.with_hint("vzckpt verify looks at all of the file")
            }
            Self::FilesChanged(_) => own("files-changed").with_hint(
                "put that file back as it was, or take a checkpoint --with-files next time",
            ),
            Self::FilesMissing { .. } => own("files-missing")
                .with_hint("restore it on the node that has its files, or use --with-files"),
            Self::TemplateMissing { .. } => own("template-missing")
                .with_hint("move a VE of that template here, or bring its archive"),
            Self::OtherAddresses { .. } => own("other-addresses")
                .with_hint("give the VE its addresses back: vzctl set --ipadd"),
            Self::OtherKernel { .. } => own("other-kernel").with_hint("boot that kernel"),
            Self::OtherCpu { .. } => own("other-cpu").with_hint("restore it on another host"),
            Self::NoMemory { .. } => {
                Failure::new("no-memory", 6, chain(&self)).with_hint("stop something else first")
            }
            Self::NoHugePages { .. } => Failure::new("no-huge-pages", 6, chain(&self)),
            Self::Without32Bits { .. } => own("no-32-bits"),
            Self::Cancelled => own("cancelled"),
            Self::OtherVe { .. } => Failure::new("other-ve", 21, chain(&self)),
            Self::Look(_)
            | Self::Copy(_)
            | Self::Files(_)
            | Self::Build(_)
            | Self::Journal(_)
            | Self::Daemon(_) => own("failed"),
        }
    }
}
