//! A client that knows every answer beforehand.
//!
//! Each connection to a redis server remembers what it wrote last, so that a lost, repeated or
//! damaged request is seen as a wrong answer, and measures how long every request took. It never
//! reconnects: a connection that ends is a failure of what is being tested.

pub mod counters;
pub mod latency;
pub mod load;
pub mod plot;
pub mod record;
pub mod remote;
pub mod report;
pub mod resp;
pub mod svg;
pub mod web;
