//! Contents that the target has already, at another place.

use std::os::unix::fs::FileExt;

use ckpt_format::{
    memory::{PAGE, Run},
    stream::{Origin, PAGE_DATA_MAX, PageHash, PageKey, page_hash},
};

use super::{Bone, Inconsistency, RebuildError, Skeleton, pages::overlaps_gate};

impl Skeleton {
    /// What stands at these places, which must be what the hashes say: should the source ever be
    /// wrong about what is here, the move ends, and the VE goes on there.
    pub(super) fn contents(
        &self,
        origins: &[Origin],
        key: &PageKey,
        hashes: &[PageHash],
    ) -> Result<Vec<u8>, RebuildError> {
        const MOST: u64 = PAGE_DATA_MAX as u64 / PAGE;
        let pages = origins.iter().try_fold(0u64, |sum, it| sum.checked_add(it.run.pages));
        if pages.is_none_or(|pages| pages > MOST || pages != hashes.len() as u64) {
            return Err(Inconsistency::PageCount.into());
        }
        let mut data = vec![0; hashes.len() * PAGE as usize];
        let mut rest = &mut data[..];
        for Origin { pid, run } in origins {
            let bytes = rest.split_off_mut(..(run.pages * PAGE) as usize);
            let bytes = bytes.ok_or(Inconsistency::PageCount)?;
            let bone = self.bone(*pid)?;
            if overlaps_gate(run) {
                return Err(Inconsistency::AreaOutside(*pid).into());
            }
            bone.read(run, bytes).map_err(|source| RebuildError::Outside {
                pid: *pid,
                what: "read its pages",
                source,
            })?;
        }
        let pids = origins.iter().flat_map(|it| std::iter::repeat_n(it.pid, it.run.pages as usize));
        for ((page, hash), pid) in data.chunks_exact(PAGE as usize).zip(hashes).zip(pids) {
            if page_hash(key, page) != *hash {
                return Err(Inconsistency::OtherContents(pid).into());
            }
        }
        Ok(data)
    }
}

impl Bone {
    /// Reads pages as they were sent. Not by process_vm_readv(2), which would give the process
    /// copies of its own of pages that it has in common with relatives.
    fn read(&self, run: &Run, bytes: &mut [u8]) -> std::io::Result<()> {
        if self.late.is_empty() {
            return self.memory.read_exact_at(bytes, run.start);
        }
        for (page, bytes) in (0..).zip(bytes.chunks_exact_mut(PAGE as usize)) {
            let address = run.start.saturating_add(page * PAGE);
            match self.late.get(&address) {
                Some(late) => bytes.copy_from_slice(late),
                None => self.memory.read_exact_at(bytes, address)?,
            }
        }
        Ok(())
    }
}
