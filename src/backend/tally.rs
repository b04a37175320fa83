//! Which operations ran where.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Mutex, PoisonError};

/// Counts of operations, shared by every backend of one device.
#[derive(Debug, Default)]
pub struct Tally(Mutex<BTreeMap<&'static str, Count>>);

/// How often an operation ran.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Count {
    /// On the device.
    pub device: u64,
    /// On the CPU in its place.
    pub host: u64,
}

impl Tally {
    /// One run on the device.
    pub fn device(&self, operation: &'static str) {
        self.with(operation, |count| count.device += 1);
    }

    /// One run on the CPU.
    pub fn host(&self, operation: &'static str) {
        self.with(operation, |count| count.host += 1);
    }

    fn with(&self, operation: &'static str, change: impl FnOnce(&mut Count)) {
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        change(counts.entry(operation).or_default());
    }

    /// By operation.
    pub fn counts(&self) -> BTreeMap<&'static str, Count> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

impl fmt::Display for Tally {
    /// `on the device: matmul 120, rms_norm 12; on the CPU: route 4`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let counts = self.counts();
        let list = |of: fn(&Count) -> u64| {
            let ran = counts.iter().filter(|(_, count)| of(count) > 0);
            let ran: Vec<String> = ran
                .map(|(operation, count)| format!("{operation} {}", of(count)))
                .collect();
            match ran.len() {
                0 => "none".to_string(),
                _ => ran.join(", "),
            }
        };
        write!(
            f,
            "on the device: {}; on the CPU: {}",
            list(|count| count.device),
            list(|count| count.host)
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_told_apart() {
        let tally = Tally::default();
        tally.device("matmul");
        tally.device("matmul");
        tally.host("route");
        let expected = "on the device: matmul 2; on the CPU: route 1";
        assert_eq!(tally.to_string(), expected);
    }
}
