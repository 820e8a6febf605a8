//! What root inside a container may not do even in its own namespaces.

use std::io;

use crate::sys::namespace::drop_bounding;

/// Capabilities that no init of a container needs and that reach parts of the kernel shared
/// with the host: 16 SYS_MODULE, 17 SYS_RAWIO, 25 SYS_TIME, 30 AUDIT_CONTROL,
/// 32 MAC_OVERRIDE, 33 MAC_ADMIN, 34 SYSLOG, 35 WAKE_ALARM, 36 BLOCK_SUSPEND, 37 AUDIT_READ,
/// 38 PERFMON, 39 BPF.
pub(crate) const DROPPED: &[u32] = &[16, 17, 25, 30, 32, 33, 34, 35, 36, 37, 38, 39];

/// Gives them up for the calling process and all that come from it.
pub(super) fn drop_capabilities() -> io::Result<()> {
    for capability in DROPPED {
        // A kernel that does not know a capability does not grant it either.
        drop_bounding(*capability)?;
    }
    Ok(())
}
