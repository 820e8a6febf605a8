//! The character devices that everybody has, held open.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::time::Duration;

use crate::workload::context::Context;
use crate::workload::outcome::{Failure, ensure, same};

pub(super) fn run(context: &mut Context) -> Result<(), Failure> {
    let open = |name: &str| File::options().read(true).write(true).open(name);
    let (mut null, mut zero) = (open("/dev/null")?, open("/dev/zero")?);
    let mut full = open("/dev/full")?;
    let (mut random, mut urandom) = (File::open("/dev/random")?, File::open("/dev/urandom")?);
    let mut last = [0; 16];
    while context.step(Duration::from_millis(20))? {
        null.write_all(b"away")?;
        same("bytes from null", null.read(&mut [0; 8])?, 0)?;
        let mut bytes = [1; 16];
        zero.read_exact(&mut bytes)?;
        if context.progress.plant() {
            bytes[3] = 9;
        }
        same("bytes from zero", bytes, [0; 16])?;
        let refused = full.write(b"x").err().map(|error| error.kind());
        same("writing to full", refused, Some(ErrorKind::StorageFull))?;
        for device in [&mut random, &mut urandom] {
            device.read_exact(&mut bytes)?;
            ensure(bytes != last, || "the same random bytes twice".to_owned())?;
            last = bytes;
        }
    }
    Ok(())
}
