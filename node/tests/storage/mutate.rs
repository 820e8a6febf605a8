//! Random changes of a tree, as programs make them.

use std::{
    fs, io,
    os::fd::AsFd,
    os::unix::{
        ffi::OsStrExt,
        fs::{FileExt, OpenOptionsExt, PermissionsExt, chown, lchown, symlink},
    },
    path::{Path, PathBuf},
};

use ckpt_engine::sys::xattr;
use nix::{
    fcntl::{AT_FDCWD, RenameFlags, renameat2},
    sys::stat::{Mode, SFlag, mknod},
};
use rand::{Rng, SeedableRng, rngs::StdRng};

/// Makes random changes in the tree at `top`; `id_base` is root inside.
pub(crate) struct Mutator {
    pub(crate) random: StdRng,
    pub(crate) id_base: u32,
}

impl Mutator {
    pub(crate) fn new(seed: u64, id_base: u32) -> Self {
        Self { random: StdRng::seed_from_u64(seed), id_base }
    }

    /// Fills a tree.
    pub(crate) fn fill(&mut self, top: &Path, count: usize) {
        for _ in 0..count {
            self.change(top);
        }
    }

    /// One change. That it may be impossible where it hits is part of the game.
    pub(crate) fn change(&mut self, top: &Path) {
        let _ = self.attempt(top);
    }

    fn attempt(&mut self, top: &Path) -> io::Result<()> {
        let directory = self.pick(top, true);
        let any = self.pick(top, false);
        let new = directory.join(format!("n{}", self.random.random_range(0..12)));
        match self.random.random_range(0..26) {
            0..=3 => self.write(&new),
            4 | 5 => self.write(&any),
            6 => fs::create_dir(&new),
            7 => fs::create_dir_all(new.join("x/y")),
            8 => fs::remove_file(&any),
            9 => fs::remove_dir_all(&any),
            10 | 11 => fs::rename(&any, &new),
            12 => {
                let other = self.pick(top, false);
                Ok(renameat2(AT_FDCWD, &any, AT_FDCWD, &other, RenameFlags::RENAME_EXCHANGE)?)
            }
            13 | 14 => fs::hard_link(&any, &new),
            15 => symlink(any.strip_prefix(top).unwrap_or(&any), &new),
            16 => Ok(mknod(&new, SFlag::S_IFIFO, Mode::S_IRUSR, 0)?),
            17 => Ok(mknod(&new, SFlag::S_IFSOCK, Mode::S_IRWXU, 0)?),
            18 => {
                let mode = self.random.random_range(0..0o10_000);
                fs::set_permissions(&any, fs::Permissions::from_mode(mode))
            }
            19 => {
                let id = self.id_base + self.random.random_range(0..65_536);
                lchown(&any, Some(id), Some(id))
            }
            20 => self.attribute(&any),
            21 => self.times(&any),
            22 => self.resize(&any),
            23 => self.replace(&any),
            24 => self.program(&any),
            _ => {
                fs::remove_file(&any)?;
                fs::create_dir(&any)
            }
        }
    }

    fn pick(&mut self, top: &Path, directory: bool) -> PathBuf {
        let mut at = top.to_owned();
        for _ in 0..6 {
            let mut below: Vec<PathBuf> = fs::read_dir(&at)
                .into_iter()
                .flatten()
                .flatten()
                .map(|entry| entry.path())
                .filter(|path| !directory || path.symlink_metadata().is_ok_and(|it| it.is_dir()))
                .collect();
            below.sort();
            if below.is_empty() || (at != top && self.random.random_bool(0.3)) {
                break;
            }
            at = below.swap_remove(self.random.random_range(0..below.len()));
        }
        if at == top && !directory { top.join("n0") } else { at }
    }

    fn write(&mut self, path: &Path) -> io::Result<()> {
        let file = fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(self.random.random_bool(0.2))
            .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
            .open(path)?;
        let offset = self.random.random_range(0..600_000);
        let length = match self.random.random_range(0..4) {
            0 => 0,
            1 => self.random.random_range(0..300_000),
            _ => self.random.random_range(0..5000),
        };
        let byte = self.random.random_range(0..4);
        file.write_all_at(&vec![byte; length], if self.random.random() { offset } else { 0 })
    }

    fn resize(&mut self, path: &Path) -> io::Result<()> {
        let file = fs::OpenOptions::new()
            .write(true)
            .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
            .open(path)?;
        file.set_len(self.random.random_range(0..2_000_000))
    }

    fn attribute(&mut self, path: &Path) -> io::Result<()> {
        let place = place(path)?;
        let name = [c"user.a", c"user.b"][self.random.random_range(0..2)];
        match self.random.random_range(0..4) {
            0 => xattr::remove(place.as_fd(), name),
            1 => {
                let user = self.id_base + 33;
                let mut list = vec![2, 0, 0, 0];
                for (tag, permissions, id) in [
                    (1u16, 6u16, u32::MAX),
                    (2, 4, user),
                    (4, 4, u32::MAX),
                    (8, 1, user),
                    (0x10, 7, u32::MAX),
                    (0x20, 0, u32::MAX),
                ] {
                    list.extend_from_slice(&tag.to_le_bytes());
                    list.extend_from_slice(&permissions.to_le_bytes());
                    list.extend_from_slice(&id.to_le_bytes());
                }
                let name = match path.is_dir() && self.random.random() {
                    true => c"system.posix_acl_default",
                    false => c"system.posix_acl_access",
                };
                xattr::set(place.as_fd(), name, &list)
            }
            _ => xattr::set(place.as_fd(), name, &[self.random.random(); 7]),
        }
    }

    fn times(&mut self, path: &Path) -> io::Result<()> {
        use nix::sys::{
            stat::{UtimensatFlags, utimensat},
            time::TimeSpec,
        };
        let time = TimeSpec::new(
            self.random.random_range(-1000..4_000_000_000),
            self.random.random_range(0..1_000_000_000),
        );
        Ok(utimensat(AT_FDCWD, path, &time, &time, UtimensatFlags::NoFollowSymlink)?)
    }

    /// As careful programs write files.
    fn replace(&mut self, path: &Path) -> io::Result<()> {
        let mut name = path.file_name().unwrap_or_default().as_bytes().to_vec();
        name.extend_from_slice(b".new");
        let new = path.with_file_name(std::ffi::OsStr::from_bytes(&name));
        self.write(&new)?;
        fs::rename(&new, path)
    }

    /// A program with rights of its own.
    fn program(&mut self, path: &Path) -> io::Result<()> {
        if !path.symlink_metadata()?.is_file() {
            return Ok(());
        }
        chown(path, Some(self.id_base), Some(self.id_base))?;
        fs::set_permissions(path, fs::Permissions::from_mode(0o4755))?;
        let mut rights = 0x0300_0001u32.to_le_bytes().to_vec();
        rights.extend_from_slice(&[0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        rights.extend_from_slice(&self.id_base.to_le_bytes());
        xattr::set(place(path)?.as_fd(), c"security.capability", &rights)
    }
}

fn place(path: &Path) -> io::Result<fs::File> {
    fs::OpenOptions::new().read(true).custom_flags(libc::O_PATH | libc::O_NOFOLLOW).open(path)
}
