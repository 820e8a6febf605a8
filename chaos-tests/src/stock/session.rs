//! Conversations that go on all the time: what is said must be answered, in order, by the same
//! server. One that breaks or answers wrong is an error, not a reason to begin another.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// What came of a conversation.
#[derive(Clone, Debug, Default)]
pub(super) struct Talk {
    /// Questions answered.
    pub(super) answers: u64,
    /// The longest that one took.
    pub(super) longest: Duration,
    /// What ended it before its time.
    pub(super) error: Option<String>,
}

/// A conversation on a thread of its own.
#[derive(Debug)]
pub(super) struct Session {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Talk>>,
}

impl Session {
    fn start(mut ask: impl FnMut(u64) -> io::Result<()> + Send + 'static, pause: Duration) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let talk = move || {
            let mut talk = Talk::default();
            while !stopped.load(Ordering::Relaxed) {
                let begin = Instant::now();
                if let Err(error) = ask(talk.answers + 1) {
                    talk.error = Some(error.to_string());
                    break;
                }
                talk.answers += 1;
                talk.longest = talk.longest.max(begin.elapsed());
                thread::sleep(pause);
            }
            talk
        };
        Self { stop, thread: Some(thread::spawn(talk)) }
    }

    /// Says numbers to somebody who doubles each, after a line that says that it is there.
    pub(super) fn doubling(
        output: impl Read + Send + 'static,
        mut input: impl Write + Send + 'static,
    ) -> Self {
        let mut output = BufReader::new(output);
        let mut greeted = false;
        let ask = move |number: u64| {
            if !greeted {
                expect(&mut output, |line| line == "ready")?;
                greeted = true;
            }
            writeln!(input, "{number}")?;
            input.flush()?;
            expect(&mut output, |line| line == (number * 2).to_string())
        };
        Self::start(ask, Duration::from_millis(20))
    }

    /// Sends numbered letters to a user of a mail server over few connections.
    pub(super) fn letters(
        connect: impl Fn() -> io::Result<TcpStream> + Send + 'static,
        receiver: &'static str,
    ) -> Self {
        let mut mail: Option<Mail> = None;
        let ask = move |number: u64| {
            // A server takes only so many letters on one connection.
            if number % 50 == 1
                && let Some(last) = mail.take()
            {
                last.end()?;
            }
            let mail = match &mut mail {
                Some(mail) => mail,
                none => none.insert(Mail::new(connect()?)?),
            };
            mail.letter(receiver, number)
        };
        Self::start(ask, Duration::from_millis(300))
    }

    /// Ends the conversation.
    pub(super) fn stop(mut self) -> Talk {
        self.stop.store(true, Ordering::Relaxed);
        let ended = self.thread.take().map(JoinHandle::join);
        let failed = || Talk { error: Some("the client panicked".to_owned()), ..Talk::default() };
        ended.and_then(Result::ok).unwrap_or_else(failed)
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn expect(output: &mut impl BufRead, fits: impl Fn(&str) -> bool) -> io::Result<()> {
    let mut line = String::new();
    if output.read_line(&mut line)? == 0 {
        return Err(io::Error::other("the session has ended"));
    }
    match line.trim_end() {
        line if fits(line) => Ok(()),
        other => Err(io::Error::other(format!("the answer is {other:?}"))),
    }
}

/// A connection to a mail server.
#[derive(Debug)]
struct Mail {
    stream: BufReader<TcpStream>,
}

impl Mail {
    fn new(stream: TcpStream) -> io::Result<Self> {
        stream.set_read_timeout(Some(Duration::from_secs(60)))?;
        let mut mail = Self { stream: BufReader::new(stream) };
        expect(&mut mail.stream, |line| line.starts_with("220 "))?;
        mail.say("HELO client", "250")?;
        Ok(mail)
    }

    fn say(&mut self, words: &str, answer: &str) -> io::Result<()> {
        write!(self.stream.get_mut(), "{words}\r\n")?;
        expect(&mut self.stream, |line| line.starts_with(answer))
    }

    fn letter(&mut self, receiver: &str, number: u64) -> io::Result<()> {
        self.say("MAIL FROM:<stock@localhost>", "250")?;
        self.say(&format!("RCPT TO:<{receiver}@localhost>"), "250")?;
        self.say("DATA", "354")?;
        self.say(&format!("Subject: letter {number}\r\n\r\nNumber {number}.\r\n."), "250")
    }

    fn end(mut self) -> io::Result<()> {
        self.say("QUIT", "221")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_answer_ends_a_session() {
        let (one, two) = std::os::unix::net::UnixStream::pair().unwrap();
        let session = Session::doubling(one.try_clone().unwrap(), one);
        let mut server = BufReader::new(two);
        writeln!(server.get_mut(), "ready").unwrap();
        for answer in ["2", "5"] {
            let mut line = String::new();
            server.read_line(&mut line).unwrap();
            writeln!(server.get_mut(), "{answer}").unwrap();
        }
        let mut rest = String::new();
        // It ends when the client has let go.
        server.read_line(&mut rest).unwrap();
        let talk = session.stop();
        assert_eq!((talk.answers, rest.as_str()), (1, ""));
        assert_eq!(talk.error.as_deref(), Some("the answer is \"5\""));
    }
}
