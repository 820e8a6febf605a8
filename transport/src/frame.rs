//! Length-prefixed frames on a QUIC stream.
//!
//! A length is believed only up to a limit, and memory grows with the bytes that came, not with
//! the length claimed.

use bytes::{Bytes, BytesMut};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::LinkError;

/// The largest control message, in bytes.
pub(crate) const CONTROL_MAX: usize = 64 << 20;
/// The largest frame of the first exchange, in bytes.
pub(crate) const HELLO_MAX: usize = 4 << 10;
/// The largest bulk frame, in bytes.
pub(crate) const BULK_MAX: usize = 4 << 20;
/// Bytes of a frame's length.
const HEADER: usize = 4;
/// What is not larger is copied to be written in one piece with the length, in bytes.
const SMALL: usize = 4 << 10;
/// The length that means: the sender has said everything.
const END: u32 = u32::MAX;

/// What a frame on a bulk stream is.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Frame {
    Data(Bytes),
    End,
}

fn lost(error: &quinn::ConnectionError) -> LinkError {
    LinkError::Lost { cause: error.to_string() }
}

pub(crate) fn write_error(error: quinn::WriteError) -> LinkError {
    match error {
        quinn::WriteError::ConnectionLost(error) => lost(&error),
        _ => LinkError::Closed,
    }
}

pub(crate) fn read_error(error: quinn::ReadError) -> LinkError {
    match error {
        quinn::ReadError::ConnectionLost(error) => lost(&error),
        _ => LinkError::Closed,
    }
}

pub(crate) fn connection_error(error: &quinn::ConnectionError) -> LinkError {
    lost(error)
}

/// Writes one frame.
pub(crate) async fn write(
    stream: &mut quinn::SendStream,
    payload: Bytes,
    limit: usize,
) -> Result<(), LinkError> {
    write_joined(stream, [payload, Bytes::new()], limit).await
}

/// Writes one frame that is in two parts, without a copy.
pub(crate) async fn write_joined(
    stream: &mut quinn::SendStream,
    [first, second]: [Bytes; 2],
    limit: usize,
) -> Result<(), LinkError> {
    let length = check((first.len() + second.len()) as u64, limit)?;
    let header = length.to_le_bytes();
    let mut pieces = match first.len() {
        // For each packet the library looks for its bytes among all pieces that wait for an
        // acknowledgement: the fewer they are, the better.
        0..=SMALL => [[&header[..], &first].concat().into(), Bytes::new(), second],
        _ => [Bytes::copy_from_slice(&header), first, second],
    };
    stream.write_all_chunks(&mut pieces).await.map_err(write_error)
}

/// Writes the mark behind the last frame.
pub(crate) async fn write_end(stream: &mut quinn::SendStream) -> Result<(), LinkError> {
    stream.write_all(&END.to_le_bytes()).await.map_err(write_error)
}

/// Writes a message as one frame.
pub(crate) async fn write_message<T: Serialize>(
    stream: &mut quinn::SendStream,
    message: &T,
    limit: usize,
) -> Result<(), LinkError> {
    write(stream, ckpt_format::codec::encode(message).into(), limit).await
}

/// The length of a frame, if it may be that long.
pub(crate) fn check(bytes: u64, limit: usize) -> Result<u32, LinkError> {
    match u32::try_from(bytes) {
        Ok(length) if bytes <= limit as u64 => Ok(length),
        _ => Err(LinkError::TooLarge { bytes, limit: limit as u64 }),
    }
}

/// Reads one frame, or goes on with one: what came so far stays in `header` and `buffer`, so that
/// a caller may stop waiting at any moment. `None` where the stream ends between two frames.
pub(crate) async fn resume(
    stream: &mut quinn::RecvStream,
    header: &mut BytesMut,
    buffer: &mut BytesMut,
    limit: usize,
) -> Result<Option<Frame>, LinkError> {
    while header.len() < HEADER {
        match stream.read_chunk(HEADER - header.len(), true).await.map_err(read_error)? {
            Some(chunk) => header.extend_from_slice(&chunk.bytes),
            None if header.is_empty() => return Ok(None),
            None => return Err(LinkError::Closed),
        }
    }
    let length = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
    if length == END {
        header.clear();
        return Ok(Some(Frame::End));
    }
    let length = check(u64::from(length), limit)? as usize;
    while buffer.len() < length {
        let chunk = stream
            .read_chunk(length - buffer.len(), true)
            .await
            .map_err(read_error)?
            .ok_or(LinkError::Closed)?;
        let have = buffer.len() + chunk.bytes.len();
        if buffer.capacity() < have {
            // Room for the whole frame, but never much more than what came can vouch for.
            buffer.reserve(length.min((have * 64).max(64 << 10)) - buffer.len());
        }
        buffer.extend_from_slice(&chunk.bytes);
    }
    header.clear();
    Ok(Some(Frame::Data(buffer.split().freeze())))
}

/// Reads one frame that must be data.
pub(crate) async fn read_data(
    stream: &mut quinn::RecvStream,
    limit: usize,
) -> Result<Bytes, LinkError> {
    match resume(stream, &mut BytesMut::new(), &mut BytesMut::new(), limit).await? {
        Some(Frame::Data(bytes)) => Ok(bytes),
        Some(Frame::End) | None => Err(LinkError::Closed),
    }
}

/// Reads one message.
pub(crate) async fn read_message<T: DeserializeOwned>(
    stream: &mut quinn::RecvStream,
    limit: usize,
) -> Result<T, LinkError> {
    decode(&read_data(stream, limit).await?)
}

/// Understands a message.
pub(crate) fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, LinkError> {
    ckpt_format::codec::decode(bytes).map_err(|_| LinkError::Unintelligible)
}
