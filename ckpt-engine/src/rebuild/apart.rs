//! Who a process is that is in a user namespace from its birth.

use ckpt_format::process::Identity;

use super::{Bone, RebuildError, credentials};
use crate::{
    container::IdRanges,
    inject::Batch,
    procfs::{self, Status},
};

/// Adds the calls that make it somebody else, if it is not who it is to be. Its own user namespace
/// must have numbers for all that change.
pub(super) fn change_user(
    batch: &mut Batch,
    bone: &Bone,
    wanted: &Identity,
    id_base: u32,
) -> Result<(), RebuildError> {
    let host = bone.thread.tid;
    let status = Status::read(host)?;
    let map = |name: &str| -> Result<IdRanges, RebuildError> {
        Ok(IdRanges::read(&procfs::read_text(host, name)?))
    };
    let (users, groups) = (map("uid_map")?, map("gid_map")?);
    let outside = |id: &u32| u64::from(id_base.saturating_add(*id));
    let is = |key, ids: &[u32]| -> Result<bool, RebuildError> {
        Ok(status.numbers(key, 10)? == ids.iter().map(outside).collect::<Vec<_>>())
    };
    let seen = |map: &IdRanges, ids: &[u32]| -> Result<Vec<u32>, RebuildError> {
        let inside = |id: &u32| map.inside(id_base.saturating_add(*id));
        let all: Option<Vec<u32>> = ids.iter().map(inside).collect();
        all.ok_or(RebuildError::Unmapped { pid: bone.pid })
    };
    let four = |map: &IdRanges, ids: &[u32; 4]| -> Result<[u32; 4], RebuildError> {
        seen(map, ids)?.try_into().map_err(|_| RebuildError::Unmapped { pid: bone.pid })
    };
    // Not all may be changed everywhere.
    if !is("Groups", &wanted.supplementary)? {
        let supplementary = seen(&groups, &wanted.supplementary)?;
        credentials::set_groups(batch, &Identity { supplementary, ..Identity::default() });
    }
    if !is("Uid", &wanted.users)? || !is("Gid", &wanted.groups)? {
        let (users, groups) = (four(&users, &wanted.users)?, four(&groups, &wanted.groups)?);
        credentials::set_ids(batch, &Identity { users, groups, ..Identity::default() });
    }
    Ok(())
}
