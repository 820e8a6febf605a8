//! What a VE's network namespace holds is the same after it was captured and rebuilt.
//!
//! Needs root. Works only in network namespaces of its own. The namespace is furnished with the
//! tools that people use, so that the capture is tested against those and not against itself.
#![expect(clippy::unwrap_used, reason = "a test that cannot set up its hosts has failed")]

use std::{
    io::Read,
    process::{Child, Command, Stdio},
    slice::from_ref,
    time::Instant,
};

use ckpt_engine::sys::netns::Netns;
use ckpt_format::{
    blocker::Blocker,
    codec,
    network::{Mac, Network, Setting},
};
use node::network::{
    Bridge, BridgeConfig, Gate, Interface, InterfaceConfig, NetworkError,
    state::{self, Expected, RESTORE_WINDOW, Routes},
};

/// What is in one network alone, which most of these tests are about.
struct Captured {
    network: Network,
    blockers: Vec<Blocker>,
}

fn capture(
    netns: &Netns,
    expected: &[Expected],
    known: Option<&[Setting]>,
) -> Result<Captured, NetworkError> {
    let known = known.map(|known| vec![known.to_vec()]);
    let mut found = state::capture(from_ref(netns), expected, 0, known.as_deref())?;
    Ok(Captured { network: found.networks.remove(0), blockers: found.blockers })
}

fn rebuild(netns: &Netns, network: &Network, routes: Routes) -> Result<(), NetworkError> {
    state::rebuild(from_ref(netns), from_ref(network), 0, routes)
}

fn set_filter(netns: &Netns, network: &Network) -> Result<(), NetworkError> {
    state::set_filter(from_ref(netns), from_ref(network))
}

fn check_filter(netns: &Netns, network: &Network) -> Result<(), NetworkError> {
    state::check_filter(from_ref(netns), from_ref(network))
}

fn set_routes(netns: &Netns, network: &Network, routes: Routes) -> Result<(), NetworkError> {
    state::set_routes(from_ref(netns), from_ref(network), routes)
}

struct Ve {
    netns: Netns,
    _host: Netns,
    _owner: Owner,
}

/// A process whose user namespace owns its network namespace, as in a VE.
struct Owner(Child);

impl Owner {
    fn new() -> Self {
        let mut command = Command::new("unshare");
        command.args(["--user", "--map-root-user", "--net", "sh", "-c", "echo; exec sleep 1000"]);
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        // It writes once it is inside.
        child.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
        Self(child)
    }

