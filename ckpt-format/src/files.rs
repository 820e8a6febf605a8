//! Open file descriptions and the objects behind them.

use serde::{Deserialize, Serialize};

/// One open file description, unique in one capture.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct FileId(pub u32);
