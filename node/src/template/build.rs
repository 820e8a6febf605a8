//! Builds a template's cache with mmdebstrap, from where the host gets its own packages.

use std::{
    ffi::OsString,
    fs::{self, File},
    io::{self, BufRead, BufReader, Read, Write},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{SystemTime, UNIX_EPOCH},
};

use tracing::info;

use super::{Cache, Metadata, TemplateError, Templates, failed, make};
use crate::api::Sink;

/// How much of what mmdebstrap says is kept for an error.
const LAST_LINES: usize = 12;

/// A directory that goes away with its owner.
struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

impl Templates {
    /// Builds the archive and names it as the template's cache. Called with the lock held.
    pub(super) fn build(
        &self,
        name: &str,
        metadata: &Metadata,
        sink: &Sink,
    ) -> Result<Cache, TemplateError> {
        let scratch = Scratch(self.path(&["tmp", &format!("{name}.{}", std::process::id())]));
        let _ = fs::remove_dir_all(&scratch.0);
        make(&scratch.0)?;
        sink.log(format!("Building the cache of {name} from Debian packages"));
        let tar = scratch.0.join("root.tar");
        self.bootstrap(name, metadata, &scratch.0, &tar, sink)?;
        let packed = scratch.0.join("root.tar.zst");
        let (digest, size_bytes) = pack(&tar, &packed, sink)?;
        let archive = self.archive(&digest);
        make(archive.parent().expect("it has one"))?;
        fs::rename(&packed, &archive).map_err(failed("name", &archive))?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let cache = Cache { digest, size_bytes, built_s: now.as_secs() };
        let text = toml::to_string(&cache).expect("plain data");
        let draft = scratch.0.join("cache.toml");
        fs::write(&draft, text).map_err(failed("write", &draft))?;
        let path = self.path(&["cache", &format!("{name}.toml")]);
        make(path.parent().expect("it has one"))?;
        fs::rename(&draft, &path).map_err(failed("name", &path))?;
        info!(name, %digest, size_bytes, "built a template cache");
        Ok(cache)
    }

    fn bootstrap(
        &self,
        name: &str,
        metadata: &Metadata,
        scratch: &Path,
        tar: &Path,
        sink: &Sink,
    ) -> Result<(), TemplateError> {
        let options = scratch.join("apt.conf");
        fs::write(&options, apt_options()).map_err(failed("write", &options))?;
        let mut arguments: Vec<OsString> = Vec::new();
        for text in ["mmdebstrap", "--mode=root", "--skip=output/dev", "--format=tar"] {
            arguments.push(text.into());
        }
        arguments.push(format!("--variant={}", metadata.variant).into());
        arguments.push(format!("--include={}", metadata.packages.join(",")).into());
        arguments.push("--aptopt=APT::Install-Recommends \"false\"".into());
        arguments.push(option("--aptopt=", &options));
        // What is only unpacked is never customized, see mmdebstrap(1).
        let hook = if metadata.variant == "extract" { "extract" } else { "customize" };
        for command in &metadata.commands {
            let quoted = command.replace('\'', "'\\''");
            arguments.push(
                format!("--{hook}-hook=chroot \"$1\" {} -c '{quoted}'", metadata.shell).into(),
            );
        }
        for (number, (path, text)) in metadata.files.iter().enumerate() {
            let file = scratch.join(format!("file{number}"));
            fs::write(&file, text.trim_start_matches('\n')).map_err(failed("write", &file))?;
            let file = file.display();
            let hook = format!("--{hook}-hook=install -D -m 644 '{file}' \"$1\"'{path}'");
            arguments.push(hook.into());
        }
        arguments.push((&metadata.suite).into());
        arguments.push(tar.into());
        arguments.extend(sources(&metadata.suite).into_iter().map(OsString::from));
        self.run(name, &arguments, scratch, sink)
    }

