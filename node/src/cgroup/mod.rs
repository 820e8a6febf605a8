//! Memory, CPU and process limits of VEs, and freezing and killing them as a whole.
