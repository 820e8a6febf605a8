//! Checkpoint files: written, read and looked at.
//!
//! What is in them is [`ckpt_format::image`]'s business; here they meet the disk. An
//! [`ImageWriter`] makes a file that is complete or not there. An [`Image`] is one that was opened:
//! [`Image::verify`] reads all of it, and whoever restores a VE does that before anything else.
//! Neither holds more than a few chunks in memory, however large the VE is.

mod draft;
mod error;
mod inspect;
mod press;
mod reader;
mod writer;

pub use self::{
    error::ImageFileError,
    inspect::{InspectedProcess, Inspection},
    reader::{Contents, Image, Records},
    writer::{COMPRESSION_DEFAULT, COMPRESSION_MAX, ImageWriter, Written},
};
