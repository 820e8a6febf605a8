//! Virtual Environments on this node.
