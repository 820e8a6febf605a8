//! Rounds make the target equal to the source, and send no more than they must.

use std::{
    fs,
    os::unix::fs::FileExt,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
};

use ckpt_engine::sys::namespace::as_user;

use crate::{
    compare::{assert_equal, look},
    mutate::Mutator,
    pair::Pair,
};

const MIB: u64 = 1 << 20;

#[test]
fn random_changes_between_rounds_arrive_exactly() {
    let seeds = match std::env::var("SEED") {
        Ok(seed) => vec![seed.parse().unwrap()],
        Err(_) => (0..12).collect::<Vec<u64>>(),
    };
    for seed in seeds {
        let mut pair = Pair::new(|lower| Mutator::new(seed, 0).fill(&lower.join("tmp"), 120));
        let mut mutator = Mutator::new(seed + 1000, pair.source.id_base);
        for round in 0..6 {
            for filesystem in pair.numbers.clone() {
                let count = if filesystem == 0 { 60 } else { 15 };
                // Mount points of the container itself are not to be played with.
                let below = if filesystem == 0 { "tmp" } else { "play" };
                pair.source.inside(filesystem, |top| {
                    let top = top.join(below);
                    fs::create_dir_all(&top)?;
                    mutator.fill(&top, count);
                    Ok(())
                });
            }
            let last = round % 2 == 1;
            pair.round(last).unwrap_or_else(|error| panic!("seed {seed} round {round}: {error:?}"));
            if last {
                assert_equal(&pair, &format!("seed {seed} round {round}"));
            }
        }
        let round = pair.round(true).unwrap();
        assert_eq!(round.data_bytes, 0, "nothing has changed since");
    }
}

#[test]
fn a_tree_that_changes_during_the_rounds_arrives_in_the_last_one() {
    let mut pair = Pair::new(|lower| Mutator::new(7, 0).fill(&lower.join("tmp"), 120));
    let base = pair.source.id_base;
    let path = pair.source.path(0).join("tmp");
    let (stop, count) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        let worker = scope.spawn(|| {
            as_user(base, || {
                let mut mutator = Mutator::new(8, base);
                while !stop.load(Ordering::Relaxed) {
                    mutator.change(&path);
                    count.fetch_add(1, Ordering::Relaxed);
                }
                Ok(())
            })
            .unwrap();
        });
        let mut failure = None;
        let mut rounds = 0;
        while failure.is_none() && (rounds < 10 || count.load(Ordering::Relaxed) < 5000) {
            failure = pair.round(false).err();
            rounds += 1;
        }
        stop.store(true, Ordering::Relaxed);
        worker.join().unwrap();
        assert!(failure.is_none(), "round {rounds}: {failure:?}");
    });
    pair.round(true).unwrap();
    assert_equal(&pair, "after the last round");
}

#[test]
fn only_what_changed_is_sent_again() {
    let mut pair = Pair::new(|_| ());
    pair.source.inside(0, |top| {
        fs::create_dir(top.join("d"))?;
        fs::write(top.join("d/big"), vec![7; 64 << 20])
    });
    assert_eq!(pair.round(false).unwrap().data_bytes, 64 * MIB);
    pair.source.inside(0, |top| {
        let file = fs::OpenOptions::new().write(true).open(top.join("d/big"))?;
        file.write_all_at(b"x", 3 * MIB)?;
        file.write_all_at(b"x", 40 * MIB)
    });
    assert_eq!(pair.round(false).unwrap().data_bytes, 256 << 10);
    // Another name, another directory, one more name: no contents.
    pair.source.inside(0, |top| {
        fs::create_dir(top.join("e"))?;
        fs::rename(top.join("d/big"), top.join("e/large"))?;
        fs::hard_link(top.join("e/large"), top.join("d/again"))?;
        fs::rename(top.join("e"), top.join("f"))
    });
    let round = pair.round(true).unwrap();
    assert_eq!(round.data_bytes, 0);
    assert_equal(&pair, "renamed");
}

