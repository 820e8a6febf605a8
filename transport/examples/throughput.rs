//! How fast bulk streams are between two endpoints of this machine, and how long a control
//! message takes meanwhile.
//!
//! `cargo run --release -p transport --example throughput -- [MIB] [STREAMS] [FRAME_KIB]`
#![expect(clippy::print_stdout, reason = "printing is what it is for")]

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use transport::{
    Authority, Endpoint, EndpointConfig, Identity, Link, LinkHandler, NodeId, PeerInfo, Service,
    Timing, Versions,
};

struct Sink;

impl LinkHandler for Sink {
    fn serve(&self, _peer: PeerInfo, link: Link) -> BoxFuture<'static, ()> {
        async move {
            let Link { mut control, bulk } = link;
            tokio::spawn(async move {
                while let Ok(mut stream) = bulk.accept().await {
                    tokio::spawn(async move { while let Ok(Some(_)) = stream.recv().await {} });
                }
            });
            while let Ok(number) = control.recv::<u64>().await {
                if control.send(&number).await.is_err() {
                    return;
                }
            }
        }
        .boxed()
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

#[tokio::main(flavor = "multi_thread", worker_threads = 4)]
async fn main() {
    let number = |index, default| {
        std::env::args().nth(index).map_or(default, |text| text.parse().expect("a number"))
    };
    let (mib, streams, frame_kib): (usize, usize, usize) =
        (number(1, 1024), number(2, 1), number(3, 256));
    let authority = Authority::create("bench").expect("an authority");
    let (near, far) = (bind(&authority, 1), bind(&authority, 2));
    far.on_link(Service::Test, Arc::new(Sink));
    let peer = near.peer(NodeId(2), far.address().expect("an address"));
    let begun = Instant::now();
    let Link { mut control, bulk } = peer.link(Service::Test).await.expect("a link");
    println!("link opened in {:.1} ms", begun.elapsed().as_secs_f64() * 1e3);
    // Data that nothing can make smaller.
    let mut noise = vec![0u8; frame_kib << 10];
    rand::Rng::fill(&mut rand::rng(), noise.as_mut_slice());
    let frame = Bytes::from(noise);
    let begun = Instant::now();
    let tasks: Vec<_> = (0..streams)
        .map(|_| {
            let (bulk, frame) = (bulk.clone(), frame.clone());
            tokio::spawn(async move {
                let mut stream = bulk.open().await.expect("a stream");
                for _ in 0..(mib << 10) / frame_kib / streams {
                    stream.send(frame.clone()).await.expect("sent");
                }
                stream.finish().await.expect("finished");
            })
        })
        .collect();
    let pings = tokio::spawn(async move {
        let mut times = Vec::new();
        let mut ticks = tokio::time::interval(Duration::from_millis(20));
        for number in 0..u64::MAX {
            ticks.tick().await;
            let begun = Instant::now();
            let echo = async {
                control.send(&number).await.ok()?;
                control.recv::<u64>().await.ok()
            };
            if echo.await.is_none() {
                break;
            }
            times.push(begun.elapsed());
            if times.len() >= 10_000 {
                break;
            }
        }
        times
    });
    for task in tasks {
        task.await.expect("a stream task");
    }
    let taken = begun.elapsed().as_secs_f64();
    far.shut_down(Duration::from_secs(1)).await;
    let mut times = pings.await.expect("the ping task");
    times.sort();
    println!(
        "{mib} MiB in {streams} streams of {frame_kib} KiB frames: {:.2} Gbit/s",
        (mib << 20) as f64 * 8.0 / taken / 1e9
    );
    if let Some(worst) = times.last() {
        println!(
            "control round trip meanwhile: median {:?}, worst {worst:?}",
            times[times.len() / 2]
        );
    }
}
