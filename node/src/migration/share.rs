//! Averages that forget.

/// How many bytes it takes until half of what is known is forgotten.
const MEMORY: f64 = (8 << 20) as f64;

/// How much of something there is for each byte, of late.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Share {
    bytes: f64,
    amount: f64,
}

impl Share {
    pub(super) fn add(&mut self, bytes: usize, amount: f64) {
        let bytes = bytes as f64;
        let keep = (-bytes / MEMORY).exp2();
        self.bytes = self.bytes * keep + bytes;
        self.amount = self.amount * keep + amount;
    }

    pub(super) fn get(self) -> Option<f64> {
        (self.bytes > 0.0).then(|| self.amount / self.bytes)
    }
}
