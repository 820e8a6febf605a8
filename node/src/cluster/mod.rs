//! This node's part in the cluster: membership, and who owns which VE.
