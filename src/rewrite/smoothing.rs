//! Scales that share the sizes of channels between activation and weights.
//!
//! Enters: sizes of the channels of an activation and of the columns that read it. Leaves: what every channel is divided
//! by. Knows no tensors.
//!
//! Source: SmoothQuant, arXiv:2211.10438, equation 4. Departures: sizes of columns are root mean squares, which rotating
//! the rows does not change, and there is no clamp to a range. So the scales do not depend on how a model happens to have
//! shared the sizes before: a channel with factor 64 in the activation and 1/64 in the weights ends as any other.

use super::Balance;

/// Scales stay within 2^+-40, far from what F32 cannot hold.
const LIMIT: f64 = (1_u64 << 40) as f64;

/// What channels with sizes `activations` that meet columns of sizes `weights` are divided by. The root mean square of the
/// sizes becomes 1. A channel that is 0 on one side gets the median size on the other.
pub fn scales(activations: &[f64], weights: &[f64], balance: Balance) -> Vec<f64> {
    let is_seen = |size: &f64| size.is_finite() && *size > 0.0;
    let share = |activation: f64, weight: f64| {
        quarters(activation, balance.0) / quarters(weight, 4 - balance.0)
    };
    let pairs = || activations.iter().zip(weights);
    let alive: Vec<(f64, f64, f64)> = pairs()
        .filter(|(a, w)| is_seen(a) && is_seen(w))
        .map(|(a, w)| (*a, *w, share(*a, *w)))
        .collect();
    if alive.is_empty() {
        return vec![1.0; activations.len()];
    }
    let squares = alive.iter().map(|(a, _, s)| (a / s) * (a / s));
    let size = (squares.sum::<f64>() / alive.len() as f64).sqrt();
    let usual_activation = median(alive.iter().map(|(a, _, s)| a / (s * size)));
    let usual_weight = median(alive.iter().map(|(_, w, s)| w * s * size));
    let scale = |(activation, weight): (&f64, &f64)| {
        let scale = match (is_seen(activation), is_seen(weight)) {
            (true, true) => share(*activation, *weight) * size,
            (true, false) => activation / usual_activation,
            (false, true) => usual_weight / weight,
            (false, false) => 1.0,
        };
        scale.clamp(1.0 / LIMIT, LIMIT)
    };
    pairs().map(scale).collect()
}

/// `x^(quarters / 4)`.
fn quarters(x: f64, quarters: u8) -> f64 {
    let half = x.sqrt();
    match quarters {
        0 => 1.0,
        1 => half.sqrt(),
        2 => half,
        3 => half * half.sqrt(),
        _ => x,
    }
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn how_sizes_were_shared_before_does_not_matter() {
        let (a, w) = ([1.0, 3.0, 0.5, 2.0], [0.5, 0.25, 4.0, 1.0]);
        let factors = [64.0, 0.125, 1.0, 16.0];
        let moved_a: Vec<f64> = a.iter().zip(factors).map(|(a, f)| a * f).collect();
        let moved_w: Vec<f64> = w.iter().zip(factors).map(|(w, f)| w / f).collect();
        for quarters in 0..=4 {
            let balance = Balance::quarters(quarters).unwrap();
            let (before, after) = (scales(&a, &w, balance), scales(&moved_a, &moved_w, balance));
            for index in 0..4 {
                let ratio = after[index] / before[index] / factors[index];
                assert!((ratio - 1.0).abs() < 1e-12, "{quarters}: {ratio}");
            }
            let squares = a.iter().zip(&before).map(|(a, s)| a / s * (a / s));
            assert!((squares.sum::<f64>() - 4.0).abs() < 1e-12);
        }
        assert_eq!(Balance::quarters(5), None);
    }

    #[test]
    fn silent_channels_become_usual_ones() {
        let scales = scales(&[2.0, 0.0, 2.0, 0.0], &[2.0, 8.0, 0.0, 0.0], Balance::EVEN);
        assert_eq!(scales, [2.0, 0.5, 2.0, 1.0]);
        let scales = super::scales(&[0.0, f64::NAN], &[1.0, 1.0], Balance::EVEN);
        assert_eq!(scales, [1.0, 1.0]);
    }
}
