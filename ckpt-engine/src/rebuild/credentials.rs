//! Users, groups and capabilities of one thread, in the one order that works.
//!
//! Every thread starts as root of the VE with all its capabilities. Whatever needs a capability
//! comes before it is given away: groups, then users with the capabilities kept, then the
//! bounding set, the secure bits, the sets themselves, and the ambient set last.

use ckpt_format::process::{Credentials, Identity};

use crate::{
    container::DROPPED,
    inject::Batch,
    procfs::{ProcError, Status},
};

/// `SECBIT_KEEP_CAPS | SECBIT_NO_SETUID_FIXUP`: a change of user keeps the capabilities.
const KEEP: u64 = 0x14;
/// `_LINUX_CAPABILITY_VERSION_3`.
const VERSION: u32 = 0x2008_0522;

/// What a process has now, if it is one of a VE whose id 0 is this one of the host.
pub(super) fn read(
    status: &Status,
    id_base: u32,
    secure_bits: u32,
) -> Result<Option<Credentials>, ProcError> {
    let inside = |id: u64| u32::try_from(id).ok()?.checked_sub(id_base);
    let ids = |key| -> Result<Option<Vec<u32>>, ProcError> {
        Ok(status.numbers(key, 10)?.into_iter().map(inside).collect())
    };
    let four = |ids: Option<Vec<u32>>| ids.and_then(|ids| <[u32; 4]>::try_from(ids).ok());
    let (users, groups, supplementary) = (four(ids("Uid")?), four(ids("Gid")?), ids("Groups")?);
    let mut capabilities = [0; 5];
    for (set, key) in
        capabilities.iter_mut().zip(["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"])
    {
        *set = status.number(key, 16)?;
    }
    let no_new_privileges = status.number("NoNewPrivs", 10)? != 0;
    let all = users.zip(groups).zip(supplementary);
    Ok(all.map(|((users, groups), supplementary)| Credentials {
        users,
        groups,
        supplementary,
        capabilities,
        secure_bits,
        no_new_privileges,
    }))
}

/// Adds the calls that take from a process with these capabilities what no process of a VE has:
/// those that come from it need not be told one by one. Returns the call that must not fail: of the
/// others some may, for a kernel that does not know a capability does not grant it either.
pub(super) fn disarm(batch: &mut Batch, credentials: &Credentials) -> usize {
    for &capability in DROPPED {
        let arguments = [libc::PR_CAPBSET_DROP as u64, capability.into()];
        batch.call("prctl", libc::SYS_prctl, &arguments);
    }
    let dropped = DROPPED.iter().fold(0, |set, capability| set | 1u64 << capability);
    let [inheritable, permitted, effective] =
        [0, 1, 2].map(|set| credentials.capabilities[set] & !dropped);
    capset(batch, effective, permitted, inheritable)
}

/// Adds the calls for one that has all capabilities of its bounding set, which is this. What this
/// host lets no VE have it does not get, should another host have let it.
pub(super) fn set(batch: &mut Batch, credentials: &Credentials, bounding: u64) {
    become_user(batch, &identity(credentials));
    let capabilities = credentials.capabilities.map(|set| set & bounding);
    limit(batch, &Credentials { capabilities, ..credentials.clone() }, bounding);
}

/// Who it is, without what it may do.
pub(super) fn identity(credentials: &Credentials) -> Identity {
    let Credentials { users, groups, ref supplementary, .. } = *credentials;
    Identity { users, groups, supplementary: supplementary.clone() }
}

/// The user and groups, with all capabilities kept.
pub(super) fn become_user(batch: &mut Batch, credentials: &Identity) {
    set_groups(batch, credentials);
    set_ids(batch, credentials);
}

/// Supplementary groups.
pub(super) fn set_groups(batch: &mut Batch, credentials: &Identity) {
    let groups: Vec<u8> =
        credentials.supplementary.iter().flat_map(|group| group.to_le_bytes()).collect();
    let address = batch.bytes(&groups);
    let count = credentials.supplementary.len() as u64;
    batch.call("setgroups", libc::SYS_setgroups, &[count, address]);
}

/// The user and group, with all capabilities kept.
pub(super) fn set_ids(batch: &mut Batch, credentials: &Identity) {
    let [real, effective, saved, file_system] = credentials.groups.map(u64::from);
    batch.call("setresgid", libc::SYS_setresgid, &[real, effective, saved]);
    if file_system != effective {
        batch.call("setfsgid", libc::SYS_setfsgid, &[file_system]);
    }
    let prctl = libc::SYS_prctl;
    batch.call("prctl", prctl, &[libc::PR_SET_SECUREBITS as u64, KEEP]);
    let [real, effective, saved, file_system] = credentials.users.map(u64::from);
    batch.call("setresuid", libc::SYS_setresuid, &[real, effective, saved]);
    if file_system != effective {
        batch.call("setfsuid", libc::SYS_setfsuid, &[file_system]);
    }
}

/// Everything else. `bounding` is the bounding set that the thread has now.
pub(super) fn limit(batch: &mut Batch, credentials: &Credentials, bounding: u64) {
    let prctl = libc::SYS_prctl;
    let [inheritable, permitted, effective, wanted_bounding, ambient] = credentials.capabilities;
    for capability in bits(bounding & !wanted_bounding) {
        batch.call("prctl", prctl, &[libc::PR_CAPBSET_DROP as u64, capability]);
    }
    let bits_wanted = u64::from(credentials.secure_bits);
    batch.call("prctl", prctl, &[libc::PR_SET_SECUREBITS as u64, bits_wanted]);
    capset(batch, effective, permitted, inheritable);
    for capability in bits(ambient) {
        let raise = libc::PR_CAP_AMBIENT_RAISE as u64;
        batch.call("prctl", prctl, &[libc::PR_CAP_AMBIENT as u64, raise, capability, 0, 0]);
    }
    if credentials.no_new_privileges {
        batch.call("prctl", prctl, &[libc::PR_SET_NO_NEW_PRIVS as u64, 1, 0, 0, 0]);
    }
}

fn capset(batch: &mut Batch, effective: u64, permitted: u64, inheritable: u64) -> usize {
    let mut header = VERSION.to_le_bytes().to_vec();
    header.extend_from_slice(&0u32.to_le_bytes());
    let header = batch.bytes(&header);
    let halves = |shift: u32| [effective, permitted, inheritable].map(|set| (set >> shift) as u32);
    let data: Vec<u8> =
        halves(0).iter().chain(&halves(32)).flat_map(|half| half.to_le_bytes()).collect();
    let data = batch.bytes(&data);
    batch.call("capset", libc::SYS_capset, &[header, data])
}

fn bits(set: u64) -> impl Iterator<Item = u64> {
    (0..64).filter(move |bit| set >> bit & 1 != 0)
}
