//! What the calibrated part of a run takes, said before it begins.

use std::fmt;

use nemoconv::convert::calibrated::needs::{Arrangement, Needs, measured_rate};
use nemoconv::error::Result;

use super::output::human_bytes;
use super::workers::on_workers;

/// Memory and time of a rounding.
pub struct Effort {
    arrangement: Arrangement,
    /// An estimate by the multiply-adds that are to be made and the rate of this machine.
    seconds: f64,
}

impl Effort {
    /// Of what is to be rounded within `memory_bytes`.
    pub fn of(needs: &Needs, memory_bytes: u64, threads: Option<u16>) -> Result<Self> {
        Ok(Self {
            arrangement: needs.arrange(memory_bytes)?,
            seconds: needs.multiply_adds() / on_workers(threads, measured_rate),
        })
    }

    /// Most memory at a time.
    pub fn peak_bytes(&self) -> u64 {
        self.arrangement.peak_bytes
    }
}

impl fmt::Display for Effort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut means = Vec::new();
        if self.arrangement.streams_in_file {
            means.push("residual streams in a file".to_owned());
        }
        if self.arrangement.most_passes > 1 {
            let passes = self.arrangement.most_passes;
            means.push(format!("second moments in up to {passes} passes"));
        }
        let by = match means.is_empty() {
            true => String::new(),
            false => format!(" ({})", means.join(", ")),
        };
        let time = match self.seconds {
            seconds if seconds < 90.0 => format!("{seconds:.0} s"),
            seconds if seconds < 5400.0 => format!("{:.0} min", seconds / 60.0),
            seconds => format!("{:.1} h", seconds / 3600.0),
        };
        write!(
            f,
            "rounding takes about {} of memory{by} and {time}",
            human_bytes(self.arrangement.peak_bytes)
        )
    }
}
