//! From the two losses that were probed to the divergence of any.

/// Bounds of the exponent with which the divergence grows between the two probes.
const GROWTH: (f64, f64) = (0.5, 2.0);

/// Divergence by local loss: proportional up to the smaller of the measured losses, a power between them and beyond.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Curve {
    /// Divergence per loss where losses are small.
    pub gain: f64,
    knee: f64,
    exponent: f64,
}

impl Curve {
    /// `points`: loss and divergence, one or two, the larger loss first.
    pub fn through(points: &[(f64, f64)]) -> Self {
        let Some(&(knee, divergence)) = points.last() else {
            return Self {
                gain: 0.0,
                knee: 0.0,
                exponent: 1.0,
            };
        };
        let gain = if knee > 0.0 {
            divergence.max(0.0) / knee
        } else {
            0.0
        };
        let exponent = match points {
            [(loss, high), (_, low)] if *loss > knee && knee > 0.0 && *high > 0.0 && *low > 0.0 => {
                ((high / low).ln() / (loss / knee).ln()).clamp(GROWTH.0, GROWTH.1)
            }
            _ => 1.0,
        };
        Self {
            gain,
            knee,
            exponent,
        }
    }

    /// The divergence of a loss.
    pub fn at(&self, loss: f64) -> f64 {
        match loss > self.knee {
            true => self.gain * self.knee * (loss / self.knee).powf(self.exponent),
            false => self.gain * loss,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_curve_goes_through_what_was_measured() {
        let near = |a: f64, b: f64| assert!((a - b).abs() < 1e-12, "{a} is not {b}");
        let curve = Curve::through(&[(0.1, 0.04), (0.01, 0.002)]);
        near(curve.at(0.1), 0.04);
        near(curve.at(0.01), 0.002);
        near(curve.at(0.001), 0.0002);
        let line = Curve::through(&[(0.1, 0.04)]);
        near(line.at(0.05), 0.02);
        near(line.at(0.2), 0.08);
        near(Curve::through(&[(0.0, 0.0)]).at(0.0), 0.0);
    }
}
