//! How overlays were mounted is found out, and it is noticed where it cannot be.

use crate::bench::Bench;
use ckpt_engine::{container::capture, procfs};
use ckpt_format::container::{FilesystemKind, Overlay};
use nix::sys::wait::WaitStatus;

const IDLE: &str = "while :; do sleep 1000; done";

/// Layers with a file each, on a tmpfs and on the VE's own files.
const LAYERS: &str = "
    set -e
    mkdir -p /m /own /o1 /o2 /o3 /o4 && mount -t tmpfs m /m
    mkdir /m/a /m/b /m/c /m/u /m/w /m/u2 /m/w2 && echo x > /own/own
    for name in a b c; do echo $name > /m/$name/$name; done";

fn run(bench: &Bench, script: &str) -> ckpt_engine::container::Captured {
    let init = bench.start(IDLE);
    let (output, status) = bench.run(&init, &format!("{LAYERS}\n{script}"));
    assert!(matches!(status, WaitStatus::Exited(_, 0)), "{output}");
    let pids = procfs::cgroup_processes(&bench.cgroup).expect("the processes");
    capture(init.pid, &pids).expect("a look at it")
}

#[test]
fn what_hides_the_layers_of_an_overlay_is_found() {
    let bench = Bench::new();
    let found = run(
        &bench,
        "mount -t overlay o -o lowerdir=/m/a:/own /own
         mount -t overlay o -o lowerdir=/m/b:/m/c /o1
         mount -t overlay o -o lowerdir=/m/a,upperdir=/m/u,workdir=/m/w,userxattr /m/a
         echo y > /m/a/y
         mount -t overlay o -o lowerdir=/m/a:/m/c /o2
         mount -t tmpfs over /m/c && echo z > /m/c/z",
    );
    let plan = found.unwrap().plan;
    let mut overlays: Vec<(&str, &Overlay, u32)> = Vec::new();
    for mount in &plan.mounts {
        if let FilesystemKind::Overlay(overlay) = &plan.filesystems[mount.filesystem as usize].kind
        {
            overlays.push((&mount.point, overlay, mount.filesystem));
        }
    }
    let of = |point: &str| overlays.iter().find(|it| it.0 == point).unwrap();
    let covers = |point: &str| of(point).1.covers.clone();
    assert_eq!(overlays.len(), 4);
    assert_eq!((covers("/own"), covers("/m/a")), (vec![], vec![]));
    assert_eq!((covers("/o1"), covers("/o2")), (vec!["/m/c".to_owned()], vec!["/m/c".to_owned()]));
    assert_eq!((&of("/o1").1.on, &of("/o2").1.on), (&vec![], &vec![of("/m/a").2]));
}

#[test]
fn a_layer_that_is_not_found_any_more_is_named() {
    let bench = Bench::new();
    let found = run(
        &bench,
        "mount -t overlay o -o lowerdir=/m/a:/own /o1
         mount -t overlay o -o lowerdir=/m/b:/own /o2
         mount -t overlay o -o lowerdir=/own,upperdir=/m/u,workdir=/m/w,userxattr /o3
         cd /m && mount -t overlay o -o lowerdir=c:u2 /o4
         mv /m/a /m/away
         mv /m/b /m/away-too && mkdir /m/b && echo other > /m/b/other
         mv /m/u /m/empty && mkdir /m/u",
    );
    let blockers: Vec<String> = found.unwrap_err().into_iter().map(|it| it.object).collect();
    for (layer, point) in [("/m/a", "/o1"), ("/m/b", "/o2"), ("/m/u", "/o3"), ("c", "/o4")] {
        let wanted =
            format!("an overlay whose layer {layer} is not found any more mounted on {point}");
        assert!(blockers.contains(&wanted), "{wanted}: {blockers:#?}");
    }
    assert_eq!(blockers.len(), 4);
}
