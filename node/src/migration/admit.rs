//! Whether this node can take a VE, found out before anything is touched.

use coordinator::Stage;
use tokio::task::spawn_blocking;
use transport::BulkReceiver;

use super::{
    facts,
    messages::{Item, Offer},
    source::Context,
    target::TakeInError,
};
use crate::{
    api::Failure,
    ve::{Arrival, VeId},
};

/// Memory that the host keeps for itself, in bytes.
const MEMORY_RESERVE: u64 = 64 << 20;
/// Disk space that the host keeps for itself, in bytes.
const DISK_RESERVE: u64 = 64 << 20;

/// Looks at everything that the offer needs. Returns whether the template is missing.
pub(super) fn check(context: &Context, offer: &Offer) -> Result<bool, Failure> {
    let fail = |code: &str, exit, message: String| Err(Failure::new(code, exit, message));
    if offer.vdso != facts::vdso_hash() {
        return fail(
            "other-kernel",
            56,
            "the two nodes run kernels with different vdso images".to_owned(),
        );
    }
    if let Some(why) = facts::without_32_bits(offer.vdso_32) {
        return fail("no-32-bits", 56, format!("the target {why}"));
    }
    let own = facts::extended_state_len();
    if offer.extended_state_len > own {
        let message = format!(
            "the CPU here holds {own} bytes of extended state, the VE may use {}",
            offer.extended_state_len
        );
        return fail("other-cpu", 56, message);
    }
    let id = ve_id(offer)?;
    if context.runtime.find(&id.to_string()).is_ok() {
        return fail("ve-exists", 9, format!("VE {id} exists on the target already"));
    }
    let room = context.runtime.memory_room().unwrap_or(u64::MAX);
    let available = facts::memory_available().min(room);
    let needed = offer.memory_bytes + MEMORY_RESERVE;
    if available < needed {
        let message = format!(
            "the target has {} MiB of free memory, the VE needs {} MiB",
            available >> 20,
            needed >> 20
        );
        return fail("no-memory", 31, message);
    }
    if let Some(missing) = facts::missing_huge_pages(&offer.huge_bytes) {
        return fail("no-huge-pages", 31, format!("the target has {missing}"));
    }
    let state_dir = context.runtime.state_dir();
    let free = facts::disk_free(state_dir);
    let needed = offer.disk_bytes + DISK_RESERVE;
    if free < needed {
        let message = format!(
            "the target has {} MiB of free disk space, the VE needs {} MiB",
            free >> 20,
            needed >> 20
        );
        return fail("no-space", 31, message);
    }
    Ok(!context.runtime.templates().has(&offer.template))
}

/// As [`check`], for an offer that the log must know of.
pub(super) async fn admit(context: &Context, offer: &Offer) -> Result<bool, Failure> {
    let unknown = || Failure::new("log-unknown", 26, "the log does not know this migration");
    let state = context.coordinator().read().await;
    let state = state.map_err(|error| Failure::new("no-quorum", 4, error.to_string()))?;
    let record = state.migrations.get(&offer.migration).ok_or_else(unknown)?;
    let fits = record.target == context.cluster.node()
        && record.ve == offer.ve
        && record.epoch == offer.epoch
        && record.stage == Stage::Begun;
    if !fits {
        return Err(unknown());
    }
    check(context, offer)
}

/// The offer as the runtime wants it.
pub(super) fn arrival(offer: &Offer) -> Result<Arrival, Failure> {
    Ok(Arrival {
        id: ve_id(offer)?,
        config: offer.configuration.clone(),
        template: offer.template,
        plan: offer.container.clone(),
    })
}

/// Receives the template that the source has and we lack.
pub(super) async fn receive_template(
    context: &Context,
    offer: &Offer,
    stream: &mut BulkReceiver,
) -> Result<(), TakeInError> {
    let mut import = context.runtime.templates().import(&offer.template)?;
    loop {
        let bytes = stream.recv().await?.ok_or(TakeInError::Protocol)?;
        match ckpt_format::codec::decode(&bytes)? {
            Item::Template(bytes) => {
                import = spawn_blocking(move || import.write(&bytes).map(|()| import)).await??;
            }
            Item::TemplateEnd => {
                return Ok(spawn_blocking(move || import.finish()).await??);
            }
            _ => return Err(TakeInError::Protocol),
        }
    }
}

fn ve_id(offer: &Offer) -> Result<VeId, Failure> {
    VeId::try_from(offer.ve.0)
        .map_err(|_| Failure::new("bad-offer", 26, format!("{} is no VE number", offer.ve)))
}
