//! VEs from their creation to their end, with a real daemon. Needs root.

#[expect(clippy::print_stderr, reason = "a failed test shows what the daemon said")]
mod host;

use std::{fs, path::Path};

use host::{Host, TEMPLATE};
use node::{
    api::{Failure, Request, TemplateRequest, VeRequest},
    ve::{Changes, Status, StopMode},
};

fn changes(ipadd: &str) -> Changes {
    Changes { ipadd: vec![ipadd.into()], ..Changes::default() }
}

fn some(text: &str) -> Option<String> {
    Some(text.to_owned())
}

fn status(host: &Host, ve: &str) -> Status {
    host.ask(&Request::Ve(VeRequest::Status { ve: ve.into() })).expect("a status")
}

fn stop(host: &Host, ve: &str, mode: StopMode) -> Result<(), Failure> {
    host.ve(VeRequest::Stop { ve: ve.into(), mode })
}

fn set(host: &Host, changes: Changes) -> Result<(), Failure> {
    host.ve(VeRequest::Set { ve: "101".into(), changes, save: true })
}

#[test]
fn a_ve_lives_and_leaves_nothing() {
    let host = Host::start("life");
    let named =
        Changes { name: some("web"), hostname: some("web.example"), ..changes("10.77.1.1") };
    host.create("101", named).unwrap();
    assert!(!status(&host, "web").running);
    host.start_ve("web").unwrap();
    assert!(status(&host, "101").running);
    let (output, code) = host.run("web", "id -u; hostname; cat /etc/hostname /proc/1/comm; exit 5");
    assert_eq!((output.as_str(), code), ("0\nweb.example\nweb.example\ninit\n", 5));
    let (routes, _) = host.run("101", "cat /proc/net/fib_trie");
    assert!(routes.contains("10.77.1.1"), "{routes}");
    let ve = &host.list()[0];
    let outside = fs::metadata(format!("/proc/{}", ve.init_pid.unwrap())).unwrap();
    assert_eq!(std::os::unix::fs::MetadataExt::uid(&outside), 100_000);
    host.run("101", "echo kept > /root/file");

    stop(&host, "101", StopMode::Orderly).unwrap();
    assert_eq!(host.cgroups(), Vec::<std::path::PathBuf>::new());
    host.start_ve("101").unwrap();
    assert_eq!(host.run("101", "cat /root/file").0, "kept\n");
    stop(&host, "101", StopMode::Fast).unwrap();

    host.ve(VeRequest::Destroy { ve: "101".into() }).unwrap();
    assert!(!status(&host, "101").exists);
    assert!(!Path::new(&ve.private).exists());
    let links = host.netns.run(|| fs::read_to_string("/proc/thread-self/net/dev").unwrap());
    assert!(!links.unwrap().contains("veth101"));
    // The template's cache is still named, so its layer stays for the next VE.
    let listed: Vec<node::template::Listed> =
        host.ask(&Request::Template(TemplateRequest::List)).unwrap();
    assert!(listed.iter().any(|it| it.name == TEMPLATE && it.cache.is_some()));
    let remove = TemplateRequest::Remove(TEMPLATE.into());
    host.ask::<()>(&Request::Template(remove)).unwrap();
    let lower = host.directory.path().join("template/lower");
    assert_eq!(fs::read_dir(lower).unwrap().count(), 0);
}

#[test]
fn limits_hold_and_change_while_it_runs() {
    let host = Host::start("limits");
    host.create("101", Changes { ram: some("64M"), ..changes("10.77.1.1") }).unwrap();
    host.start_ve("101").unwrap();
    // Memory: tail keeps the only line, which never ends.
    let (_, code) = host.run("101", "tail /dev/zero");
    assert_eq!(code, 137);
    assert!(status(&host, "101").running, "only the hog may die");
    set(&host, Changes { numproc: some("20"), ..Changes::default() }).unwrap();
    let bomb = "i=0; while [ $i -lt 50 ]; do sleep 100 >/dev/null 2>&1 & i=$((i+1)); done";
    let (output, _) = host.run("101", bomb);
    assert!(output.contains("fork"), "{output}");
    assert!(host.list()[0].usage.processes <= 20);
    // What is there may stay, and more is allowed again.
    set(&host, Changes { numproc: some("unlimited"), ..Changes::default() }).unwrap();
    assert_eq!(host.run("101", "sleep 0 & wait; echo ok"), ("ok\n".into(), 0));
    let config = fs::read_to_string(host.directory.path().join("state/ve/101/ve.conf")).unwrap();
    assert!(config.contains("NUMPROC=\"unlimited\""), "{config}");
}

