//! From values to places in a plot, and where the ticks are.
//!
//! Enters: the values of one axis. Leaves: shares of its length. Draws nothing.

/// One axis.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Scale {
    from: f64,
    to: f64,
    is_log: bool,
}

impl Scale {
    /// From 0 to a round number at or above the largest value.
    pub fn linear(values: impl IntoIterator<Item = f64>) -> Self {
        let most = finite(values).fold(0.0, f64::max);
        let to = if most > 0.0 { most } else { 1.0 };
        let step = round_step(to / 4.0);
        Self {
            from: 0.0,
            to: (to / step).ceil() * step,
            is_log: false,
        }
    }

    /// Whole decades around the values above zero.
    pub fn log(values: impl IntoIterator<Item = f64>) -> Self {
        let positive = finite(values).filter(|value| *value > 0.0);
        let (least, most) = positive.fold((f64::INFINITY, 0.0), |(least, most), value| {
            (f64::min(least, value), f64::max(most, value))
        });
        let (least, most) = if most > 0.0 {
            (least, most)
        } else {
            (0.1, 1.0)
        };
        let from = least.log10().floor();
        Self {
            from,
            to: most.log10().ceil().max(from + 1.0),
            is_log: true,
        }
    }

    /// From one number to another.
    pub fn between(from: f64, to: f64) -> Self {
        Self {
            from,
            to: if to > from { to } else { from + 1.0 },
            is_log: false,
        }
    }

    /// Where a value lies: 0 at the start, 1 at the end; beyond is cut.
    pub fn place(&self, value: f64) -> f64 {
        let value = match self.is_log {
            true if value > 0.0 => value.log10(),
            true => self.from,
            false => value,
        };
        ((value - self.from) / (self.to - self.from)).clamp(0.0, 1.0)
    }

    /// At most six ticks, each with its label.
    pub fn ticks(&self) -> Vec<(f64, String)> {
        if self.is_log {
            let step = ((self.to - self.from) / 5.0).ceil().max(1.0);
            let exponents = steps(self.from, self.to, step).into_iter();
            return exponents
                .map(|e| (10f64.powf(e), power_of_ten(e as i32)))
                .collect();
        }
        let step = round_step((self.to - self.from) / 4.0);
        let first = (self.from / step).ceil() * step;
        let values = steps(first, self.to, step).into_iter();
        values.map(|value| (value, plain(value, step))).collect()
    }
}

fn finite(values: impl IntoIterator<Item = f64>) -> impl Iterator<Item = f64> {
    values.into_iter().filter(|value| value.is_finite())
}

fn steps(from: f64, to: f64, step: f64) -> Vec<f64> {
    let count = ((to - from) / step + 1e-9).floor() as usize;
    (0..=count)
        .map(|index| from + step * index as f64)
        .collect()
}

/// 1, 2 or 5 times a power of ten, at least `step`.
fn round_step(step: f64) -> f64 {
    let decade = 10f64.powf(step.log10().floor());
    let factor = [1.0, 2.0, 5.0]
        .into_iter()
        .find(|factor| factor * decade >= step * (1.0 - 1e-9));
    factor.unwrap_or(10.0) * decade
}

/// Powers of ten as they are read best.
fn power_of_ten(exponent: i32) -> String {
    match exponent {
        -3..=3 => plain(10f64.powi(exponent), 10f64.powi(exponent)),
        _ => format!("1e{exponent}"),
    }
}

fn plain(value: f64, step: f64) -> String {
    let decimals = (-step.log10().floor()).max(0.0) as usize;
    if decimals > 5 || value.abs() >= 1e6 {
        format!("{value:.0e}")
    } else {
        format!("{value:.decimals$}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(scale: Scale) -> Vec<String> {
        scale.ticks().into_iter().map(|(_, label)| label).collect()
    }

    #[test]
    fn ticks_are_round_and_few() {
        assert_eq!(
            labels(Scale::linear([0.0226])),
            ["0.00", "0.01", "0.02", "0.03"]
        );
        assert_eq!(labels(Scale::linear([220.0])), ["0", "100", "200", "300"]);
        assert_eq!(labels(Scale::linear([])), ["0.0", "0.5", "1.0"]);
        assert_eq!(
            labels(Scale::log([2e-4, 0.09])),
            ["1e-4", "0.001", "0.01", "0.1"]
        );
        assert_eq!(labels(Scale::log([0.0])), ["0.1", "1"]);
        assert!(labels(Scale::log([1e-30, 1.0])).len() <= 6);
    }

    #[test]
    fn places_stay_inside() {
        let scale = Scale::log([1e-3, 1e-1]);
        assert_eq!(scale.place(0.0), 0.0);
        assert_eq!(scale.place(1e9), 1.0);
        assert!((scale.place(1e-2) - 0.5).abs() < 1e-9);
        assert_eq!(Scale::between(3.0, 3.0).place(3.0), 0.0);
        assert_eq!(
            Scale::linear([f64::INFINITY, f64::NAN, 1.0]).place(1.0),
            1.0
        );
    }
}
