//! Archives of template caches: unpacked here, sent to and received from other nodes.

use std::{
    fs::{self, File},
    io::{BufReader, Read, Write},
    path::PathBuf,
};

use super::{Digest, TemplateError, Templates, failed, make};
use crate::api::Sink;

impl Templates {
    /// Opens an archive for sending: a reader, and its length in bytes.
    pub fn open_archive(&self, digest: &Digest) -> Result<(File, u64), TemplateError> {
        let path = self.archive(digest);
        let file = File::open(&path).map_err(|source| match source.kind() {
            std::io::ErrorKind::NotFound => TemplateError::NoArchive { digest: *digest },
            _ => failed("read", &path)(source),
        })?;
        let length = file.metadata().map_err(failed("read", &path))?.len();
        Ok((file, length))
    }

    /// Starts to take in an archive from another node.
    pub fn import(&self, digest: &Digest) -> Result<Import, TemplateError> {
        static NUMBER: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
        let number = NUMBER.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let draft = format!("{digest}.{}.{number}", std::process::id());
        let draft = self.path(&["tmp", &draft]);
        make(draft.parent().expect("it has one"))?;
        let path = self.archive(digest);
        make(path.parent().expect("it has one"))?;
        let file = File::create_new(&draft).map_err(failed("write", &draft))?;
        Ok(Import { draft, path, file, expected: *digest, hasher: blake3::Hasher::new() })
    }

    /// The unpacked layer, made if it is missing. Called with the digest's lock held.
    pub(super) fn unpacked(&self, digest: &Digest, sink: &Sink) -> Result<PathBuf, TemplateError> {
        let lower = self.lower(digest);
        if lower.is_dir() {
            return Ok(lower);
        }
        let (file, length) = self.open_archive(digest)?;
        let draft = self.path(&["lower", &format!(".{digest}")]);
        match fs::remove_dir_all(&draft) {
            Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
                return Err(failed("remove", &draft)(source));
            }
            _ => make(&draft)?,
        }
        let counted = Counted { inner: file, done: 0, total: length, sink };
        let unpack = || {
            let decoder = zstd::Decoder::new(BufReader::with_capacity(1 << 20, counted))?;
            let mut archive = tar::Archive::new(decoder);
            archive.set_preserve_permissions(true);
            archive.set_preserve_ownerships(true);
            archive.set_unpack_xattrs(true);
            archive.unpack(&draft)
        };
        if let Err(source) = unpack() {
            let _ = fs::remove_dir_all(&draft);
            return Err(failed("unpack", &draft)(source));
        }
        fs::rename(&draft, &lower).map_err(failed("name", &lower))?;
        Ok(lower)
    }
}

/// An archive on its way in. One that is dropped unfinished leaves nothing.
#[derive(Debug)]
pub struct Import {
    draft: PathBuf,
    path: PathBuf,
    file: File,
    expected: Digest,
    hasher: blake3::Hasher,
}

impl Import {
    /// Takes the next part.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), TemplateError> {
        self.hasher.update(bytes);
        self.file.write_all(bytes).map_err(failed("write", &self.draft))
    }

    /// The archive is complete: it gets its name if it is what it should be.
    pub fn finish(self) -> Result<(), TemplateError> {
        let found = self.hasher.finalize().into();
        if found != self.expected {
            return Err(TemplateError::Digest { expected: self.expected, found });
        }
        self.file.sync_all().map_err(failed("write", &self.draft))?;
        fs::rename(&self.draft, &self.path).map_err(failed("name", &self.path))
    }
}

impl Drop for Import {
    fn drop(&mut self) {
        // After a rename there is nothing to remove.
        let _ = fs::remove_file(&self.draft);
    }
}

struct Counted<'a> {
    inner: File,
    done: u64,
    total: u64,
    sink: &'a Sink,
}

impl Read for Counted<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let length = self.inner.read(buffer)?;
        self.done += length as u64;
        self.sink.progress("unpacking", self.done, Some(self.total), "bytes");
        Ok(length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    fn templates(directory: &std::path::Path) -> Templates {
        Templates::new(&Config { template_dir: Some(directory.into()), ..Config::default() })
    }

    fn archive() -> (Vec<u8>, Digest) {
        let mut builder = tar::Builder::new(zstd::Encoder::new(Vec::new(), 1).unwrap());
        let mut header = tar::Header::new_gnu();
        header.set_size(5);
        header.set_mode(0o640);
        header.set_uid(33);
        header.set_gid(7);
        builder.append_data(&mut header, "etc/hello", &b"hello"[..]).unwrap();
        let bytes = builder.into_inner().unwrap().finish().unwrap();
        let digest = blake3::hash(&bytes).into();
        (bytes, digest)
    }

    #[test]
    fn an_imported_archive_becomes_a_layer_and_goes_with_its_last_user() {
        use std::os::unix::fs::MetadataExt;
        let directory = tempfile::tempdir().unwrap();
        let templates = templates(directory.path());
        let (bytes, digest) = archive();
        assert!(!templates.has(&digest));
        let mut import = templates.import(&digest).unwrap();
        let (first, rest) = bytes.split_at(10);
        import.write(first).unwrap();
        import.write(rest).unwrap();
        import.finish().unwrap();
        assert!(templates.has(&digest));
        let sink = Sink::nowhere();
        let lower = templates.take(&digest, 101, &sink).unwrap();
        assert_eq!(templates.take(&digest, 102, &sink).unwrap(), lower);
        let file = fs::metadata(lower.join("etc/hello")).unwrap();
        assert_eq!((file.uid(), file.gid(), file.mode() & 0o7777), (33, 7, 0o640));
        templates.give_back(&digest, 101).unwrap();
        assert!(lower.is_dir());
        templates.give_back(&digest, 102).unwrap();
        assert!(!lower.exists() && !templates.has(&digest));
    }

    #[test]
    fn a_damaged_archive_is_refused_and_leaves_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let templates = templates(directory.path());
        let (mut bytes, digest) = archive();
        bytes[20] ^= 1;
        let mut import = templates.import(&digest).unwrap();
        import.write(&bytes).unwrap();
        assert!(matches!(import.finish(), Err(TemplateError::Digest { .. })));
        assert!(!templates.has(&digest));
        assert_eq!(fs::read_dir(directory.path().join("tmp")).unwrap().count(), 0);
    }
}
