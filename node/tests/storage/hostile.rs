//! A source that wants out of the tree gets nothing.

use std::{fs, os::unix::fs::symlink};

use ckpt_format::tree::{Attributes, FileRecord, Node, Step};
use node::storage::TreeError;

use crate::pair::Pair;

fn path(path: &str) -> Vec<u8> {
    path.as_bytes().to_vec()
}

/// Applies steps to a fresh target: the first error.
fn attempt(steps: Vec<Step>) -> TreeError {
    let mut pair = Pair::new(|_| ());
    let outside = pair.directory.path().join("outside");
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("file"), "untouched").unwrap();
    symlink(&outside, pair.target.upper.join("out")).unwrap();
    symlink("../../../outside", pair.target.upper.join("up")).unwrap();
    symlink(outside.join("file"), pair.target.upper.join("file")).unwrap();
    let apply = |step| pair.applier().apply(FileRecord { tree: 0, step });
    let result = steps.into_iter().try_for_each(apply);
    let error = result.and_then(|()| pair.applier().flush()).unwrap_err();
    // Nothing is done after an error.
    assert!(matches!(pair.applier().flush(), Err(TreeError::Stopped)));
    assert_eq!(fs::read_to_string(outside.join("file")).unwrap(), "untouched");
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 1);
    error
}

#[test]
fn nothing_is_written_through_links() {
    for to in ["out/new", "up/new"] {
        let error = attempt(vec![Step::Make { path: path(to), node: Node::File }]);
        assert!(matches!(error, TreeError::File { .. }), "{error:?}");
        attempt(vec![Step::Link { existing: path("out/file"), path: path("x") }]);
        attempt(vec![Step::Park { path: path("out/file"), number: 1 }]);
    }
    for to in ["file", "out/file"] {
        attempt(vec![Step::Resize { path: path(to), size: 0 }]);
        attempt(vec![Step::Data { path: path(to), offset: 0, data: b"x".to_vec().into() }]);
        attempt(vec![Step::Hole { path: path(to), offset: 0, length: 1 }]);
    }
    let attributes = Attributes { mode: 0o7777, ..Attributes::default() };
    attempt(vec![Step::Describe { path: path("out/file"), attributes }]);
}

#[test]
fn paths_that_go_up_are_refused() {
    for to in ["../x", "/x", "a/../../x", "..", "./x"] {
        let error = attempt(vec![Step::Make { path: path(to), node: Node::File }]);
        assert!(matches!(error, TreeError::Refused { .. }), "{error:?}");
        attempt(vec![Step::Remove { path: path(to) }]);
        attempt(vec![Step::Park { path: path(to), number: 1 }]);
    }
}

#[test]
fn steps_out_of_order_are_errors() {
    attempt(vec![Step::Place { number: 1, path: path("x") }]);
    attempt(vec![Step::Discard { number: 1 }]);
    attempt(vec![Step::Data { path: path("none"), offset: 0, data: vec![1].into() }]);
    attempt(vec![
        Step::Make { path: path("d"), node: Node::Directory { opaque: false } },
        Step::Data { path: path("d"), offset: 0, data: vec![1].into() },
    ]);
    attempt(vec![
        Step::Make { path: path("pipe"), node: Node::Fifo },
        Step::Data { path: path("pipe"), offset: 0, data: vec![1].into() },
    ]);
    attempt(vec![Step::Remove { path: path("x") }, Step::Park { path: path("x"), number: 1 }]);
}

#[test]
fn a_description_of_a_link_is_not_about_what_it_points_to() {
    let mut pair = Pair::new(|_| ());
    let file = pair.directory.path().join("outside");
    fs::write(&file, "x").unwrap();
    let before = fs::metadata(&file).unwrap();
    let steps = [
        Step::Make {
            path: path("link"),
            node: Node::Symlink { target: file.as_os_str().as_encoded_bytes().to_vec() },
        },
        Step::Describe { path: path("link"), attributes: Attributes::default() },
    ];
    for step in steps {
        pair.applier().apply(FileRecord { tree: 0, step }).unwrap();
    }
    pair.applier().flush().unwrap();
    let after = fs::metadata(&file).unwrap();
    assert_eq!(after.permissions(), before.permissions());
    assert_eq!(after.modified().unwrap(), before.modified().unwrap());
}

#[test]
fn a_full_tree_is_told_apart() {
    let mut pair = Pair::new(|_| ());
    // `/run/lock` of a fresh VE has 5 MiB, and while it is filled twice that and 64 MiB more.
    let plan = ckpt_format::container::Container::fresh("ve");
    let lock = plan.mounts.iter().find(|mount| mount.point == "/run/lock").unwrap();
    let tree = u32::try_from(pair.source.tree_of(lock.filesystem)).unwrap();
    let mut steps = vec![Step::Make { path: path("x"), node: Node::File }];
    for offset in 0..80u64 {
        let data = vec![1; 1 << 20];
        steps.push(Step::Data { path: path("x"), offset: offset << 20, data: data.into() });
    }
    let result =
        steps.into_iter().try_for_each(|step| pair.applier().apply(FileRecord { tree, step }));
    let error = result.and_then(|()| pair.applier().flush()).unwrap_err();
    assert!(matches!(error, TreeError::Full { .. }), "{error:?}");
}
