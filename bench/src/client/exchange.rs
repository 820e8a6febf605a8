//! The smallest question that a service answers, and how its answer ends.

use std::borrow::Cow;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use chaos_tests::client::record::mix;
use clap::ValueEnum;

/// How long an answer may take before the connection counts as lost.
const PATIENCE: Duration = Duration::from_secs(60);

/// What is asked of whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Exchange {
    /// Eight bytes that come back.
    Echo,
    /// `PING` to redis.
    Redis,
    /// `HEAD /` to a web server.
    Http,
    /// `SELECT 1` to PostgreSQL, as a user that needs no password.
    Postgres,
    /// A value under one of 100,000 keys of redis.
    RedisSet,
    /// A transaction like that of pgbench, in its tables.
    PostgresTransaction,
}

impl Exchange {
    fn question(self, number: u64) -> Cow<'static, [u8]> {
        match self {
            Self::Echo => b"12345678".into(),
            Self::Redis => b"PING\r\n".into(),
            Self::Http => b"HEAD / HTTP/1.1\r\nHost: ve\r\n\r\n".into(),
            Self::Postgres => query("SELECT 1").into(),
            Self::RedisSet => {
                format!("SET hot:{} {number:0256}\r\n", number % 100_000).into_bytes().into()
            }
            Self::PostgresTransaction => {
                // One branch, so that transactions wait for each other as little as can be.
                let account = number % 100_000 + 1;
                let teller = number % 10 + 1;
                query(&format!(
                    "BEGIN; \
                     UPDATE pgbench_accounts SET abalance = abalance + 1 WHERE aid = {account}; \
                     SELECT abalance FROM pgbench_accounts WHERE aid = {account}; \
                     UPDATE pgbench_tellers SET tbalance = tbalance + 1 WHERE tid = {teller}; \
                     INSERT INTO pgbench_history (tid, bid, aid, delta, mtime) \
                     VALUES ({teller}, 1, {account}, 1, CURRENT_TIMESTAMP); END;"
                ))
                .into()
            }
        }
    }

    fn is_complete(self, answer: &[u8]) -> bool {
        match self {
            Self::Echo => answer.len() >= 8,
            Self::Redis | Self::RedisSet => answer.ends_with(b"\r\n"),
            Self::Http => answer.ends_with(b"\r\n\r\n"),
            // ReadyForQuery, whose last byte is the state of the transaction.
            Self::Postgres | Self::PostgresTransaction => answer
                .len()
                .checked_sub(6)
                .is_some_and(|start| answer[start..].starts_with(b"Z\0\0\0\x05")),
        }
    }
}

/// A query of PostgreSQL's simple protocol.
fn query(text: &str) -> Vec<u8> {
    let mut bytes = vec![b'Q'];
    bytes.extend_from_slice(&(text.len() as u32 + 5).to_be_bytes());
    bytes.extend_from_slice(text.as_bytes());
    bytes.push(0);
    bytes
}

/// An established connection over which questions are asked.
#[derive(Debug)]
pub struct Dialogue {
    exchange: Exchange,
    stream: TcpStream,
    buffer: Vec<u8>,
    number: u64,
}

impl Dialogue {
    /// Connects, and does what must be done before the first question.
    pub fn open(exchange: Exchange, address: SocketAddr) -> io::Result<Self> {
        let stream = TcpStream::connect_timeout(&address, PATIENCE)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let number = rand::random();
        let mut dialogue = Self { exchange, stream, buffer: Vec::new(), number };
        if matches!(exchange, Exchange::Postgres | Exchange::PostgresTransaction) {
            let names = b"user\0postgres\0database\0postgres\0\0";
            let mut hello = (names.len() as u32 + 8).to_be_bytes().to_vec();
            // Protocol 3.0.
            hello.extend_from_slice(&196_608u32.to_be_bytes());
            hello.extend_from_slice(names);
            dialogue.say(&hello)?;
        }
        Ok(dialogue)
    }

    /// Asks once and waits for the whole answer.
    pub fn ask(&mut self) -> io::Result<()> {
        self.number = mix(self.number);
        self.say(&self.exchange.question(self.number))
    }

    fn say(&mut self, words: &[u8]) -> io::Result<()> {
        self.stream.write_all(words)?;
        self.buffer.clear();
        let mut piece = [0; 16 << 10];
        while !self.exchange.is_complete(&self.buffer) {
            match self.stream.read(&mut piece)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                length => self.buffer.extend_from_slice(&piece[..length]),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_end_where_they_end() {
        assert!(Exchange::Redis.is_complete(b"+PONG\r\n"));
        assert!(!Exchange::Redis.is_complete(b"+PO"));
        assert!(!Exchange::Http.is_complete(b"HTTP/1.1 200 OK\r\nA: b\r\n"));
        assert!(Exchange::Postgres.is_complete(b"..Z\0\0\0\x05I"));
        assert!(!Exchange::Postgres.is_complete(b"Z\0\0\0\x05"));
    }

    #[test]
    fn a_query_says_how_long_it_is() {
        let question = Exchange::PostgresTransaction.question(7);
        assert_eq!(
            u32::from_be_bytes(question[1..5].try_into().unwrap()) as usize + 1,
            question.len()
        );
    }
}