#[test]
fn directories_and_files_exchange_names() {
    let mut pair = Pair::new(|_| ());
    pair.source.inside(0, |top| {
        for (name, text) in [("a", "1"), ("b", "2"), ("c", "3")] {
            fs::create_dir_all(top.join(name).join("in"))?;
            fs::write(top.join(name).join("in/file"), text)?;
            fs::write(top.join(format!("{name}.txt")), text)?;
        }
        fs::hard_link(top.join("a.txt"), top.join("c/a.txt"))
    });
    pair.round(false).unwrap();
    pair.source.inside(0, |top| {
        let to = |from: &str, to: &str| fs::rename(top.join(from), top.join(to));
        to("a", "t")?;
        to("b", "a")?;
        to("c", "a/c")?;
        to("t", "a/c/b")?;
        to("a.txt", "t.txt")?;
        to("b.txt", "a.txt")?;
        to("t.txt", "b.txt")?;
        // A link whose only older name is in a directory that gets its place late.
        fs::hard_link(top.join("a/c/a.txt"), top.join("0"))?;
        fs::remove_file(top.join("b.txt"))
    });
    let round = pair.round(true).unwrap();
    assert_eq!(round.data_bytes, 0);
    assert_equal(&pair, "exchanged");
}

#[test]
fn the_template_shows_through_only_where_it_should() {
    let mut pair = Pair::new(|lower| {
        for name in ["kept", "emptied", "replaced", "gone", "deep/er"] {
            fs::create_dir_all(lower.join(name)).unwrap();
            fs::write(lower.join(name).join("file"), name).unwrap();
        }
        fs::hard_link(lower.join("kept/file"), lower.join("kept/link")).unwrap();
    });
    pair.source.inside(0, |top| {
        fs::write(top.join("kept/new"), "new")?;
        fs::remove_file(top.join("emptied/file"))?;
        fs::remove_dir_all(top.join("replaced"))?;
        fs::create_dir(top.join("replaced"))?;
        fs::write(top.join("replaced/other"), "other")?;
        fs::remove_dir_all(top.join("gone"))?;
        fs::remove_dir_all(top.join("deep"))?;
        fs::write(top.join("deep"), "a file now")?;
        fs::OpenOptions::new().append(true).open(top.join("kept/link"))?;
        Ok(())
    });
    pair.round(false).unwrap();
    assert_equal(&pair, "first");
    // What replaced a directory of the template can be moved like any other.
    pair.source.inside(0, |top| fs::rename(top.join("replaced"), top.join("elsewhere")));
    pair.round(true).unwrap();
    assert_equal(&pair, "moved");
    let names = look(&pair.target, 0);
    assert!(names.contains_key(&b"/elsewhere/other"[..]));
    assert!(!names.contains_key(&b"/elsewhere/file"[..]));
}

#[test]
fn mounts_of_the_target_stay_where_they_are() {
    let mut pair = Pair::new(|_| ());
    // The directory that a tmpfs is mounted on was made anew before the mount.
    pair.source.inside(0, |top| {
        fs::remove_dir(top.join("run"))?;
        fs::create_dir(top.join("run"))
    });
    let mounts = |pair: &Pair| {
        let init = pair.target.container.init;
        let text = fs::read_to_string(format!("/proc/{init}/mountinfo")).unwrap();
        let points = text.lines().filter_map(|line| line.split(' ').nth(4));
        points.map(str::to_owned).collect::<Vec<_>>()
    };
    let before = mounts(&pair);
    assert!(before.iter().any(|point| point == "/dev/null"), "{before:?}");
    pair.round(false).unwrap();
    pair.round(true).unwrap();
    assert_eq!(mounts(&pair), before);
    assert_equal(&pair, "with mounts");
}

#[test]
fn a_full_tmpfs_arrives_with_its_limits() {
    let mut pair = Pair::new(|_| ());
    let plan = ckpt_format::container::Container::fresh("ve");
    let lock = plan.mounts.iter().find(|mount| mount.point == "/run/lock").unwrap();
    let lock = pair.source.tree_of(lock.filesystem);
    let fill = |pair: &Pair, name: &str, byte: u8| {
        pair.source.inside(lock, |top| {
            let file = fs::File::create(top.join(name))?;
            let mut offset = 0;
            while file.write_all_at(&[byte; 4096], offset).is_ok() {
                offset += 4096;
            }
            Ok(())
        });
    };
    fill(&pair, "b", 1);
    pair.round(false).unwrap();
    pair.source.inside(lock, |top| fs::remove_file(top.join("b")));
    fill(&pair, "a", 2);
    pair.round(false).unwrap();
    pair.round(true).unwrap();
    assert_equal(&pair, "full");
    pair.finish().unwrap();
    let room = |side: &crate::pair::Side| {
        let status = nix::sys::statfs::fstatfs(side.mount(lock)).unwrap();
        (status.blocks(), status.blocks_free(), status.files())
    };
    assert_eq!(room(&pair.target), room(&pair.source));
}

