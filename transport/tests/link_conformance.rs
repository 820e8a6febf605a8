//! What a link promises, checked on both carriers: a pair in memory and QUIC on loopback.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use tokio::sync::mpsc;
use transport::{
    Authority, BulkSender, Endpoint, EndpointConfig, Identity, Link, LinkError, LinkHandler,
    NodeId, PeerInfo, Service, Timing, Versions,
};

/// Long enough for anything that is going to happen.
const PATIENCE: Duration = Duration::from_secs(10);

struct HandOut(mpsc::UnboundedSender<Link>);

impl LinkHandler for HandOut {
    fn serve(&self, _peer: PeerInfo, link: Link) -> BoxFuture<'static, ()> {
        let sender = self.0.clone();
        async move { drop(sender.send(link)) }.boxed()
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

/// Both carriers; the endpoints live as long as the test.
async fn carriers() -> (Vec<(&'static str, Link, Link)>, [Endpoint; 2]) {
    let authority = Authority::create("test").expect("an authority");
    let (one, two) = (bind(&authority, 1), bind(&authority, 2));
    let (sender, mut links) = mpsc::unbounded_channel();
    two.on_link(Service::Test, Arc::new(HandOut(sender)));
    let peer = one.peer(NodeId(2), two.address().expect("an address"));
    let near = peer.link(Service::Test).await.expect("a link");
    let far = links.recv().await.expect("its other end");
    let (left, right) = Link::pair();
    (vec![("memory", left, right), ("quic", near, far)], [one, two])
}

#[tokio::test]
async fn control_messages_arrive_in_order_both_ways() {
    let (carriers, _endpoints) = carriers().await;
    for (carrier, mut near, mut far) in carriers {
        for number in 0..100u32 {
            near.control.send(&(number, "out".to_owned())).await.expect(carrier);
        }
        for number in 0..100u32 {
            let message: (u32, String) = far.control.recv().await.expect(carrier);
            assert_eq!(message, (number, "out".to_owned()), "{carrier}");
            far.control.send(&number).await.expect(carrier);
        }
        for number in 0..100u32 {
            assert_eq!(near.control.recv::<u32>().await.expect(carrier), number);
        }
    }
}

#[tokio::test]
async fn waiting_for_a_message_can_be_given_up_without_losing_any() {
    let (carriers, _endpoints) = carriers().await;
    for (carrier, near, mut far) in carriers {
        let big = vec![7u8; 3 << 20];
        let (mut sender, _receiver) = near.control.split();
        let expected = big.clone();
        let task = tokio::spawn(async move {
            for _ in 0..4 {
                sender.send(&big).await.expect("sent");
            }
            sender
        });
        let mut got = 0;
        while got < 4 {
            // Given up at every second poll, so in the middle of a message too.
            let mut waiting = Box::pin(far.control.recv::<Vec<u8>>());
            let mut polls = 0;
            let message = std::future::poll_fn(|context| match waiting.as_mut().poll(context) {
                std::task::Poll::Ready(message) => std::task::Poll::Ready(Some(message)),
                std::task::Poll::Pending if polls == 1 => std::task::Poll::Ready(None),
                std::task::Poll::Pending => {
                    polls += 1;
                    std::task::Poll::Pending
                }
            })
            .await;
            if let Some(message) = message {
                assert!(message.expect(carrier) == expected, "{carrier}: damaged");
                got += 1;
            }
        }
        drop(task.await.expect("the sender ends"));
    }
}

#[tokio::test]
async fn bulk_streams_carry_frames_and_say_how_they_end() {
    let (carriers, _endpoints) = carriers().await;
    for (carrier, near, far) in carriers {
        let mut sender = near.bulk.open().await.expect(carrier);
        let receive = async {
            let mut receiver = far.bulk.accept().await.expect(carrier);
            let mut sizes = Vec::new();
            while let Some(frame) = receiver.recv().await.expect(carrier) {
                assert!(frame.iter().all(|&byte| byte == frame.len() as u8), "{carrier}");
                sizes.push(frame.len());
            }
            assert_eq!(receiver.recv().await.expect(carrier), None, "{carrier}: the end stays");
            sizes
        };
        let sizes = [1, 0, 4096, 1 << 20, BulkSender::FRAME_MAX, 3];
        let send = async {
            for size in sizes {
                sender.send(Bytes::from(vec![size as u8; size])).await.expect(carrier);
            }
            sender.finish().await.expect(carrier);
        };
        let (received, ()) = tokio::join!(receive, send);
        assert_eq!(received, sizes, "{carrier}");
    }
}

#[tokio::test]
async fn two_parts_of_any_size_arrive_as_one_frame() {
    let (carriers, _endpoints) = carriers().await;
    let part = |len: usize, byte: u8| Bytes::from(vec![byte; len]);
    for (carrier, near, far) in carriers {
        let mut sender = near.bulk.open().await.expect(carrier);
        let sizes = [0, 1, 4095, 4096, 4097, 70_000];
        let pairs: Vec<_> =
            sizes.iter().flat_map(|&one| sizes.map(|two| [part(one, 1), part(two, 2)])).collect();
        let sent = pairs.clone();
        let sending = tokio::spawn(async move {
            for parts in sent {
                sender.send_joined(parts).await?;
            }
            sender.finish().await
        });
        let mut receiver = far.bulk.accept().await.expect(carrier);
        for parts in pairs {
            let frame = receiver.recv().await.expect(carrier).expect(carrier);
            assert_eq!(frame, parts.concat(), "{carrier}");
        }
        assert_eq!(receiver.recv().await.expect(carrier), None, "{carrier}");
        sending.await.expect(carrier).expect(carrier);
    }
}

#[tokio::test]
async fn a_stream_cut_off_is_no_finished_stream() {
    let (carriers, _endpoints) = carriers().await;
    for (carrier, near, far) in carriers {
        let mut sender = near.bulk.open().await.expect(carrier);
        sender.send(Bytes::from_static(b"half")).await.expect(carrier);
        let mut receiver = far.bulk.accept().await.expect(carrier);
        drop(sender);
        let end = loop {
            match receiver.recv().await {
                Ok(Some(_)) => {}
                other => break other,
            }
        };
        assert_eq!(end, Err(LinkError::Closed), "{carrier}");
    }
}

#[tokio::test]
async fn a_slow_receiver_holds_the_sender_back_but_no_control_message() {
    let (carriers, _endpoints) = carriers().await;
    for (carrier, mut near, mut far) in carriers {
        let mut senders = Vec::new();
        for _ in 0..8 {
            let mut sender = near.bulk.open().await.expect(carrier);
            let task = async move {
                let mut sent = 0u64;
                let frame = Bytes::from(vec![1; 1 << 20]);
                // Nobody reads: this must stop by itself.
                while let Ok(Ok(())) =
                    tokio::time::timeout(Duration::from_millis(300), sender.send(frame.clone()))
                        .await
                {
                    sent += frame.len() as u64;
                    assert!(sent < 64 << 20, "nothing holds the sender back");
                }
                (sent, sender)
            };
            senders.push(tokio::spawn(task));
        }
        let mut held = Vec::new();
        for sender in senders {
            held.push(sender.await.expect("bounded").1);
        }
        let exchange = async {
            near.control.send(&1u8).await.expect(carrier);
            assert_eq!(far.control.recv::<u8>().await.expect(carrier), 1);
            far.control.send(&2u8).await.expect(carrier);
            assert_eq!(near.control.recv::<u8>().await.expect(carrier), 2);
        };
        tokio::time::timeout(Duration::from_secs(1), exchange).await.expect(carrier);
    }
}

#[tokio::test]
async fn a_dropped_end_is_noticed_by_the_other() {
    let (carriers, _endpoints) = carriers().await;
    for (carrier, mut near, far) in carriers {
        let mut sender = near.bulk.open().await.expect(carrier);
        drop(far);
        let control = tokio::time::timeout(PATIENCE, near.control.recv::<u8>()).await;
        assert_eq!(control.expect(carrier), Err(LinkError::Closed), "{carrier}");
        let bulk = async { while sender.send(Bytes::from(vec![0; 1 << 20])).await.is_ok() {} };
        tokio::time::timeout(PATIENCE, bulk).await.expect(carrier);
    }
}

#[tokio::test]
async fn a_frame_over_the_limit_is_refused_where_it_is_made() {
    let (carriers, _endpoints) = carriers().await;
    for (carrier, near, _far) in carriers {
        let mut sender = near.bulk.open().await.expect(carrier);
        let bytes = Bytes::from(vec![0; BulkSender::FRAME_MAX + 1]);
        let limit = BulkSender::FRAME_MAX as u64;
        let expected = LinkError::TooLarge { bytes: limit + 1, limit };
        assert_eq!(sender.send(bytes).await, Err(expected), "{carrier}");
    }
}

#[tokio::test]
async fn a_message_of_another_type_is_an_error_and_not_a_panic() {
    let (carriers, _endpoints) = carriers().await;
    for (carrier, mut near, mut far) in carriers {
        near.control.send(&"a string".to_owned()).await.expect(carrier);
        let message = far.control.recv::<(u64, Vec<u64>)>().await;
        assert_eq!(message, Err(LinkError::Unintelligible), "{carrier}");
    }
}

#[tokio::test]
async fn both_ends_may_open_bulk_streams() {
    let (carriers, _endpoints) = carriers().await;
    for (carrier, near, far) in carriers {
        let mut sender = far.bulk.open().await.expect(carrier);
        sender.send(Bytes::from_static(b"back")).await.expect(carrier);
        let mut receiver = near.bulk.accept().await.expect(carrier);
        let frame = receiver.recv().await.expect(carrier).expect(carrier);
        assert_eq!(frame, "back", "{carrier}");
    }
}
