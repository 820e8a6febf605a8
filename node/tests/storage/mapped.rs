//! Stores through a shared mapping leave no trace in a file's times.

use std::{
    io::{BufRead, BufReader, Write},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
};

use crate::{compare::assert_equal, pair::Pair};

/// Maps the file in its argument, tells its numbers as stat(2) and as its mappings show them, and
/// stores a byte for every line it reads.
const PROGRAM: &str = r#"
import mmap, os, sys
with open(sys.argv[1], "r+b") as file:
    status = os.fstat(file.fileno())
    area = mmap.mmap(file.fileno(), 0)
for line in open("/proc/self/maps"):
    words = line.split()
    if words[1] == "rw-s":
        major, minor = (int(number, 16) for number in words[3].split(":"))
        device, inode = os.makedev(major, minor), int(words[4])
print(status.st_dev, status.st_ino, device, inode, flush=True)
for line in sys.stdin:
    area[int(line)] = ord("x")
    print("stored", flush=True)
"#;

/// A program that has a file mapped.
struct Mapper {
    child: Child,
    orders: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Mapper {
    fn new(path: &str) -> (Self, Vec<u64>) {
        let mut child = Command::new("python3")
            .args(["-c", PROGRAM, path])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let orders = child.stdin.take().unwrap();
        let answers = BufReader::new(child.stdout.take().unwrap());
        let mut this = Self { child, orders, answers };
        let numbers = this.line().split_whitespace().map(|word| word.parse().unwrap()).collect();
        (this, numbers)
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.answers.read_line(&mut line).unwrap();
        line
    }

    fn store(&mut self, offset: usize) {
        writeln!(self.orders, "{offset}").unwrap();
        assert_eq!(self.line(), "stored\n");
    }
}

impl Drop for Mapper {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A pair with a mapped file in the VE's own files, whose tracker trusts the times at once.
fn mapped_pair() -> (Pair, Mapper, Vec<u64>) {
    let mut pair = Pair::new(|_| ());
    let plan = ckpt_engine::container::capture(pair.source.container.init).unwrap().unwrap();
    let tracker = node::storage::FileTracker::new(pair.source.trees(&plan));
    pair.tracker = tracker.with_write_time_max(-3600);
    pair.source.inside(0, |top| std::fs::write(top.join("file"), vec![b'.'; 300_000]));
    let path = pair.source.path(0).join("file");
    // The path goes through a descriptor of this process.
    let path = path.to_str().unwrap().replace("/self/", &format!("/{}/", std::process::id()));
    let (mut mapper, numbers) = Mapper::new(&path);
    mapper.store(0);
    pair.round(false).unwrap();
    // The page is dirty already, so this store is not seen by the kernel.
    mapper.store(1);
    (pair, mapper, numbers)
}

#[test]
fn stores_to_a_mapped_file_are_found_by_its_numbers() {
    for form in [0, 2] {
        let (mut pair, mut mapper, numbers) = mapped_pair();
        pair.mapped.insert((numbers[form], numbers[form + 1]));
        pair.round(false).unwrap();
        assert_equal(&pair, "mapped");
        mapper.store(2);
        drop(mapper);
        // No longer mapped, but what was stored after the last look must still be found.
        pair.mapped.clear();
        pair.round(true).unwrap();
        assert_equal(&pair, "no longer mapped");
    }
}

#[test]
fn without_the_numbers_they_are_missed() {
    // If this fails, the test above proves nothing.
    let (mut pair, _mapper, _) = mapped_pair();
    assert_eq!(pair.round(false).unwrap().data_bytes, 0);
}

#[test]
fn stores_to_a_mapped_file_in_memory_are_always_found() {
    let mut pair = Pair::new(|_| ());
    let tree = *pair.numbers.last().unwrap();
    pair.source.inside(tree, |top| std::fs::write(top.join("file"), vec![b'.'; 9000]));
    let path = pair.source.path(tree).join("file");
    let path = path.to_str().unwrap().replace("/self/", &format!("/{}/", std::process::id()));
    let (mut mapper, _) = Mapper::new(&path);
    pair.round(false).unwrap();
    mapper.store(8000);
    drop(mapper);
    pair.round(true).unwrap();
    assert_equal(&pair, "in memory");
}