    /// Runs mmdebstrap, showing what it does.
    fn run(
        &self,
        name: &str,
        arguments: &[OsString],
        scratch: &Path,
        sink: &Sink,
    ) -> Result<(), TemplateError> {
        let mut command = match &self.network_namespace {
            Some(namespace) => {
                let mut command = Command::new("nsenter");
                command.arg(option("--net=", namespace)).arg("--").args(arguments);
                command
            }
            None => {
                let mut command = Command::new(&arguments[0]);
                command.args(&arguments[1..]);
                command
            }
        };
        // Times of files that the build makes are those of the packages, not of now.
        command.env("TMPDIR", scratch).env("LC_ALL", "C.UTF-8").env("SOURCE_DATE_EPOCH", "0");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let program = "mmdebstrap";
        let mut child =
            command.spawn().map_err(|source| TemplateError::Program { program, source })?;
        let mut last: Vec<String> = Vec::new();
        if let Some(output) = child.stderr.take() {
            let mut lines = 0;
            for line in BufReader::new(output).lines() {
                let Ok(line) = line else { break };
                lines += 1;
                if let Some(step) = line.strip_prefix("I: ") {
                    sink.progress(&format!("{name}: {step}"), lines, None, "lines");
                }
                if last.len() == LAST_LINES {
                    last.remove(0);
                }
                last.push(line);
            }
        }
        let status = child.wait().map_err(|source| TemplateError::Program { program, source })?;
        match status.success() {
            true => Ok(()),
            false => Err(TemplateError::Build { name: name.to_owned(), last: last.join("\n") }),
        }
    }
}

fn option(name: &str, path: &Path) -> OsString {
    let mut option = OsString::from(name);
    option.push(path);
    option
}

/// How this host reaches package archives: its proxies, certificates and time checks.
fn apt_options() -> String {
    let dump = Command::new("apt-config").arg("dump").output();
    let text = dump.map(|dump| String::from_utf8_lossy(&dump.stdout).into_owned());
    let ours = ["Acquire::http", "Acquire::https", "Acquire::Check-", "Acquire::Retries"];
    let text = text.unwrap_or_default();
    let lines = text.lines().filter(|line| ours.iter().any(|start| line.starts_with(start)));
    lines.map(|line| format!("{line}\n")).collect()
}

/// The host's own lists of package archives that have the suite. Without any, mmdebstrap asks
/// Debian's.
fn sources(suite: &str) -> Vec<PathBuf> {
    let mut found = vec![PathBuf::from("/etc/apt/sources.list")];
    let parts = fs::read_dir("/etc/apt/sources.list.d").into_iter().flatten().flatten();
    found.extend(parts.map(|entry| entry.path()));
    found.sort();
    found.retain(|path| {
        let kind = path.extension().is_some_and(|it| it == "list" || it == "sources");
        // Others, such as a vendor's, may name the suite, too, and are no part of a template.
        let fits = |text: String| text.contains(suite) && text.contains("/debian");
        kind && fs::read_to_string(path).is_ok_and(fits)
    });
    found
}

/// Compresses an archive. Returns its digest and size.
fn pack(tar: &Path, packed: &Path, sink: &Sink) -> Result<(super::Digest, u64), TemplateError> {
    let mut input = File::open(tar).map_err(failed("read", tar))?;
    let total = input.metadata().map(|it| it.len()).ok();
    let output = File::create(packed).map_err(failed("write", packed))?;
    let hashing = Hashing { inner: output, hasher: blake3::Hasher::new(), length: 0 };
    let run = || -> io::Result<Hashing<File>> {
        let mut encoder = zstd::Encoder::new(hashing, 3)?;
        let (mut buffer, mut done) = (vec![0; 1 << 20], 0);
        loop {
            let length = input.read(&mut buffer)?;
            if length == 0 {
                let output = encoder.finish()?;
                output.inner.sync_all()?;
                return Ok(output);
            }
            encoder.write_all(&buffer[..length])?;
            done += length as u64;
            sink.progress("compressing", done, total, "bytes");
        }
    };
    let output = run().map_err(failed("write", packed))?;
    Ok((output.hasher.finalize().into(), output.length))
}

struct Hashing<W> {
    inner: W,
    hasher: blake3::Hasher,
    length: u64,
}

impl<W: Write> Write for Hashing<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(bytes)?;
        self.hasher.update(&bytes[..written]);
        self.length += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}