#[test]
fn addresses_change_while_it_runs() {
    let host = Host::start("addresses");
    host.create("101", changes("10.77.1.1")).unwrap();
    host.start_ve("101").unwrap();
    set(&host, Changes { ipdel: vec!["all".into()], ..changes("10.77.1.9") }).unwrap();
    let (table, _) = host.run("101", "cat /proc/net/fib_trie");
    assert!(table.contains("10.77.1.9") && !table.contains("10.77.1.1\n"), "{table}");
}

#[test]
fn a_ve_does_not_die_with_the_daemon() {
    let mut host = Host::start("daemon");
    host.create("101", changes("10.77.1.1")).unwrap();
    host.start_ve("101").unwrap();
    let init = host.list()[0].init_pid;
    host.kill_daemon();
    host.start_daemon();
    assert_eq!(host.list()[0].init_pid, init);
    assert_eq!(host.run("101", "echo here"), ("here\n".into(), 0));
    stop(&host, "101", StopMode::Orderly).unwrap();
    assert!(host.cgroups().is_empty());
}

#[test]
fn what_ended_while_no_daemon_ran_is_tidied_up() {
    let mut host = Host::start("ended");
    host.create("101", changes("10.77.1.1")).unwrap();
    host.start_ve("101").unwrap();
    let init = host.list()[0].init_pid.unwrap();
    host.kill_daemon();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(init), nix::sys::signal::Signal::SIGKILL)
        .unwrap();
    while Path::new(&format!("/proc/{init}/root/proc")).exists() {
        std::thread::yield_now();
    }
    host.start_daemon();
    assert!(!status(&host, "101").running);
    assert!(host.cgroups().is_empty());
    host.start_ve("101").unwrap();
}

#[test]
fn an_end_from_inside_is_noticed() {
    let host = Host::start("inside");
    host.create("101", changes("10.77.1.1")).unwrap();
    host.start_ve("101").unwrap();
    host.run("101", "kill -TERM 1");
    while status(&host, "101").running {
        std::thread::yield_now();
    }
    assert!(host.cgroups().is_empty());
    host.start_ve("101").unwrap();
}

#[test]
fn mistakes_have_their_codes_and_change_nothing() {
    let host = Host::start("mistakes");
    host.create("101", Changes { name: some("web"), ..changes("10.77.1.1") }).unwrap();
    let code = |outcome: Result<(), Failure>| outcome.unwrap_err().exit;
    assert_eq!(code(host.start_ve("999")), 14);
    assert_eq!(code(stop(&host, "101", StopMode::Orderly)), 31);
    assert_eq!(code(host.create("101", Changes::default())), 44);
    assert_eq!(code(host.create("100", Changes::default())), 21);
    assert_eq!(code(host.create("102", changes("10.77.1.1"))), 78);
    assert_eq!(code(host.create("102", changes("10.77.1"))), 71);
    let same_name = Changes { name: some("web"), ..Changes::default() };
    assert_eq!(code(host.create("102", same_name)), 131);
    let no_template = Changes { ostemplate: some("no-such"), ..Changes::default() };
    assert_eq!(code(host.create("102", no_template)), 91);
    assert_eq!(code(set(&host, Changes { ram: some("12X"), ..Changes::default() })), 21);
    set(&host, Changes { disabled: some("yes"), ..Changes::default() }).unwrap();
    assert_eq!(code(host.start_ve("101")), 105);
    set(&host, Changes { disabled: some("no"), ..Changes::default() }).unwrap();
    host.start_ve("101").unwrap();
    assert_eq!(code(host.start_ve("101")), 32);
    assert_eq!(code(host.ve(VeRequest::Destroy { ve: "101".into() })), 32);
    assert_eq!(host.list().len(), 1);
    let entries = fs::read_dir(host.directory.path().join("state/ve")).unwrap();
    assert_eq!(entries.count(), 1);
}
