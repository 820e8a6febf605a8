//! The user who has logged in, as the audit system knows it (pam_loginuid(8), proc(5) on
//! `/proc/PID/loginuid`). Whoever has none may set it once, for itself only; the session's number
//! is the kernel's own and another one afterwards.

use ckpt_format::process::Process;

use super::{Bone, RebuildError, Skeleton};
use crate::inject::{InjectError, Stopped};

impl Skeleton {
    /// Sets it in all threads. Where that is not possible the process goes on without it.
    pub(super) fn set_login(&self, bone: &Bone, process: &Process) -> Result<(), RebuildError> {
        let Some(login) = process.login else { return Ok(()) };
        // Its number is one of the VE, which means another user there.
        if self.is_user_apart(process.pid)? {
            return Ok(());
        }
        for thread in std::iter::once(&bone.thread).chain(&bone.others) {
            if let Err(error) = self.write_login(thread, login) {
                tracing::warn!(pid = bone.pid, login, %error, "cannot set who has logged in");
            }
        }
        Ok(())
    }

    fn write_login(&self, thread: &Stopped, login: u32) -> Result<(), InjectError> {
        let mut batch = self.gate.batch();
        let path = batch.text("/proc/thread-self/loginuid");
        let flags = (libc::O_WRONLY | libc::O_CLOEXEC) as u64;
        let open = batch.call("open", libc::SYS_open, &[path, flags]);
        let fd = batch.run(thread)?.value(open)?;
        let mut batch = self.gate.batch();
        let text = login.to_string();
        let bytes = batch.bytes(text.as_bytes());
        batch.call("write", libc::SYS_write, &[fd, bytes, text.len() as u64]);
        batch.call("close", libc::SYS_close, &[fd]);
        let done = batch.run(thread)?;
        done.all()
    }
}
