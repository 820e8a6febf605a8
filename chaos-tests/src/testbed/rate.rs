//! How people write the speed of a link.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// A speed in bits per second.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rate {
    bits_per_s: u64,
}

impl Rate {
    /// In bytes per second.
    pub fn bytes_per_s(self) -> u64 {
        self.bits_per_s / 8
    }
}

/// The text is not a speed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a rate like 100mbit, 1gbit or 64kbit, of at least 8kbit")]
pub struct NotARate {
    text: String,
}

impl FromStr for Rate {
    type Err = NotARate;

    fn from_str(text: &str) -> Result<Self, NotARate> {
        let parse = || {
            let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
            let (number, unit) = text.split_at(digits);
            let factor: u64 = match unit.to_ascii_lowercase().as_str() {
                "bit" => 1,
                "kbit" => 1_000,
                "mbit" => 1_000_000,
                "gbit" => 1_000_000_000,
                _ => return None,
            };
            let bits_per_s = number.parse::<u64>().ok()?.checked_mul(factor)?;
            (8_000..1_000_000_000_000).contains(&bits_per_s).then_some(Self { bits_per_s })
        };
        parse().ok_or_else(|| NotARate { text: text.into() })
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = [(1_000_000_000, "gbit"), (1_000_000, "mbit"), (1_000, "kbit"), (1, "bit")];
        let (size, unit) = units
            .into_iter()
            .find(|(size, _)| self.bits_per_s.is_multiple_of(*size))
            .unwrap_or((1, "bit"));
        write!(f, "{}{unit}", self.bits_per_s / size)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_read_and_written() {
        assert_eq!("100mbit".parse::<Rate>().unwrap().bytes_per_s(), 12_500_000);
        assert_eq!("1500kbit".parse::<Rate>().unwrap().to_string(), "1500kbit");
        assert_eq!("2gbit".parse::<Rate>().unwrap().to_string(), "2gbit");
        for wrong in ["", "10", "mbit", "-1mbit", "1mb", "0gbit", "1bit", "99999999999gbit"] {
            assert!(wrong.parse::<Rate>().is_err(), "{wrong}");
        }
    }
}
