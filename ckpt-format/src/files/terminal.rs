//! Pseudo terminals.

use serde::{Deserialize, Serialize};

/// A pseudo terminal of the VE.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Terminal {
    /// The number under `/dev/pts`.
    pub index: u32,
    /// `struct termios2`; empty when the master is closed.
    #[serde(with = "serde_bytes")]
    pub settings: Vec<u8>,
    /// `struct winsize`: rows, columns, and the size in pixels.
    pub window: [u16; 4],
    /// Every slave was closed after one was open: the master reads the end.
    pub hung_up: bool,
    /// Packet mode (`TIOCPKT`).
    pub packet_mode: bool,
    /// `TIOCEXCL`.
    pub exclusive: bool,
    /// The slave is locked (`TIOCSPTLCK`).
    pub locked: bool,
    /// The mode bits of the slave node.
    pub mode: u32,
    /// Owner inside the VE.
    pub uid: u32,
    /// Group inside the VE.
    pub gid: u32,
    /// The session whose controlling terminal it is; 0 for none.
    pub session: i32,
    /// The foreground process group; 0 for none.
    pub foreground: i32,
    /// Bytes that the slave wrote and the master has not read.
    #[serde(with = "serde_bytes")]
    pub output: Vec<u8>,
    /// Bytes that the master wrote and the slave has not read.
    #[serde(with = "serde_bytes")]
    pub input: Vec<u8>,
    /// Which of those bytes, by place, end a read of lines: the end of a line, or as a zero the
    /// character that ends the input (`VEOF`). `None` where that was not told: every line end does.
    #[serde(default)]
    pub marks: Option<Vec<u32>>,
    /// Bytes behind them that the terminal has not dealt with yet.
    #[serde(default, with = "serde_bytes")]
    pub typed: Vec<u8>,
    /// What the slave wrote is stopped by the stop character (`VSTOP`).
    #[serde(default)]
    pub stopped: bool,
    /// It is stopped by tcflow(3).
    #[serde(default)]
    pub held: bool,
    /// What the master writes is stopped by tcflow(3).
    #[serde(default)]
    pub master_held: bool,
    /// In packet mode, what the next read of the master tells: `TIOCPKT_*`.
    #[serde(default)]
    pub news: u8,
}
