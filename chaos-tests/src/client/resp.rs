//! One connection to a redis server: requests out, replies in, in the server's own protocol.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

/// The longest reply that is accepted; more means that the stream is out of step.
const REPLY_BYTES_MAX: usize = 64 << 20;

/// Why a request got no usable reply.
#[derive(Debug, thiserror::Error)]
pub enum ReplyError {
    /// The connection broke, or no reply came within the time limit.
    #[error("the connection failed")]
    Connection(#[source] io::Error),
    /// The server closed the connection.
    #[error("the server closed the connection")]
    Closed,
    /// The bytes received are no reply.
    #[error("reply starts with {found:?}")]
    Malformed {
        /// The line that could not be understood.
        found: String,
    },
    /// The server refused the request.
    #[error("the server answered: {message}")]
    Refused {
        /// The server's words.
        message: String,
    },
}

/// A reply of the server.
#[derive(Debug, PartialEq, Eq)]
pub enum Reply {
    /// A short status such as `OK`.
    Status(String),
    /// A number.
    Integer(i64),
    /// A value, or nothing where the key does not exist.
    Value(Option<Vec<u8>>),
}

/// One connection, for one request after the other or for batches.
#[derive(Debug)]
pub struct Connection {
    input: BufReader<TcpStream>,
    output: Vec<u8>,
}

impl Connection {
    /// Connects. No reply may take longer than `patience`.
    pub fn open(address: SocketAddr, patience: Duration) -> Result<Self, ReplyError> {
        let stream =
            TcpStream::connect_timeout(&address, patience).map_err(ReplyError::Connection)?;
        stream.set_nodelay(true).map_err(ReplyError::Connection)?;
        stream.set_read_timeout(Some(patience)).map_err(ReplyError::Connection)?;
        stream.set_write_timeout(Some(patience)).map_err(ReplyError::Connection)?;
        Ok(Self { input: BufReader::with_capacity(64 << 10, stream), output: Vec::new() })
    }

    /// Appends a request to the batch that the next [`flush`](Self::flush) sends.
    pub fn push(&mut self, words: &[&[u8]]) {
        encode(&mut self.output, words);
    }

    /// Sends what was pushed.
    pub fn flush(&mut self) -> Result<(), ReplyError> {
        let sent = self.input.get_mut().write_all(&self.output).map_err(ReplyError::Connection);
        self.output.clear();
        sent
    }

    /// Sends one request and waits for its reply.
    pub fn ask(&mut self, words: &[&[u8]]) -> Result<Reply, ReplyError> {
        self.push(words);
        self.flush()?;
        self.reply()
    }

    /// Waits for the next reply.
    pub fn reply(&mut self) -> Result<Reply, ReplyError> {
        decode(&mut self.input)
    }
}

fn encode(output: &mut Vec<u8>, words: &[&[u8]]) {
    output.extend_from_slice(format!("*{}\r\n", words.len()).as_bytes());
    for word in words {
        output.extend_from_slice(format!("${}\r\n", word.len()).as_bytes());
        output.extend_from_slice(word);
        output.extend_from_slice(b"\r\n");
    }
}

fn decode(input: &mut impl BufRead) -> Result<Reply, ReplyError> {
    let mut line = Vec::new();
    input.take(1024).read_until(b'\n', &mut line).map_err(ReplyError::Connection)?;
    let Some(text) = line.strip_suffix(b"\r\n") else {
        if line.is_empty() {
            return Err(ReplyError::Closed);
        }
        return Err(malformed(&line));
    };
    let Some((kind, rest)) = text.split_first() else { return Err(malformed(text)) };
    let rest = std::str::from_utf8(rest).map_err(|_| malformed(text))?;
    match kind {
        b'+' => Ok(Reply::Status(rest.to_owned())),
        b'-' => Err(ReplyError::Refused { message: rest.to_owned() }),
        b':' => Ok(Reply::Integer(rest.parse().map_err(|_| malformed(text))?)),
        b'$' => decode_value(input, rest, text),
        _ => Err(malformed(text)),
    }
}

fn decode_value(input: &mut impl BufRead, rest: &str, line: &[u8]) -> Result<Reply, ReplyError> {
    if rest == "-1" {
        return Ok(Reply::Value(None));
    }
    let length: usize = rest.parse().map_err(|_| malformed(line))?;
    if length > REPLY_BYTES_MAX {
        return Err(malformed(line));
    }
    let mut value = vec![0; length + 2];
    input.read_exact(&mut value).map_err(ReplyError::Connection)?;
    if value.split_off(length) != b"\r\n" {
        return Err(malformed(line));
    }
    Ok(Reply::Value(Some(value)))
}

fn malformed(line: &[u8]) -> ReplyError {
    let shown = line.get(..80).unwrap_or(line);
    ReplyError::Malformed { found: String::from_utf8_lossy(shown).into_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(bytes: &[u8]) -> Result<Reply, ReplyError> {
        decode(&mut &bytes[..])
    }

    #[test]
    fn replies_are_understood() {
        assert_eq!(read(b"+OK\r\n").unwrap(), Reply::Status("OK".into()));
        assert_eq!(read(b":-7\r\n").unwrap(), Reply::Integer(-7));
        assert_eq!(read(b"$3\r\na\rb\r\n").unwrap(), Reply::Value(Some(b"a\rb".to_vec())));
        assert_eq!(read(b"$-1\r\n").unwrap(), Reply::Value(None));
    }

    #[test]
    fn what_is_no_reply_is_refused() {
        assert!(matches!(read(b""), Err(ReplyError::Closed)));
        assert!(matches!(read(b"-ERR no\r\n"), Err(ReplyError::Refused { .. })));
        assert!(matches!(read(b"\r\n"), Err(ReplyError::Malformed { .. })));
        assert!(matches!(read(b"$99999999999\r\n"), Err(ReplyError::Malformed { .. })));
        assert!(matches!(read(b"$2\r\nabcd"), Err(ReplyError::Malformed { .. })));
        assert!(matches!(read(b"$5\r\nab"), Err(ReplyError::Connection(_))));
        assert!(matches!(read(b"hello\r\n"), Err(ReplyError::Malformed { .. })));
    }

    #[test]
    fn requests_are_arrays_of_values() {
        let mut bytes = Vec::new();
        encode(&mut bytes, &[b"GET", b"k"]);
        assert_eq!(bytes, b"*2\r\n$3\r\nGET\r\n$1\r\nk\r\n");
    }
}
