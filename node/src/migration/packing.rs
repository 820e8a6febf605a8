//! Items as frames of the bulk stream.
//!
//! Nearly all that travels are pages and parts of files. They stand behind the rest of their item,
//! as they are, and neither end copies them to encode or to decode; or compressed, where that pays.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use ckpt_format::{
    codec::{self, DecodeError},
    stream::Record,
    tree::{FileRecord, Step},
};

use super::{
    messages::Item,
    squeeze::{self, Squeeze},
};

/// What makes an item large, if it has such a thing.
fn bulk(item: &mut Item) -> Option<&mut Bytes> {
    match item {
        Item::Memory(Record::Pages { data, .. })
        | Item::File(FileRecord { step: Step::Data { data, .. }, .. }) => Some(data),
        Item::Template(bytes) | Item::State { bytes, .. } | Item::Processes { bytes, .. } => {
            Some(bytes)
        }
        _ => None,
    }
}

/// No piece is longer, in bytes.
const BULK_MAX: usize = 4 << 20;

/// The two parts of a frame. The first one has the length of the item without its bulk, the
/// length of the bulk if that is compressed, or 0, and the encoding of the item without its bulk;
/// the second one is the bulk.
pub(super) fn pack(mut item: Item, squeeze: &Squeeze) -> [Bytes; 2] {
    let bulk = bulk(&mut item).map(std::mem::take).unwrap_or_default();
    let encoded = codec::encode(&item);
    let (len, bulk) = match squeeze.squeeze(&bulk) {
        Some(squeezed) => (bulk.len() as u32, squeezed),
        None => (0, bulk),
    };
    let mut head = BytesMut::with_capacity(8 + encoded.len());
    head.put_u32_le(encoded.len() as u32);
    head.put_u32_le(len);
    head.put_slice(&encoded);
    [head.freeze(), bulk]
}

/// The item of a whole frame.
pub(super) fn unpack(mut frame: Bytes) -> Result<Item, DecodeError> {
    let missing = |wanted| DecodeError::Missing { wanted };
    let len = frame.try_get_u32_le().map_err(|_| missing(8))? as usize;
    let squeezed = frame.try_get_u32_le().map_err(|_| missing(8))? as usize;
    if len > frame.len() {
        return Err(missing(len));
    }
    let head = frame.split_to(len);
    let mut item: Item = codec::decode(&head)?;
    match bulk(&mut item) {
        Some(place) if place.is_empty() && squeezed == 0 => *place = frame,
        Some(place) if place.is_empty() && squeezed <= BULK_MAX => {
            *place = squeeze::release(&frame, squeezed).map_err(DecodeError::Compressed)?;
        }
        _ if frame.is_empty() => {}
        _ => return Err(DecodeError::Surplus { surplus: frame.len() }),
    }
    Ok(item)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use ckpt_format::{
        memory::{Run, Space},
        stream::Origin,
    };

    use super::*;

    fn items() -> Vec<Item> {
        let runs = vec![Run { start: 4096, pages: 4 }];
        let data = Bytes::from(vec![7; 16384]);
        let path = b"a".to_vec();
        vec![
            Item::Barrier(3),
            Item::TemplateEnd,
            Item::Template(data.clone()),
            Item::Memory(Record::Drop { space: Space::Process(1), runs: runs.clone() }),
            Item::Memory(Record::Pages { space: Space::Process(1), runs, data: data.clone() }),
            Item::Memory(Record::Same {
                space: Space::Shared(9),
                runs: vec![Run { start: 4096, pages: 1 }],
                origins: vec![Origin { pid: 7, run: Run { start: 8192, pages: 1 } }],
                key: [3; 32],
                hashes: vec![[255; 16]],
            }),
            Item::File(FileRecord { tree: 1, step: Step::Data { path, offset: 5, data } }),
            Item::State { bytes: Bytes::new(), last: true },
        ]
    }

    /// For a link so slow that all is compressed that can be.
    fn slow() -> Squeeze {
        let squeeze = Squeeze::default();
        squeeze.sent(1, Duration::from_secs(1));
        squeeze
    }

    #[test]
    fn an_item_comes_out_as_it_went_in() {
        for item in items() {
            for squeeze in [Squeeze::default(), slow()] {
                let frame = Bytes::from(pack(item.clone(), &squeeze).concat());
                let unpacked = unpack(frame).expect("it is whole");
                assert_eq!(codec::encode(&unpacked), codec::encode(&item));
            }
        }
        let pages = items().swap_remove(4);
        let [head, bulk] = pack(pages.clone(), &slow());
        assert!(bulk.len() < 100, "{}", bulk.len());
        // Neither cut off nor with another length.
        assert!(unpack(Bytes::from([&head[..], &bulk[1..]].concat())).is_err());
        for len in [1u32, 16383, 16385, 4 << 20, u32::MAX] {
            let head = [&head[..4], &len.to_le_bytes(), &head[8..]].concat();
            assert!(unpack(Bytes::from([&head[..], &bulk].concat())).is_err(), "{len}");
        }
    }

    #[test]
    fn a_frame_that_is_cut_off_or_too_long_is_refused_or_short_of_bulk() {
        for item in items() {
            let whole = pack(item.clone(), &Squeeze::default());
            let head = whole[0].len();
            let frame = Bytes::from(whole.concat());
            for len in 0..head {
                assert!(unpack(frame.slice(..len)).is_err(), "{len} of {item:?}");
            }
            let longer = Bytes::from([&whole[0][..], b"x"].concat());
            assert_eq!(unpack(longer).is_ok(), bulk(&mut item.clone()).is_some(), "{item:?}");
        }
    }
}
