//! `/proc/PID/mountinfo`, line by line.

use std::{collections::BTreeMap, fs, io};

/// One mount as the kernel tells it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Line {
    pub(super) id: u32,
    pub(super) parent: u32,
    /// `major:minor` of the superblock.
    pub(super) device: String,
    pub(super) root: String,
    pub(super) point: String,
    pub(super) options: String,
    pub(super) shared: Option<u32>,
    pub(super) master: Option<u32>,
    pub(super) unbindable: bool,
    pub(super) kind: String,
    pub(super) source: String,
    pub(super) super_options: String,
}

impl Line {
    pub(super) fn parse(line: &str) -> Option<Self> {
        let mut words = line.split(' ');
        let id = words.next()?.parse().ok()?;
        let parent = words.next()?.parse().ok()?;
        let device = words.next()?.to_owned();
        let root = unescape(words.next()?);
        let point = unescape(words.next()?);
        let options = words.next()?.to_owned();
        let (mut shared, mut master, mut unbindable) = (None, None, false);
        loop {
            match words.next()? {
                "-" => break,
                "unbindable" => unbindable = true,
                word => match word.split_once(':') {
                    Some(("shared", group)) => shared = group.parse().ok(),
                    Some(("master", group)) => master = group.parse().ok(),
                    _ => (),
                },
            }
        }
        let kind = words.next()?.to_owned();
        let source = unescape(words.next()?);
        let super_options = words.next()?.to_owned();
        Some(Self {
            id,
            parent,
            device,
            root,
            point,
            options,
            shared,
            master,
            unbindable,
            kind,
            source,
            super_options,
        })
    }
}

/// Where a process sees binfmt_misc, once for each that there is.
pub(crate) fn binary_formats(host: i32) -> io::Result<Vec<String>> {
    let table = fs::read_to_string(format!("/proc/{host}/mountinfo"))?;
    let lines = table.lines().filter(|line| line.contains(" - binfmt_misc ")).map(Line::parse);
    let whole = lines.flatten().filter(|line| line.root == "/");
    let points: BTreeMap<String, String> = whole.map(|line| (line.device, line.point)).collect();
    Ok(points.into_values().collect())
}

/// Blanks and backslashes come as three octal digits.
pub(super) fn unescape(word: &str) -> String {
    let mut bytes = Vec::with_capacity(word.len());
    let mut rest = word.as_bytes();
    while let Some((&byte, tail)) = rest.split_first() {
        let code = match (byte, tail) {
            (b'\\', [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', ..]) => {
                Some((a - b'0') * 64 + (b - b'0') * 8 + (c - b'0'))
            }
            _ => None,
        };
        bytes.push(code.unwrap_or(byte));
        rest = if code.is_some() { &tail[3..] } else { tail };
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_with_everything() {
        let line =
            "36 35 98:0 /a\\040b /mnt\\0112 rw,noatime shared:7 master:1 - tmpfs x rw,size=4k";
        let line = Line::parse(line).unwrap();
        assert_eq!((line.id, line.parent, line.device.as_str()), (36, 35, "98:0"));
        assert_eq!((line.root.as_str(), line.point.as_str()), ("/a b", "/mnt\t2"));
        assert_eq!((line.shared, line.master), (Some(7), Some(1)));
        assert_eq!((line.kind.as_str(), line.super_options.as_str()), ("tmpfs", "rw,size=4k"));
    }

    #[test]
    fn a_cut_line_is_no_line() {
        for line in ["", "36 35", "36 35 98:0 / /mnt rw", "36 35 98:0 / /mnt rw - tmpfs"] {
            assert_eq!(Line::parse(line), None, "{line}");
        }
    }
}
