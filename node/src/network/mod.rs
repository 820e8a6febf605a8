//! The LAN of the VEs: the bridge, each VE's veth pair and addresses, and holding packets.