#[test]
fn ten_thousand_files_cost_little_when_nothing_changes() {
    let mut pair = Pair::new(|_| ());
    pair.source.inside(0, |top| {
        for directory in 0..100 {
            let directory = top.join(format!("d{directory}"));
            fs::create_dir(&directory)?;
            for file in 0..100 {
                // Few with contents, because file systems may take long to free space again.
                let text: &[u8] = if file == 0 { b"some text" } else { b"" };
                fs::write(directory.join(format!("f{file}")), text)?;
            }
        }
        Ok(())
    });
    let plan = pair.source.plan();
    let trees = pair.source.trees(&plan);
    let size = node::storage::size(&trees).unwrap();
    assert!((100 * 4096..10 * MIB).contains(&size), "{size}");
    pair.tracker = node::storage::FileTracker::new(trees).with_write_time_max(-3600);
    let begin = std::time::Instant::now();
    let first = pair.round(false).unwrap();
    let (first_time, begin) = (begin.elapsed(), std::time::Instant::now());
    let second = pair.round(true).unwrap();
    eprintln!("first {first_time:?} {first:?}, last {:?} {second:?}", begin.elapsed());
    // The top of each tree is always described.
    assert_eq!(second.records, pair.numbers.len() as u64);
    assert_eq!(second.data_bytes, 0);
    assert_equal(&pair, "many");
}

/// Waits until what changes now has another time than what has changed before.
fn wait_for_tick(pair: &Pair) {
    use std::os::unix::fs::MetadataExt;
    let probe = || {
        let probe = tempfile::tempfile_in(pair.directory.path()).unwrap().metadata().unwrap();
        (probe.ctime(), probe.ctime_nsec())
    };
    let before = probe();
    while probe() == before {}
}

#[test]
fn a_last_round_that_trusts_times_finds_every_kind_of_change() {
    type Change = fn(&std::path::Path) -> std::io::Result<()>;
    let changes: [(&str, Change); 8] = [
        ("nothing", |_| Ok(())),
        ("contents", |top| fs::write(top.join("d/b"), "other text")),
        ("a new file", |top| fs::write(top.join("d/new"), "new")),
        ("a removed file", |top| fs::remove_file(top.join("d/c"))),
        ("a renamed file", |top| fs::rename(top.join("d/b"), top.join("e/b"))),
        ("a second name", |top| fs::hard_link(top.join("d/a"), top.join("e/a"))),
        ("a replaced file", |top| {
            fs::write(top.join("d/x"), "some text")?;
            fs::rename(top.join("d/x"), top.join("d/a"))
        }),
        ("permissions", |top| {
            use std::os::unix::fs::PermissionsExt;
            fs::set_permissions(top.join("e"), fs::Permissions::from_mode(0o700))?;
            fs::set_permissions(top.join("d/a"), fs::Permissions::from_mode(0o600))
        }),
    ];
    for (what, change) in changes {
        let mut pair = Pair::new(|_| ());
        pair.source.inside(0, |top| {
            fs::create_dir(top.join("d"))?;
            fs::create_dir(top.join("e"))?;
            ["a", "b", "c"].iter().try_for_each(|it| fs::write(top.join("d").join(it), "some text"))
        });
        let plan = pair.source.plan();
        let trees = pair.source.trees(&plan);
        pair.tracker = node::storage::FileTracker::new(trees).with_write_time_max(-3600);
        pair.round(false).unwrap();
        wait_for_tick(&pair);
        pair.source.inside(0, change);
        pair.round(true).unwrap();
        assert_equal(&pair, what);
    }
}

#[test]
fn a_file_that_nobody_writes_any_more_is_not_compared_again() {
    let mut pair = Pair::new(|_| ());
    pair.source.inside(0, |top| {
        fs::write(top.join("done"), vec![1; MIB as usize])?;
        fs::write(top.join("open"), vec![2; 2 * MIB as usize])
    });
    let open = fs::File::options().write(true).open(pair.source.path(0).join("open")).unwrap();
    // As old as the times of files are coarse, with much room.
    let old = std::time::Instant::now() + std::time::Duration::from_millis(150);
    while std::time::Instant::now() < old {
        std::thread::yield_now();
    }
    assert_eq!(pair.round(false).unwrap().compared_bytes, 3 * MIB);
    assert_eq!(pair.round(true).unwrap().compared_bytes, 2 * MIB);
    drop(open);
    assert_equal(&pair, "nobody writes");
}
