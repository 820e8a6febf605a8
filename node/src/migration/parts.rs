//! Processes on their way to the target before the rest of the state: it decodes those while others are
//! still read.

use ckpt_format::{
    codec,
    process::{Process, Processes},
};

use super::{blackout::CopyError, pipe::Pipe, postcopy::later::Memory};

/// Takes processes as they are captured.
pub(super) struct Parts<'a> {
    /// Where they go at once.
    pipe: Option<&'a Pipe>,
    /// Those that did not.
    kept: Vec<Process>,
    /// Whether all were taken.
    taken: Result<(), CopyError>,
}

impl<'a> Parts<'a> {
    pub(super) fn new(pipe: &'a Pipe, memory: Memory) -> Self {
        // What of them is needed at once is looked for in all of them.
        let ahead = pipe.takes_processes() && memory == Memory::Whole;
        Self { pipe: ahead.then_some(pipe), kept: Vec::new(), taken: Ok(()) }
    }

    /// Takes an encoded list of processes.
    pub(super) fn take(&mut self, some: Vec<u8>) {
        if self.taken.is_err() {
            return;
        }
        self.taken = match self.pipe {
            Some(pipe) => pipe.processes(some).map_err(|_| CopyError::Link),
            None => codec::decode::<Vec<Process>>(&some)
                .map(|some| self.kept.extend(some))
                .map_err(|_| CopyError::Damaged),
        };
    }

    /// With all that is to be in the state.
    pub(super) fn complete(self, mut rest: Processes) -> Result<Processes, CopyError> {
        self.taken?;
        rest.processes.extend(self.kept);
        Ok(rest)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use transport::Link;

    use super::*;
    use crate::migration::{
        limiter::{Limiter, Pace},
        messages::{Item, tests::plain},
        packing,
        pipe::IN_PARTS,
    };

    /// Whether a process goes ahead of the state, and whether it is to be in that.
    async fn goes(version: u16, memory: Memory) -> (bool, bool) {
        let (source, target) = Link::pair();
        let pace = Pace::new(None, Arc::new(Limiter::new(None)));
        let (pipe, pump) = Pipe::start(source.bulk.open().await.unwrap(), pace, version);
        let sending = tokio::task::spawn_blocking(move || {
            let mut parts = Parts::new(&pipe, memory);
            parts.take(codec::encode(&vec![plain::<Process>()]));
            let rest = parts.complete(Processes::default()).unwrap();
            pipe.item(Item::Barrier(1)).unwrap();
            rest.processes.len() == 1
        });
        let mut stream = target.bulk.accept().await.unwrap();
        let mut ahead = false;
        while let Some(frame) = stream.recv().await.unwrap() {
            ahead |= matches!(packing::unpack(frame).unwrap(), Item::Processes { last: true, .. });
        }
        pump.await.unwrap().unwrap();
        (ahead, sending.await.unwrap())
    }

    #[tokio::test]
    async fn processes_go_ahead_where_that_is_understood_and_nobody_looks_at_them() {
        assert_eq!(goes(IN_PARTS, Memory::Whole).await, (true, false));
        assert_eq!(goes(IN_PARTS, Memory::Later).await, (false, true));
        assert_eq!(goes(IN_PARTS - 1, Memory::Whole).await, (false, true));
    }
}
