//! What a VE cannot do, before a move and after it.

use chaos_tests::scene::Scene;
use chaos_tests::testbed::Host;

const VE: &str = "101";

/// Makes a system call in the VE without arguments that mean anything. Returns its error number.
fn error_of(scene: &Scene, node: Host, number: i64) -> i32 {
    let line = format!("perl -e 'syscall({number}, -1, 0, 0, 0, 0) == -1 and print $! + 0'");
    let printed = scene.inside(node, VE, &line).expect("perl runs");
    printed.trim().parse().unwrap_or(0)
}

fn check_calls(scene: &Scene, node: Host) {
    for (number, expected) in [
        (libc::SYS_io_uring_setup, libc::ENOSYS),
        (libc::SYS_landlock_create_ruleset, libc::ENOSYS),
        (libc::SYS_open_by_handle_at, libc::EPERM),
        (libc::SYS_bpf, libc::EPERM),
        (libc::SYS_userfaultfd, libc::EPERM),
        (libc::SYS_init_module, libc::EPERM),
        (libc::SYS_kexec_load, libc::EPERM),
        // Not refused: what is wrong is only the descriptor.
        (libc::SYS_setns, libc::EBADF),
    ] {
        assert_eq!(error_of(scene, node, number), expected, "system call {number} on {node}");
    }
    // Programs that change the user work: "no new privileges" is not set.
    let line = "grep -h -e ^Seccomp -e ^NoNewPrivs /proc/1/status /proc/self/status | sort | uniq";
    let told = scene.inside(node, VE, line).expect("it answers");
    let told: Vec<&str> = told.split_whitespace().collect();
    assert_eq!(told, ["NoNewPrivs:", "0", "Seccomp:", "2", "Seccomp_filters:", "1"], "{node}");
}

#[test]
fn refused_system_calls_stay_refused_on_every_node() {
    let scene = Scene::up("refused", 2).expect("the scene works");
    let (source, target) = (Host::Node(1), Host::Node(2));
    scene.make_ve(source, VE, "10.77.1.1").expect("the scene works");
    check_calls(&scene, source);
    scene.good(source, &["vzmigrate", "--online", "node2", VE]).expect("the filter is no blocker");
    check_calls(&scene, target);
    scene.good(target, &["vzmigrate", "--online", "node1", VE]).expect("nor is it afterwards");
    check_calls(&scene, source);
}

#[test]
fn a_filter_that_a_program_installed_goes_along() {
    let scene = Scene::up("filter", 2).expect("the scene works");
    let node = Host::Node(1);
    scene.make_ve(node, VE, "10.77.1.1").expect("the scene works");
    // One instruction: everything is allowed.
    let program = "$one = pack(\"SCCL\", 6, 0, 0, 0x7fff0000); $all = pack(\"Sx6P\", 1, $one); \
                   syscall(317, 1, 0, $all) == 0 or die; open F, \">/run/filtered\"; sleep";
    let line = format!("setsid perl -e '{program}' </dev/null >/dev/null 2>&1 &");
    scene.inside(node, VE, &line).expect("the scene works");
    let there =
        || Ok(scene.run(node, &["vzctl", "exec2", VE, "test -e /run/filtered"])?.code == Some(0));
    scene.wait("the filter", 20, there).expect("the scene works");
    // Its own, and the one that every process of a VE has.
    let filters = |node| {
        let text = scene.inside(node, VE, "grep Seccomp_filters /proc/$(pidof perl)/status");
        text.expect("the scene works").split_whitespace().last().map(str::to_owned)
    };
    assert_eq!(filters(node).as_deref(), Some("2"));
    scene.good(node, &["vzmigrate", "node2", VE]).expect("the filter is no blocker");
    assert_eq!(filters(Host::Node(2)).as_deref(), Some("2"));
}

/// What root of a VE may write: settings of its own namespaces, and triggers that wake up whoever
/// writes them, which every user of the host may.
const OWN_SETTINGS: [&str; 6] = [
    "/proc/sys/net/",
    "/proc/sys/fs/mqueue/",
    "/proc/sys/user/",
    "/proc/sys/kernel/",
    "/sys/fs/cgroup/",
    "/proc/pressure/",
];

#[test]
fn root_inside_reaches_nothing_of_the_host() {
    let scene = Scene::up("reach", 1).expect("the scene works");
    let node = Host::Node(1);
    scene.make_ve(node, VE, "10.77.1.1").expect("the scene works");
    let line = "find /proc /sys -type f -writable 2>/dev/null | grep -v '^/proc/[0-9]' || true";
    let found = scene.inside(node, VE, line).expect("find runs");
    assert!(found.contains("/proc/sys/net/"), "the look itself fails: {found}");
    let strange: Vec<&str> = found
        .lines()
        .filter(|path| !OWN_SETTINGS.iter().any(|own| path.starts_with(own)))
        .collect();
    assert!(strange.is_empty(), "{strange:#?}");
    // Of the kernel's settings only those of the namespaces for names, IPC and processes.
    let own =
        ["sem", "shm", "msg", "auto_msgmni", "hostname", "domainname", "ns_last_pid", "pid_max"];
    let kernel = found.lines().filter_map(|path| path.strip_prefix("/proc/sys/kernel/"));
    let strange: Vec<&str> =
        kernel.filter(|name| !own.iter().any(|own| name.starts_with(own))).collect();
    assert!(strange.is_empty(), "{strange:#?}");
    for path in ["/proc/kcore", "/proc/kmsg", "/proc/timer_list", "/proc/slabinfo", "/dev/kmsg"] {
        let line = format!("head -c 1 {path} >/dev/null 2>&1");
        let ran = scene.run(node, &["vzctl", "exec2", VE, &line]).expect("the scene works");
        assert_ne!(ran.code, Some(0), "{path} can be read");
    }
    for step in ["mount -t debugfs none /mnt", "mount -t tracefs none /mnt", "mknod /tmp/m c 1 1"] {
        let ran = scene.run(node, &["vzctl", "exec2", VE, step]).expect("the scene works");
        assert_ne!(ran.code, Some(0), "{step} works");
    }
}
