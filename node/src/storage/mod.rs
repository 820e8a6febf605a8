//! The files of VEs: where they lie, and how they follow a VE to another node.
