//! Netlink attributes as bytes: what the kernel tells is what it takes, also where nothing here
//! knows what it means.

/// Kind and length of the attribute at a place.
fn head(bytes: &[u8], at: usize) -> Option<(u16, usize)> {
    const KIND: u16 = 0x3fff;
    let head = bytes.get(at..at + 4)?;
    let length = usize::from(u16::from_ne_bytes([head[0], head[1]]));
    let fits = length >= 4 && at + length <= bytes.len();
    fits.then(|| (u16::from_ne_bytes([head[2], head[3]]) & KIND, length))
}

/// The attributes one by one, each with its kind and where it is. Damage ends the list.
fn places(bytes: &[u8]) -> impl Iterator<Item = (u16, std::ops::Range<usize>)> + '_ {
    let mut at = 0;
    std::iter::from_fn(move || {
        let (kind, length) = head(bytes, at)?;
        let place = at..at + length;
        at += length.next_multiple_of(4);
        Some((kind, place))
    })
}

/// Kind and value of each attribute.
pub(super) fn all(bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    places(bytes).map(|(kind, place)| (kind, &bytes[place.start + 4..place.end]))
}

/// The value of the first attribute of a kind.
pub(super) fn value(bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    all(bytes).find_map(|(kind, value)| (kind == wanted).then_some(value))
}

/// A number of 32 bits.
pub(super) fn number(bytes: &[u8], wanted: u16) -> Option<u32> {
    Some(u32::from_ne_bytes(*value(bytes, wanted)?.first_chunk()?))
}

/// A text without its final NUL.
pub(super) fn text(bytes: &[u8], wanted: u16) -> Option<String> {
    value(bytes, wanted).map(as_text)
}

/// A value that is a text, without its final NUL.
pub(super) fn as_text(value: &[u8]) -> String {
    let end = value.iter().position(|&byte| byte == 0).unwrap_or(value.len());
    String::from_utf8_lossy(&value[..end]).into_owned()
}

fn select(bytes: &[u8], wanted: impl Fn(u16) -> bool) -> Vec<u8> {
    let mut selected = Vec::with_capacity(bytes.len());
    for (_, place) in places(bytes).filter(|(kind, _)| wanted(*kind)) {
        selected.extend(&bytes[place]);
        selected.resize(selected.len().next_multiple_of(4), 0);
    }
    selected
}

/// All but those of some kinds.
pub(super) fn without(bytes: &[u8], left_out: &[u16]) -> Vec<u8> {
    select(bytes, |kind| !left_out.contains(&kind))
}

/// Those of some kinds.
pub(super) fn only(bytes: &[u8], kept: &[u16]) -> Vec<u8> {
    select(bytes, |kind| kept.contains(&kind))
}

/// The attributes that are not the same among others.
pub(super) fn different(bytes: &[u8], others: &[u8]) -> Vec<u8> {
    let same = |kind, found: &[u8]| value(others, kind).is_some_and(|other| other == found);
    let mut left = Vec::new();
    for (kind, found) in all(bytes).filter(|(kind, found)| !same(*kind, found)) {
        put(&mut left, kind, found);
    }
    left
}

/// Adds an attribute.
pub(super) fn put(bytes: &mut Vec<u8>, kind: u16, value: &[u8]) {
    // What is longer than this was never told by the kernel, and is refused by it as cut.
    let length = u16::try_from(value.len() + 4).unwrap_or(u16::MAX);
    bytes.extend(length.to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(&value[..usize::from(length) - 4]);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
}

/// Adds a text, with its final NUL.
pub(super) fn put_text(bytes: &mut Vec<u8>, kind: u16, text: &str) {
    let mut value = text.as_bytes().to_vec();
    value.push(0);
    put(bytes, kind, &value);
}

/// Adds an attribute that holds others.
pub(super) fn put_nested(bytes: &mut Vec<u8>, kind: u16, value: &[u8]) {
    const NESTED: u16 = 0x8000;
    put(bytes, kind | NESTED, value);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_left_out_and_damage_ends_the_list() {
        let mut bytes = Vec::new();
        put(&mut bytes, 1, b"abcd");
        put_nested(&mut bytes, 2, b"efgh");
        put(&mut bytes, 3, b"ijkl");
        assert_eq!(only(&bytes, &[2]), bytes[8..16]);
        assert_eq!(without(&bytes, &[1, 3]), bytes[8..16]);
        assert_eq!(only(&bytes[..21], &[1, 2, 3]), bytes[..16]);
        assert!(only(&[0; 8], &[0]).is_empty());
        assert_eq!(value(&bytes, 2), Some(&b"efgh"[..]));
    }

    #[test]
    fn what_differs_is_told() {
        let (mut one, mut other) = (Vec::new(), Vec::new());
        put_text(&mut one, 1, "same");
        put(&mut one, 2, b"new");
        put_text(&mut other, 1, "same");
        put(&mut other, 2, b"old");
        let left = different(&one, &other);
        assert_eq!(all(&left).collect::<Vec<_>>(), [(2, &b"new"[..])]);
        assert_eq!(text(&one, 1).as_deref(), Some("same"));
    }
}
