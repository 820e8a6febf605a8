//! Items as frames of the bulk stream.
//!
//! Nearly all that travels are pages and parts of files. They stand behind the rest of their item,
//! as they are: neither end copies them to encode or to decode.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use ckpt_format::{
    codec::{self, DecodeError},
    stream::Record,
    tree::{FileRecord, Step},
};

use super::messages::Item;

/// What makes an item large, if it has such a thing.
fn bulk(item: &mut Item) -> Option<&mut Bytes> {
    match item {
        Item::Memory(Record::Pages { data, .. })
        | Item::File(FileRecord { step: Step::Data { data, .. }, .. }) => Some(data),
        Item::Template(bytes) | Item::State { bytes, .. } => Some(bytes),
        _ => None,
    }
}

/// The two parts of a frame: length and encoding of the item without its bulk, and its bulk.
pub(super) fn pack(mut item: Item) -> [Bytes; 2] {
    let bulk = bulk(&mut item).map(std::mem::take).unwrap_or_default();
    let encoded = codec::encode(&item);
    let mut head = BytesMut::with_capacity(4 + encoded.len());
    head.put_u32_le(encoded.len() as u32);
    head.put_slice(&encoded);
    [head.freeze(), bulk]
}

/// The item of a whole frame.
pub(super) fn unpack(mut frame: Bytes) -> Result<Item, DecodeError> {
    let missing = |wanted| DecodeError::Missing { wanted };
    let len = frame.try_get_u32_le().map_err(|_| missing(4))? as usize;
    if len > frame.len() {
        return Err(missing(len));
    }
    let head = frame.split_to(len);
    let mut item: Item = codec::decode(&head)?;
    match bulk(&mut item) {
        Some(place) if place.is_empty() => *place = frame,
        _ if frame.is_empty() => {}
        _ => return Err(DecodeError::Surplus { surplus: frame.len() }),
    }
    Ok(item)
}

#[cfg(test)]
mod tests {
    use ckpt_format::memory::{Run, Space};

    use super::*;

    fn items() -> Vec<Item> {
        let runs = vec![Run { start: 4096, pages: 2 }];
        let data = Bytes::from(vec![7; 8192]);
        let path = b"a".to_vec();
        vec![
            Item::Barrier(3),
            Item::TemplateEnd,
            Item::Template(data.clone()),
            Item::Memory(Record::Drop { space: Space::Process(1), runs: runs.clone() }),
            Item::Memory(Record::Pages { space: Space::Process(1), runs, data: data.clone() }),
            Item::File(FileRecord { tree: 1, step: Step::Data { path, offset: 5, data } }),
            Item::State { bytes: Bytes::new(), last: true },
        ]
    }

    #[test]
    fn an_item_comes_out_as_it_went_in() {
        for item in items() {
            let frame = Bytes::from(pack(item.clone()).concat());
            let unpacked = unpack(frame).expect("it is whole");
            assert_eq!(codec::encode(&unpacked), codec::encode(&item));
        }
    }

    #[test]
    fn a_frame_that_is_cut_off_or_too_long_is_refused_or_short_of_bulk() {
        for item in items() {
            let whole = pack(item.clone());
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
