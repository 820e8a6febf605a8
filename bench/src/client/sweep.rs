//! Asks the web servers of very many VEs for their page, once each, over new connections.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// How long an answer may take before it counts as none.
const PATIENCE: Duration = Duration::from_secs(10);
/// How many ask at a time.
const ASKING: usize = 8;

/// The address of a VE, counted from nought. The last number is never 0 or 255.
pub fn address(first: Ipv4Addr, number: u32) -> Ipv4Addr {
    let [a, b, c, _] = first.octets();
    Ipv4Addr::new(a, b, c + (number / 250) as u8, (number % 250 + 1) as u8)
}

/// Prints a list with the milliseconds that each took; `null` for one that gave no answer.
pub fn run(first: Ipv4Addr, count: u32) -> io::Result<()> {
    let next = AtomicU32::new(0);
    let took = Mutex::new(vec![None; count as usize]);
    std::thread::scope(|scope| {
        for _ in 0..ASKING {
            scope.spawn(|| {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= count {
                        return;
                    }
                    let asked = Instant::now();
                    let ms = ask(address(first, number))
                        .ok()
                        .map(|()| asked.elapsed().as_secs_f64() * 1e3);
                    if let Ok(mut took) = took.lock() {
                        took[number as usize] = ms;
                    }
                }
            });
        }
    });
    let took = took.into_inner().unwrap_or_default();
    println!("{}", serde_json::to_string(&took).expect("plain data"));
    Ok(())
}

fn ask(address: Ipv4Addr) -> io::Result<()> {
    let mut stream = TcpStream::connect_timeout(&SocketAddr::from((address, 80)), PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(b"GET / HTTP/1.0\r\nHost: ve\r\n\r\n")?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    let good = answer.starts_with(b"HTTP/1.") && answer.get(9..12) == Some(b"200");
    if good { Ok(()) } else { Err(io::ErrorKind::InvalidData.into()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_go_on_in_the_next_block() {
        let first = Ipv4Addr::new(10, 77, 2, 1);
        assert_eq!(address(first, 0), first);
        assert_eq!(address(first, 249), Ipv4Addr::new(10, 77, 2, 250));
        assert_eq!(address(first, 250), Ipv4Addr::new(10, 77, 3, 1));
    }
}
