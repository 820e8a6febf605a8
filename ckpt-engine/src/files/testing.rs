//! A child process whose files are captured, and the rebuild of them in this process.
