//! Ethernet addresses and address prefixes, and how people write them.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr},
    str::FromStr,
};

use serde::{Deserialize, Serialize};

/// An Ethernet address of one station.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Mac([u8; 6]);

impl Mac {
    /// A locally administered address made from six bytes, of which two bits are not used.
    pub fn local(mut bytes: [u8; 6]) -> Self {
        bytes[0] = bytes[0] & 0xfc | 0x02;
        Self(bytes)
    }

    /// The bytes of a message as an address; none if they cannot be that of a station.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let bytes: [u8; 6] = bytes.try_into().ok()?;
        // A group address can be nobody's own.
        (bytes[0] & 1 == 0 && bytes != [0; 6]).then_some(Self(bytes))
    }

    /// The bytes in the order in which they are on the wire.
    pub fn bytes(self) -> [u8; 6] {
        self.0
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// The text is not an Ethernet address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not an Ethernet address like 02:00:5e:10:00:01")]
pub struct NotAMac {
    /// What was given.
    pub text: String,
}

impl FromStr for Mac {
    type Err = NotAMac;

    fn from_str(text: &str) -> Result<Self, NotAMac> {
        let parse = || {
            let mut bytes = [0; 6];
            let mut parts = text.split(':');
            for byte in &mut bytes {
                let part = parts.next().filter(|part| part.len() == 2)?;
                *byte = u8::from_str_radix(part, 16).ok()?;
            }
            if parts.next().is_some() {
                return None;
            }
            Self::from_bytes(&bytes)
        };
        parse().ok_or_else(|| NotAMac { text: text.into() })
    }
}

impl TryFrom<String> for Mac {
    type Error = NotAMac;

    fn try_from(text: String) -> Result<Self, NotAMac> {
        text.parse()
    }
}

impl From<Mac> for String {
    fn from(mac: Mac) -> Self {
        mac.to_string()
    }
}

/// An address and the length of its network's prefix.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Cidr {
    address: IpAddr,
    prefix: u8,
}

impl Cidr {
    /// Puts the two together; none if the prefix is longer than the address.
    pub fn new(address: IpAddr, prefix: u8) -> Option<Self> {
        (prefix <= Self::longest(address)).then_some(Self { address, prefix })
    }

    /// The address.
    pub fn address(self) -> IpAddr {
        self.address
    }

    /// The length of the prefix in bits.
    pub fn prefix(self) -> u8 {
        self.prefix
    }

    /// The broadcast address of an IPv4 network that has one.
    pub fn broadcast(self) -> Option<Ipv4Addr> {
        match self.address {
            IpAddr::V4(v4) if self.prefix < 31 => {
                let host_bits = u32::MAX.checked_shr(self.prefix.into()).unwrap_or(0);
                Some((u32::from(v4) | host_bits).into())
            }
            _ => None,
        }
    }

    fn longest(address: IpAddr) -> u8 {
        if address.is_ipv4() { 32 } else { 128 }
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

impl fmt::Debug for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// The text is not an address with a prefix.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not an address like 10.77.1.1/16")]
pub struct NotACidr {
    /// What was given.
    pub text: String,
}

impl FromStr for Cidr {
    type Err = NotACidr;

    /// Without a prefix it is that of a single host.
    fn from_str(text: &str) -> Result<Self, NotACidr> {
        let parse = || {
            let (address, prefix) = match text.split_once('/') {
                Some((address, prefix)) => (address, Some(prefix)),
                None => (text, None),
            };
            let address: IpAddr = address.parse().ok()?;
            let prefix = match prefix {
                Some(prefix) => prefix.parse().ok()?,
                None => Self::longest(address),
            };
            Self::new(address, prefix)
        };
        parse().ok_or_else(|| NotACidr { text: text.into() })
    }
}

impl TryFrom<String> for Cidr {
    type Error = NotACidr;

    fn try_from(text: String) -> Result<Self, NotACidr> {
        text.parse()
    }
}

impl From<Cidr> for String {
    fn from(cidr: Cidr) -> Self {
        cidr.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ethernet_addresses_are_read_and_written() {
        assert_eq!("02:00:5e:10:00:ff".parse::<Mac>().unwrap().to_string(), "02:00:5e:10:00:ff");
        let wrong = [
            "",
            "02:00:5e:10:00",
            "02:00:5e:10:00:01:02",
            "01:00:5e:10:00:01",
            "00:00:00:00:00:00",
            "2:0:5e:10:0:1",
        ];
        for wrong in wrong {
            assert!(wrong.parse::<Mac>().is_err(), "{wrong}");
        }
        assert!(Mac::local([0xff; 6]).to_string().parse::<Mac>().is_ok());
    }

    #[test]
    fn prefixes_are_read_and_written() {
        let cidr: Cidr = "10.77.1.1/16".parse().unwrap();
        assert_eq!(cidr.to_string(), "10.77.1.1/16");
        assert_eq!(cidr.broadcast(), Some([10, 77, 255, 255].into()));
        assert_eq!("10.77.1.1".parse::<Cidr>().unwrap().prefix(), 32);
        assert_eq!("fd00::1".parse::<Cidr>().unwrap().prefix(), 128);
        assert_eq!("0.0.0.0/0".parse::<Cidr>().unwrap().broadcast(), Some([255; 4].into()));
        for wrong in ["", "10.77.1.1/33", "10.77.1/16", "fd00::1/129", "10.77.1.1/-1", "/16"] {
            assert!(wrong.parse::<Cidr>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn they_are_checked_when_they_are_decoded() {
        let bytes = crate::codec::encode(&"01:00:5e:10:00:01".to_owned());
        assert!(crate::codec::decode::<Mac>(&bytes).is_err());
        let cidr: Cidr = "fd00::1/64".parse().unwrap();
        assert_eq!(crate::codec::decode::<Cidr>(&crate::codec::encode(&cidr)).unwrap(), cidr);
    }
}