    fn netns(&self) -> Netns {
        Netns::of_process(self.0.id().try_into().unwrap()).unwrap()
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

/// A namespace with an interface on the bridge of a host of its own.
fn ve(mac: Mac, gate: Gate) -> Ve {
    let host = Netns::create().expect("needs root");
    let owner = Owner::new();
    let netns = owner.netns();
    let config = InterfaceConfig {
        host_name: "veth101.0".into(),
        name: "eth0".into(),
        mac,
        addresses: vec!["10.99.1.1/16".parse().unwrap(), "fd99::1/64".parse().unwrap()],
        gateways: vec![[10, 99, 0, 1].into()],
    };
    host.run(|| {
        let bridge = Bridge::ensure(&BridgeConfig::default()).unwrap();
        match gate {
            Gate::Open => Interface::attach(&netns, &bridge, &config).unwrap(),
            Gate::Closed => Interface::create(&netns, &bridge, &config, gate).unwrap(),
        };
    })
    .unwrap();
    Ve { netns, _host: host, _owner: owner }
}

fn expected(mac: Mac) -> Vec<Expected> {
    vec![Expected { name: "eth0".into(), mac }]
}

/// Waits until no address is still being asked for: until then its routes are missing.
fn settle(netns: &Netns) {
    let wait = "i=0; while ip -6 address show tentative | grep -q inet6; do \
                i=$((i+1)); [ $i -lt 200 ]; sleep 0.05; done";
    shell(netns, wait);
}

fn shell(netns: &Netns, script: &str) {
    let output = netns.run(|| Command::new("sh").args(["-ec", script]).output()).unwrap().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

fn objects(captured: &Captured) -> Vec<&str> {
    captured.blockers.iter().map(|blocker| blocker.object.as_str()).collect()
}

const FURNITURE: &str = "
ip link set eth0 mtu 1400 txqueuelen 500 allmulticast on
ip addr add 10.99.1.2/16 dev eth0 label eth0:web
ip addr add 10.98.0.1/24 dev eth0 noprefixroute
ip addr add 192.0.2.1 peer 192.0.2.2 dev eth0
ip addr add fd99::2/64 dev eth0 nodad
ip addr add 10.97.0.1/24 dev eth0 metric 50 valid_lft 3000 preferred_lft 2000
ip route add 10.50.0.0/16 via 10.99.0.9 metric 7 mtu 1300 advmss 1200
ip route add 10.51.0.0/16 nexthop via 10.99.0.8 weight 2 nexthop via 10.99.0.9
ip route add blackhole 10.52.0.0/16
ip route add unreachable fd98::/32
ip route add 10.53.0.0/16 via inet6 fd99::9
ip route add 10.54.0.0/16 via 172.16.0.1 dev eth0 onlink
ip route add default via 10.99.0.1 table 100
ip route add fd97::/48 via fd99::9 metric 30
ip -6 route add default via fe80::1 dev eth0
ip route del 10.99.0.0/16 dev eth0 proto kernel
ip route add 10.99.0.0/16 dev eth0 proto static scope link src 10.99.1.2
ip rule add from 10.99.1.2 table 100 priority 500
ip rule add fwmark 0x7/0xff table 100
ip rule add iif eth0 lookup main suppress_prefixlength 0
ip -6 rule add to fd97::/48 table 200
ip rule del priority 32767
ip neigh add 10.99.0.9 lladdr 02:00:00:00:00:09 dev eth0 nud permanent
ip neigh add 10.99.0.8 lladdr 02:00:00:00:00:08 dev eth0 nud reachable
ip neigh add fd99::9 lladdr 02:00:00:00:00:09 router dev eth0 nud stale
ip neigh add proxy 10.99.3.3 dev eth0
echo 1 > /proc/sys/net/ipv4/ip_forward
echo 77 > /proc/sys/net/ipv4/tcp_keepalive_time
echo 2 > /proc/sys/net/ipv4/conf/eth0/rp_filter
echo '2000 3000' > /proc/sys/net/ipv4/ip_local_port_range
";

#[test]
fn a_furnished_namespace_is_the_same_after_it_was_rebuilt() {
    let mac = Mac::local([7; 6]);
    let source = ve(mac, Gate::Open);
    shell(&source.netns, FURNITURE);
    settle(&source.netns);
    let captured = capture(&source.netns, &expected(mac), None).unwrap();
    assert_eq!(objects(&captured), [""; 0]);
    let network = codec::decode(&codec::encode(&captured.network)).unwrap();
    assert_eq!(captured.network, network);

    let target = ve(mac, Gate::Closed);
    rebuild(&target.netns, &network, Routes::ForRestore).unwrap();
    rebuild(&target.netns, &network, Routes::Exact).unwrap();
    let again = capture(&target.netns, &expected(mac), None).unwrap();
    assert_eq!(objects(&again), [""; 0]);
    same(&again, &captured);

    // In the blackout, when nothing has changed, this must cost next to nothing.
    let start = Instant::now();
    let quick = capture(&source.netns, &expected(mac), Some(&network.settings)).unwrap();
    let capture_time = start.elapsed();
    let start = Instant::now();
    rebuild(&target.netns, &quick.network, Routes::Exact).unwrap();
    println!("second capture {capture_time:?}, second rebuild {:?}", start.elapsed());

    // What went away on the source goes away on the target.
    shell(&source.netns, "ip addr del 10.99.1.2/16 dev eth0; ip rule del priority 500");
    shell(&source.netns, "ip route del 10.51.0.0/16; ip route del default via 10.99.0.1");
    let captured = capture(&source.netns, &expected(mac), Some(&network.settings)).unwrap();
    rebuild(&target.netns, &captured.network, Routes::Exact).unwrap();
    let again = capture(&target.netns, &expected(mac), Some(&network.settings)).unwrap();
    same(&again, &captured);
}

/// Compares list by list, so that a difference can be read.
fn same(found: &Captured, wanted: &Captured) {
    let (found, wanted) = (&found.network, &wanted.network);
    assert_eq!(found.links, wanted.links);
    let addresses = |network: &Network| {
        let mut addresses = network.addresses.clone();
        for address in &mut addresses {
            // The rest of a limited life goes on.
            if address.lifetime_s.1 != u32::MAX {
                assert!(address.lifetime_s.1 > 2900);
                address.lifetime_s = (0, 0);
            }
        }
        addresses.sort_by_key(|address| (address.local, address.prefix));
        addresses
    };
    assert_eq!(addresses(found), addresses(wanted));
    let sorted = |network: &Network| {
        let mut routes: Vec<_> = network.routes.iter().map(|r| format!("{r:?}")).collect();
        routes.sort();
        routes
    };
    assert_eq!(sorted(found), sorted(wanted));
    assert_eq!(found.rules, wanted.rules);
    let sorted = |network: &Network| {
        let mut neighbours = network.neighbours.clone();
        neighbours.sort_by_key(|neighbour| (neighbour.address, neighbour.flags));
        neighbours
    };
    assert_eq!(sorted(found), sorted(wanted));
    assert_eq!(found.settings, wanted.settings);
}

const FILTER: &str = "nft -f - <<'END'
table inet mine {
    comment \"of a test\"
    counter visits { packets 5 bytes 700 }
    quota much { over 3 mbytes used 10 kbytes }
    limit slow { rate 4/second burst 9 packets }
    set known { type ipv4_addr; flags interval; elements = { 10.1.0.0/16, 10.3.0.1-10.3.0.9 } }
    set recent { type ipv4_addr . inet_service; flags dynamic, timeout; timeout 1h; size 100;
                 elements = { 10.1.1.1 . 80 expires 30m } }
    set counted { type ipv4_addr; counter; elements = { 10.9.9.9 counter packets 3 bytes 99 } }
    map ports { type inet_service : verdict; elements = { 22 : accept, 80 : jump web } }
    map owners { type ipv4_addr : counter; elements = { 10.5.5.5 : \"visits\" } }
    chain web {
        tcp dport 80 add @recent { ip saddr . tcp dport timeout 5m } accept
        ct state established,related counter packets 11 bytes 1100 accept
        limit name \"slow\" log prefix \"web \" group 3 reject with tcp reset
    }
    chain input {
        type filter hook input priority filter; policy drop;
        iif lo accept
        iifname { eth0, eth7 } tcp dport vmap @ports
        ip saddr { 10.7.0.1, 10.7.0.2 } counter name visits accept comment \"friends\"
        ip saddr @known meta mark set 0x7 quota name much drop
        icmpv6 type { nd-neighbor-solicit, nd-router-advert } accept
    }
    chain forward {
        type filter hook forward priority 0;
    }
}
table ip nat {
    chain out {
        type nat hook postrouting priority srcnat;
        oifname eth0 masquerade;
    }
    chain in {
        type nat hook prerouting priority dstnat;
        tcp dport 8080 dnat to 10.99.1.1:80;
    }
}
table bridge frames {
    chain f {
        type filter hook forward priority 0;
        ether type arp counter;
    }
}
END
";

#[test]
fn a_packet_filter_is_the_same_after_it_was_rebuilt() {
    let mac = Mac::local([11; 6]);
    let source = ve(mac, Gate::Open);
    shell(&source.netns, FILTER);
    // A flow that the filter keeps track of.
    shell(&source.netns, "timeout 1 sh -c 'echo x > /dev/udp/127.0.0.1/9' || true");
    let captured = capture(&source.netns, &expected(mac), None).unwrap();
    assert_eq!(objects(&captured), [""; 0]);
    let network = codec::decode(&codec::encode(&captured.network)).unwrap();
    assert_eq!(captured.network, network);

    let target = ve(mac, Gate::Closed);
    let listed = |netns: &Netns| {
        let list = || Command::new("nft").args(["list", "ruleset"]).output().unwrap().stdout;
        let text = String::from_utf8(netns.run(list).unwrap()).unwrap();
        // What is left of a time runs.
        text.split_whitespace().filter(|word| !word.ends_with("ms")).collect::<Vec<_>>().join(" ")
    };
    check_filter(&target.netns, &network).unwrap();
    assert_eq!(listed(&target.netns), "");
    for _ in 0..2 {
        set_filter(&target.netns, &network).unwrap();
        assert_eq!(listed(&target.netns), listed(&source.netns));
    }
    let again = capture(&target.netns, &expected(mac), None).unwrap();
    assert_eq!(again.network.filter.len(), captured.network.filter.len());
    // And away with it.
    set_filter(&target.netns, &Network::default()).unwrap();
    assert_eq!(listed(&target.netns), "");
}

#[test]
fn a_fresh_ve_has_no_settings_of_its_own() {
    let mac = Mac::local([8; 6]);
    let ve = ve(mac, Gate::Open);
    let start = Instant::now();
    let captured = capture(&ve.netns, &expected(mac), None).unwrap();
    println!("first capture {:?}", start.elapsed());
    let settings: Vec<_> =
        captured.network.settings.iter().map(|setting| setting.path.as_str()).collect();
    // The one setting that follows the link.
    assert_eq!(settings, ["ipv6/conf/eth0/mtu"]);
}

#[test]
fn what_cannot_be_moved_is_named() {
    let mac = Mac::local([9; 6]);
    let ve = ve(mac, Gate::Open);
    shell(
        &ve.netns,
        "ip tuntap add dev tap9 mode tap user 3000000000
         tc qdisc add dev eth0 root tbf rate 1mbit burst 10kb latency 50ms
         ip nexthop add id 7 via 10.99.0.9 dev eth0
         ip route add 10.60.0.0/16 nhid 7
         ip rule add ipproto 6 table 100",
    );
    let captured = capture(&ve.netns, &expected(mac), None).unwrap();
    let mut found = objects(&captured);
    found.sort_unstable();
    assert_eq!(
        found,
        [
            "network link tap9 of a user who is outside of the VE",
            "route with a next-hop object",
            "routing rule of a kind that is not known",
            "traffic control tbf on eth0",
        ]
    );
    let other = capture(&ve.netns, &expected(Mac::local([1; 6])), Some(&[])).unwrap();
    assert!(objects(&other).contains(&"changed hardware address of eth0"));
}

/// Links that a program makes, also across networks: `$BLUE` and `$RED` are others of the VE.
const LINKS: &str = "
ip link add name pair-near mtu 1400 txqueuelen 55 type veth peer name pair-far netns $BLUE
ip link set pair-near group 7 alias 'a note' address 02:00:00:00:09:01
ip link property add dev pair-near altname a-name-longer-than-fifteen-characters
ip addr add 10.31.0.1/24 dev pair-near
ip link set pair-near up
ip link add br9 type bridge ageing_time 12000 forward_delay 300 mcast_snooping 0
ip link add name port type veth peer name other netns $RED
ip link set port master br9 up
ip link set br9 up
bridge link set dev port hairpin on cost 55 isolated on
bridge fdb add 02:00:00:00:00:77 dev port master static
ip link add tunnel type vxlan id 42 local 10.31.0.1 dev pair-near dstport 4789 ttl 9 nolearning
bridge fdb append 00:00:00:00:00:00 dev tunnel dst 10.31.0.9
ip link set tunnel master br9
ip link add upper link pair-near type macvlan mode bridge
ip link add across link pair-near netns $BLUE type macvlan mode private
ip link add middle type ifb
";

const FAR: &str = "
ip link set lo up
ip addr add 10.31.0.2/24 dev pair-far
ip link set pair-far up
ip route add default via 10.31.0.1
echo 1 > /proc/sys/net/ipv4/ip_forward
echo 1 > /proc/sys/net/ipv4/conf/pair-far/rp_filter
ip rule add from 10.31.0.2 table 100 priority 500
ip neigh add 10.31.0.9 lladdr 02:00:00:00:00:09 dev pair-far nud permanent
";

#[test]
fn links_that_programs_made_are_the_same_in_all_networks() {
    let mac = Mac::local([12; 6]);
    let family = || {
        let main = ve(mac, Gate::Closed);
        let others = [Netns::create().unwrap(), Netns::create().unwrap()];
        (main, others)
    };
    let (source, [blue, red]) = family();
    let owners = [&blue, &red].map(|netns| {
        let mut child = netns.run(|| Command::new("sleep").arg("1000").spawn()).unwrap().unwrap();
        let pid = child.id();
        assert!(child.try_wait().unwrap().is_none());
        (Owner(child), pid)
    });
    let script =
        LINKS.replace("$BLUE", &owners[0].1.to_string()).replace("$RED", &owners[1].1.to_string());
    shell(&source.netns, &script);
    shell(&blue, FAR);
    shell(&red, "ip link set other up");
    [&source.netns, &blue, &red].into_iter().for_each(settle);
    let all = |own: &Netns, others: [&Netns; 2]| {
        [own, others[0], others[1]].map(|netns| netns.try_clone().unwrap())
    };
    let networks = all(&source.netns, [&blue, &red]);
    let captured = state::capture(&networks, &expected(mac), 0, None).unwrap();
    let told: Vec<&str> = captured.blockers.iter().map(|it| it.object.as_str()).collect();
    assert_eq!(told, [""; 0]);

    let (target, [new_blue, new_red]) = family();
    let rebuilt = all(&target.netns, [&new_blue, &new_red]);
    let wanted: Vec<Network> = codec::decode(&codec::encode(&captured.networks)).unwrap();
    for _ in 0..2 {
        state::rebuild(&rebuilt, &wanted, 0, Routes::Exact).unwrap();
        let again = state::capture(&rebuilt, &expected(mac), 0, None).unwrap();
        for (found, wanted) in again.networks.into_iter().zip(&captured.networks) {
            let alone =
                |network: &Network| Captured { network: network.clone(), blockers: Vec::new() };
            let mut stations = [&found, wanted].map(|network| network.stations.clone());
            for list in &mut stations {
                list.sort_by_key(|station| format!("{station:?}"));
            }
            assert_eq!(stations[0], stations[1]);
            // A number can be taken already.
            let others = |network: &Network| {
                network.known.iter().map(|(_, other)| *other).collect::<Vec<_>>()
            };
            assert_eq!(others(&found), others(wanted));
            same(&alone(&found), &alone(wanted));
        }
    }
    // A link that is gone on the source is gone on the target, and so is the other end of a pair.
    shell(&source.netns, "ip link del upper; ip link del port");
    let captured = state::capture(&networks, &expected(mac), 0, None).unwrap();
    state::rebuild(&rebuilt, &captured.networks, 0, Routes::Exact).unwrap();
    let again = state::capture(&rebuilt, &expected(mac), 0, None).unwrap();
    let names = |networks: &[Network]| -> Vec<Vec<String>> {
        let names = |network: &Network| network.links.iter().map(|it| it.name.clone()).collect();
        networks.iter().map(names).collect()
    };
    assert_eq!(names(&again.networks), names(&captured.networks));
}

#[test]
fn the_restore_window_comes_and_goes() {
    let mac = Mac::local([10; 6]);
    let ve = ve(mac, Gate::Open);
    let network = capture(&ve.netns, &expected(mac), Some(&[])).unwrap().network;
    let windows = || {
        let routes = capture(&ve.netns, &expected(mac), Some(&[])).unwrap().network.routes;
        routes.iter().filter(|route| route.metrics.contains(&(11, RESTORE_WINDOW))).count()
    };
    assert_eq!(windows(), 0);
    set_routes(&ve.netns, &network, Routes::ForRestore).unwrap();
    assert!(windows() >= 2, "the connected network and the default route");
    let start = Instant::now();
    set_routes(&ve.netns, &network, Routes::Exact).unwrap();
    println!("routes set back in {:?}", start.elapsed());
    assert_eq!(windows(), 0);
    let again = capture(&ve.netns, &expected(mac), Some(&[])).unwrap().network;
    // The kernel may add one of its own when the link comes up.
    let missing: Vec<_> = network.routes.iter().filter(|it| !again.routes.contains(it)).collect();
    assert!(missing.is_empty(), "{missing:?}");
}

#[test]
fn a_hostile_setting_is_refused() {
    let netns = Netns::create().unwrap();
    for path in ["../kernel/hostname", "/etc/passwd", "ipv4/../../kernel/hostname"] {
        let network = Network {
            settings: vec![Setting { path: path.into(), value: "x".into() }],
            ..Default::default()
        };
        assert!(rebuild(&netns, &network, Routes::Exact).is_err(), "{path}");
    }
}
