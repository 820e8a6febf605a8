//! Moves a running VE between two nodes: the source's half and the target's half.
