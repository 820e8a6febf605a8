//! The load against a server that is right, and against servers that are wrong in one way each.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};

use super::*;

/// How the server misbehaves.
#[derive(Clone, Copy, PartialEq)]
enum Fault {
    None,
    /// Forgets every hundredth write.
    LosesWrites,
    /// Carries some requests out twice.
    Repeats,
    /// Answers with a flipped bit.
    Damages,
    /// Closes the connection after a while.
    Hangs,
    Refuses,
}

fn serve(fault: Fault) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let store = Arc::new(Mutex::new(HashMap::new()));
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let store = Arc::clone(&store);
            std::thread::spawn(move || answer_all(stream.unwrap(), fault, &store));
        }
    });
    address
}

fn answer_all(stream: TcpStream, fault: Fault, store: &Mutex<HashMap<Vec<u8>, Vec<u8>>>) {
    let mut input = BufReader::new(stream);
    for count in 1.. {
        let Some(words) = read_request(&mut input) else { return };
        let reply = answer(&words, count, fault, &mut store.lock().unwrap());
        if fault == Fault::Hangs && count == 50 {
            return;
        }
        if input.get_mut().write_all(&reply).is_err() {
            return;
        }
    }
}

fn read_request(input: &mut BufReader<TcpStream>) -> Option<Vec<Vec<u8>>> {
    let mut line = String::new();
    input.read_line(&mut line).ok()?;
    let count: usize = line.trim().strip_prefix('*')?.parse().ok()?;
    let mut words = Vec::new();
    for _ in 0..count {
        line.clear();
        input.read_line(&mut line).ok()?;
        let mut word = vec![0; line.trim().strip_prefix('$')?.parse::<usize>().ok()? + 2];
        input.read_exact(&mut word).ok()?;
        word.truncate(word.len() - 2);
        words.push(word);
    }
    Some(words)
}

fn answer(
    words: &[Vec<u8>],
    count: u32,
    fault: Fault,
    store: &mut HashMap<Vec<u8>, Vec<u8>>,
) -> Vec<u8> {
    let now = count.is_multiple_of(20);
    if fault == Fault::Refuses && now {
        return b"-LOADING\r\n".to_vec();
    }
    match words[0].as_slice() {
        b"SET" => {
            if fault != Fault::LosesWrites || !now {
                store.insert(words[1].clone(), words[2].clone());
            }
            b"+OK\r\n".to_vec()
        }
        b"INCR" => {
            let number = store.entry(words[1].clone()).or_insert(b"0".to_vec());
            let mut value: i64 = String::from_utf8_lossy(number).parse().unwrap();
            value += if fault == Fault::Repeats && value % 3 == 2 { 2 } else { 1 };
            *number = value.to_string().into_bytes();
            format!(":{value}\r\n").into_bytes()
        }
        _ => {
            let Some(value) = store.get(&words[1]) else { return b"$-1\r\n".to_vec() };
            let mut value = value.clone();
            if fault == Fault::Damages && now {
                value[20] ^= 4;
            }
            [format!("${}\r\n", value.len()).as_bytes(), &value, b"\r\n"].concat()
        }
    }
}

/// The tally after some hundred requests, or after all connections have ended.
fn tally_of(fault: Fault) -> Tally {
    let plan = LoadPlan {
        address: serve(fault),
        run: 7,
        connections: 2,
        requests_per_second: 100_000,
        value_bytes: 64,
        keys: 10,
        patience: Duration::from_secs(10),
        dataset: Dataset::default(),
    };
    let load = Load::start(&plan, Instant::now()).unwrap();
    while load.peek_tally().latencies.total() < 1000 && !load.is_over() {
        std::thread::yield_now();
    }
    load.stop();
    load.take_tally()
}

#[test]
fn a_right_server_gives_a_clean_tally() {
    let tally = tally_of(Fault::None);
    assert!(tally.is_clean(), "{:?}", tally.complaints);
    assert!(tally.latencies.total() >= 1000);
}

#[test]
fn wrong_answers_are_seen() {
    for fault in [Fault::LosesWrites, Fault::Repeats, Fault::Damages] {
        let tally = tally_of(fault);
        assert!(tally.wrong_answers > 0);
        assert_eq!(tally.lost_connections, 0);
        assert!(!tally.complaints.is_empty());
    }
}

#[test]
fn refusals_and_lost_connections_are_counted_apart() {
    let refused = tally_of(Fault::Refuses);
    assert!(refused.errors > 0 && refused.lost_connections == 0);
    let lost = tally_of(Fault::Hangs);
    assert_eq!((lost.lost_connections, lost.wrong_answers), (2, 0));
}

#[test]
fn a_filled_dataset_is_verified_and_a_missing_key_is_seen() {
    let address = serve(Fault::None);
    let mut connection = Connection::open(address, Duration::from_secs(10)).unwrap();
    let dataset = Dataset { keys: 100 };
    dataset.fill(&mut connection).unwrap();
    assert_eq!(dataset.verify(&mut connection).unwrap(), Vec::<String>::new());
    connection.ask(&[b"SET", b"dataset:7", b"x"]).unwrap();
    assert_eq!(Dataset { keys: 101 }.verify(&mut connection).unwrap().len(), 2);
}
