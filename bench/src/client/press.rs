//! Does as much as a service lets it, or a steady number of operations, and remembers when each
//! answer came, so that stretches of time can be compared afterwards.

use std::io::{self, BufRead, Write};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::exchange::{Dialogue, Exchange};

/// When an answer came, and how long it took, in microseconds.
type Answers = Vec<(u64, u32)>;

/// What is told of a stretch of time, whose ends are in seconds since the start.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Stretch {
    /// When it began.
    pub from_s: f64,
    /// When it ended.
    pub to_s: f64,
    /// Operations per second.
    pub rate: f64,
    /// Half of them took at most so long.
    pub p50_us: f64,
    /// 99 of a hundred.
    pub p99_us: f64,
}

/// Obeys standard input, one line each, and answers with one JSON object: `now` (a stretch of no
/// length), `gap FROM TO` (the longest time without any answer between), `stretch FROM TO`.
///
/// With a `pace`, that many operations are begun in a second, over all connections; a connection
/// whose answer is late begins its next one then, and makes up for nothing.
pub fn run(
    exchange: Exchange,
    address: SocketAddr,
    connections: usize,
    pace: Option<u32>,
) -> io::Result<()> {
    let epoch = Instant::now();
    let all: Arc<Mutex<Answers>> = Arc::default();
    let connections = connections.max(1) as u32;
    let period = pace.map(|pace| Duration::from_secs(1) * connections / pace.max(1));
    for number in 0..connections {
        let mut dialogue = Dialogue::open(exchange, address)?;
        dialogue.ask()?;
        let all = Arc::clone(&all);
        // They take turns.
        let mut due = Instant::now() + period.unwrap_or_default() * number / connections;
        std::thread::spawn(move || {
            loop {
                if let Some(period) = period {
                    std::thread::sleep(due.saturating_duration_since(Instant::now()));
                    due = (due + period).max(Instant::now());
                }
                let asked = Instant::now();
                if let Err(error) = dialogue.ask() {
                    eprintln!("benchpart: a connection was lost: {error}");
                    return;
                }
                let took = u32::try_from(asked.elapsed().as_micros()).unwrap_or(u32::MAX);
                let at = epoch.elapsed().as_micros() as u64;
                all.lock().unwrap_or_else(PoisonError::into_inner).push((at, took));
            }
        });
    }
    for line in io::stdin().lock().lines() {
        let line = line?;
        let mut words = line.split_whitespace();
        let verb = words.next().unwrap_or_default();
        let mut time = || words.next().and_then(|word| word.parse::<f64>().ok()).unwrap_or(0.0);
        let (from_s, to_s) = (time(), time());
        let answers = {
            let all = all.lock().unwrap_or_else(PoisonError::into_inner);
            let inside = |&&(at, _): &&(u64, u32)| {
                let at = at as f64 / 1e6;
                from_s <= at && at < to_s
            };
            all.iter().filter(inside).copied().collect::<Answers>()
        };
        let told = match verb {
            "gap" => gap(answers, from_s, to_s),
            "stretch" => stretch(answers, from_s, to_s),
            _ => {
                let now = epoch.elapsed().as_secs_f64();
                Stretch { from_s: now, to_s: now, ..Stretch::default() }
            }
        };
        let mut output = io::stdout().lock();
        writeln!(output, "{}", serde_json::to_string(&told).expect("plain data"))?;
        output.flush()?;
    }
    Ok(())
}

/// The longest time without an answer.
fn gap(mut answers: Answers, from_s: f64, to_s: f64) -> Stretch {
    answers.sort_unstable();
    let mut times = vec![from_s];
    times.extend(answers.iter().map(|&(at, _)| at as f64 / 1e6));
    times.push(to_s);
    let longest =
        times.windows(2).max_by(|one, other| (one[1] - one[0]).total_cmp(&(other[1] - other[0])));
    longest.map_or_else(Stretch::default, |pair| Stretch {
        from_s: pair[0],
        to_s: pair[1],
        ..Stretch::default()
    })
}

fn stretch(answers: Answers, from_s: f64, to_s: f64) -> Stretch {
    let mut times: Vec<u32> = answers.iter().map(|&(_, took)| took).collect();
    times.sort_unstable();
    let share = |share: f64| {
        let at = (times.len() as f64 * share) as usize;
        times.get(at.min(times.len().saturating_sub(1))).map_or(0.0, |&took| f64::from(took))
    };
    let length = Duration::from_secs_f64((to_s - from_s).max(1e-6)).as_secs_f64();
    let rate = times.len() as f64 / length;
    Stretch { from_s, to_s, rate, p50_us: share(0.5), p99_us: share(0.99) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stall_is_the_longest_gap() {
        let answers = vec![(100_000, 5), (200_000, 5), (900_000, 700_000), (950_000, 5)];
        let found = gap(answers.clone(), 0.0, 1.0);
        assert_eq!((found.from_s, found.to_s), (0.2, 0.9));
        let found = stretch(answers, 0.0, 1.0);
        assert_eq!((found.rate, found.p50_us, found.p99_us), (4.0, 5.0, 700_000.0));
    }
}
