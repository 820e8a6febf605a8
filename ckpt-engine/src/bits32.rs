//! Programs of 32 bits on this host (the i386 interface, `CONFIG_IA32_EMULATION`).

use std::{
    fs::File,
    io::{self, Read, Write},
    os::fd::AsRawFd,
    process::{Child, Command, Stdio},
    sync::OnceLock,
};

use crate::{
    areas::{Machine, VDSO, machine},
    inject::read_image,
    procfs,
    sys::task,
};

/// What the kernel gives to each of them.
#[derive(Debug)]
pub struct Bits32 {
    /// Its vdso, which both ends of a move must share.
    pub image: Vec<u8>,
    /// How long that is with its data.
    pub(crate) len: u64,
}

/// Finds out by a program that does nothing; once. `None` where the host runs no such programs,
/// or gives them no vdso.
pub fn host() -> Option<&'static Bits32> {
    static HOST: OnceLock<Option<Bits32>> = OnceLock::new();
    let find = || {
        let found = look();
        if let Err(error) = &found {
            tracing::info!(%error, "programs of 32 bits cannot be moved to or from this host");
        }
        found.ok()
    };
    HOST.get_or_init(find).as_ref()
}

/// Whether any of these processes is one.
pub fn any(pids: &[i32]) -> bool {
    pids.iter().any(|&pid| {
        let maps = procfs::read_text(pid, "maps").unwrap_or_default();
        let lines = procfs::parse_maps(&maps);
        lines.iter().any(|line| line.name == VDSO && machine(pid, line) == Machine::I386)
    })
}

/// Where in their vdso an `int 0x80` instruction stands: the same in every process.
pub(crate) fn call_offset() -> Option<u64> {
    let place = host()?.image.windows(2).position(|pair| pair == INTERRUPT)?;
    u64::try_from(place).ok()
}

/// The instruction by which they call the kernel.
pub(crate) const INTERRUPT: [u8; 2] = [0xcd, 0x80];

fn look() -> io::Result<Bits32> {
    let program = start()?;
    let (image, len) = read_image(program.0.id().cast_signed())?;
    Ok(Bits32 { image, len })
}

/// One that is ended when this is dropped.
#[derive(Debug)]
pub(crate) struct Program(pub(crate) Child);

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// It runs until its standard input ends. Until it says a byte the kernel may still be making it.
pub(crate) fn start() -> io::Result<Program> {
    let mut file = File::from(task::memfd("bits32")?);
    file.write_all(&image())?;
    let mut command = Command::new(format!("/proc/self/fd/{}", file.as_raw_fd()));
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).env_clear();
    let mut program = command.spawn().map(Program)?;
    let output = program.0.stdout.as_mut().ok_or(io::ErrorKind::BrokenPipe)?;
    output.read_exact(&mut [0])?;
    Ok(program)
}

/// The whole file of a program that writes a byte, reads one, and ends.
fn image() -> Vec<u8> {
    const BASE: u32 = 0x0804_8000;
    const HEADER: u16 = 52;
    const SEGMENT: u16 = 32;
    const CODE: [u8; 32] = [
        0xbb, 1, 0, 0, 0, // mov ebx, 1
        0x89, 0xe1, // mov ecx, esp
        0x89, 0xda, // mov edx, ebx
        0xb8, 4, 0, 0, 0, // mov eax, 4: write
        0xcd, 0x80, // int 0x80
        0x31, 0xdb, // xor ebx, ebx
        0xb8, 3, 0, 0, 0, // mov eax, 3: read
        0xcd, 0x80, // int 0x80
        0x31, 0xdb, // xor ebx, ebx
        0xb8, 1, 0, 0, 0, // mov eax, 1: exit
    ];
    let start = HEADER + SEGMENT;
    let len = u32::from(start) + CODE.len() as u32 + INTERRUPT.len() as u32;
    let mut file = vec![0x7f, b'E', b'L', b'F', 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let halves = |file: &mut Vec<u8>, all: &[u16]| {
        file.extend(all.iter().flat_map(|half| half.to_le_bytes()));
    };
    let words = |file: &mut Vec<u8>, all: &[u32]| {
        file.extend(all.iter().flat_map(|word| word.to_le_bytes()));
    };
    // Executable, for the i386; one segment to be loaded, all of the file, to be read and executed.
    halves(&mut file, &[2, 3]);
    words(&mut file, &[1, BASE + u32::from(start), u32::from(HEADER), 0, 0]);
    halves(&mut file, &[HEADER, SEGMENT, 1, 0, 0, 0]);
    words(&mut file, &[1, 0, BASE, BASE, len, len, 5, 0x1000]);
    file.extend(CODE);
    file.extend(INTERRUPT);
    file
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_this_host_gives_to_such_programs_is_found() {
        let (Ok(program), Some(host)) = (start(), host()) else {
            assert!(host().is_none());
            return;
        };
        let own = std::process::id().cast_signed();
        assert!(any(&[own, program.0.id().cast_signed()]) && !any(&[own]));
        assert_eq!(host.image[..5], [0x7f, b'E', b'L', b'F', 1]);
        assert!(host.len > host.image.len() as u64);
        assert!(call_offset().is_some());
    }
}
