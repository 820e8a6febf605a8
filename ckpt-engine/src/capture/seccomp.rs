//! Filters on system calls that programs have installed themselves.
//!
//! The kernel gives each back as it was installed (`PTRACE_SECCOMP_GET_FILTER`). The oldest is the
//! one that every process of a container has from its birth, and is none of the program's own.

use std::collections::HashMap;

use ckpt_format::seccomp::Filter;

use crate::{container::BASELINE_FILTERS, inject::InjectError, procfs::Status, sys::ptrace};

use super::CaptureError;

/// The different filters of a VE: services have dozens, and each of their threads has them all.
#[derive(Debug, Default)]
pub(super) struct Filters {
    places: HashMap<Filter, u32>,
    all: Vec<Filter>,
}

impl Filters {
    /// The filters in the order of their places.
    pub(super) fn into_list(self) -> Vec<Filter> {
        self.all
    }

    /// The places of a thread's own filters, oldest first.
    pub(super) fn of_thread(
        &mut self,
        tid: i32,
        status: &Status,
    ) -> Result<Vec<u32>, CaptureError> {
        let control = |source| InjectError::Control { tid, source };
        let mut places = Vec::new();
        let count = status.number("Seccomp_filters", 10)?;
        for place in BASELINE_FILTERS..count {
            let (program, logs) = ptrace::seccomp_filter(tid, place as usize).map_err(control)?;
            places.push(self.place(Filter { program, logs }));
        }
        Ok(places)
    }

    pub(super) fn place(&mut self, filter: Filter) -> u32 {
        let next = self.all.len() as u32;
        *self.places.entry(filter).or_insert_with_key(|filter| {
            self.all.push(filter.clone());
            next
        })
    }
}
