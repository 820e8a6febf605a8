//! A network that damages what it carries slows a transfer down, and does nothing else.

use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use tokio::sync::mpsc;
use transport::{
    Authority, Endpoint, EndpointConfig, Identity, Link, LinkHandler, NodeId, PeerInfo, Service,
    Timing, Versions,
};

/// One datagram in so many has a wrong bit.
const DAMAGE_EVERY: usize = 20;

struct HandOut(mpsc::UnboundedSender<Link>);

impl LinkHandler for HandOut {
    fn serve(&self, _peer: PeerInfo, link: Link) -> BoxFuture<'static, ()> {
        let _ = self.0.send(link);
        Box::pin(async {})
    }
}

fn bind(authority: &Authority, node: u64) -> Endpoint {
    Endpoint::bind(EndpointConfig {
        listen: "127.0.0.1:0".parse().expect("an address"),
        identity: Identity::issue(authority, NodeId(node)).expect("an identity"),
        name: format!("node{node}"),
        versions: Versions::CURRENT,
        timing: Timing::default(),
    })
    .expect("a socket")
}

/// Stands between two hosts and flips a bit now and then, in both directions.
struct BadWire {
    address: SocketAddr,
    damaged: Arc<AtomicUsize>,
}

impl BadWire {
    fn to(target: SocketAddr) -> Self {
        let socket = || {
            let socket = UdpSocket::bind("127.0.0.1:0").expect("a socket");
            // The threads end with the test's process at the latest.
            socket.set_read_timeout(Some(Duration::from_secs(20))).expect("a timeout");
            Arc::new(socket)
        };
        let (front, back) = (socket(), socket());
        back.connect(target).expect("a target");
        let address = front.local_addr().expect("an address");
        let (caller, damaged) = (Arc::new(Mutex::new(None)), Arc::new(AtomicUsize::new(0)));
        for inwards in [true, false] {
            let (front, back) = (front.clone(), back.clone());
            let (caller, damaged) = (caller.clone(), damaged.clone());
            std::thread::spawn(move || {
                let (mut buffer, mut count) = (vec![0; 65_536], 0);
                let from = if inwards { &front } else { &back };
                while let Ok((length, sender)) = from.recv_from(&mut buffer) {
                    count += 1;
                    let datagram = &mut buffer[..length];
                    if count % DAMAGE_EVERY == 0 {
                        datagram[length * 2 / 3] ^= 0x10;
                        damaged.fetch_add(1, Ordering::Relaxed);
                    }
                    // A lost datagram is nothing new to either end.
                    let _ = if inwards {
                        *caller.lock().expect("no panic") = Some(sender);
                        back.send(datagram)
                    } else {
                        let caller = caller.lock().expect("no panic").expect("it asked first");
                        front.send_to(datagram, caller)
                    };
                }
            });
        }
        Self { address, damaged }
    }
}

#[tokio::test]
async fn damaged_datagrams_never_reach_the_reader() {
    let authority = Authority::create("test").expect("an authority");
    let (one, two) = (bind(&authority, 1), bind(&authority, 2));
    let (sender, mut links) = mpsc::unbounded_channel();
    two.on_link(Service::Test, Arc::new(HandOut(sender)));
    let wire = BadWire::to(two.address().expect("an address"));
    let near = one.peer(NodeId(2), wire.address).link(Service::Test).await.expect("a link");
    let far = links.recv().await.expect("its other end");
    let frames: Vec<Bytes> =
        (0..64u8).map(|number| vec![number.wrapping_mul(37); 32 << 10].into()).collect();
    let send = async {
        let mut stream = near.bulk.open().await.expect("a stream");
        for frame in frames.clone() {
            stream.send(frame).await.expect("room");
        }
        stream.finish().await.expect("an end");
    };
    let receive = async {
        let mut stream = far.bulk.accept().await.expect("a stream");
        let mut received = Vec::new();
        while let Some(frame) = stream.recv().await.expect("a whole frame") {
            received.push(frame);
        }
        received
    };
    let ((), received) = tokio::join!(send, receive);
    assert!(received.iter().zip(&frames).all(|(one, other)| one[..] == other[..]));
    assert_eq!(received.len(), frames.len());
    assert!(wire.damaged.load(Ordering::Relaxed) > 10, "the wire was too good");
}
