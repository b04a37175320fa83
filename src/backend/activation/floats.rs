//! The grids of small floats that runtimes take inputs in.

/// Largest magnitude of F8_E4M3 (`float8_e4m3fn`).
pub const E4M3_MAX: f32 = 448.0;
/// Largest magnitude of E2M1.
pub const E2M1_MAX: f32 = 6.0;

/// The nearest F8_E4M3 value, ties to even, the largest beyond the range; NaN stays NaN.
///
/// Source: arXiv:2209.05433, Table 1: 4 bits of exponent with bias 7, 3 of mantissa.
#[inline(always)]
pub fn e4m3(x: f32) -> f32 {
    const DROPPED: u32 = 20;
    const LEAST_NORMAL: f32 = 1.0 / 64.0;
    const SUBNORMALS: f32 = 512.0;
    let x = x.clamp(-E4M3_MAX, E4M3_MAX);
    if x.abs() < LEAST_NORMAL {
        return (x * SUBNORMALS).round_ties_even() / SUBNORMALS;
    }
    let bits = x.to_bits();
    let to_even = (1 << (DROPPED - 1)) - 1 + (bits >> DROPPED & 1);
    let rounded = f32::from_bits(bits.wrapping_add(to_even) >> DROPPED << DROPPED);
    // The digits of a NaN may be rounded up beyond its exponent.
    if x.is_nan() { x } else { rounded }
}

/// The nearest E2M1 value, ties to even mantissas, the largest beyond the range: 0, 0.5, 1, 1.5, 2, 3, 4 or 6.
///
/// Source: OCP Microscaling Formats v1.0, 5.3.3.
#[inline(always)]
pub fn e2m1(x: f32) -> f32 {
    let magnitude = x.abs();
    let steps = match magnitude {
        m if m < 2.0 => 2.0,
        m if m < 4.0 => 1.0,
        _ => 0.5,
    };
    let rounded = (magnitude * steps).round_ties_even() / steps;
    rounded.min(E2M1_MAX).copysign(x)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The nearest of all values of a grid; of two, the one whose number is even.
    fn nearest(grid: &[f32], x: f32) -> f32 {
        let distance = |at: &usize| (f64::from(grid[*at]) - f64::from(x.abs())).abs();
        let order = |a: &usize, b: &usize| {
            let nearer = distance(a).total_cmp(&distance(b));
            nearer.then((a % 2).cmp(&(b % 2)))
        };
        grid[(0..grid.len()).min_by(order).unwrap()].copysign(x)
    }

    /// Values, the middles between them, and what lies beside those.
    fn around(grid: &[f32]) -> impl Iterator<Item = f32> {
        let middles = grid.windows(2).map(|pair| (pair[0] + pair[1]) / 2.0);
        let values = grid.iter().copied().chain(middles).chain([1e9]);
        let near = values.flat_map(|x| [x.next_down().max(0.0), x, x.next_up()]);
        near.flat_map(|x| [x, -x]).collect::<Vec<_>>().into_iter()
    }

    #[test]
    fn nan_stays_nan() {
        for odd in [f32::NAN, f32::from_bits(0x7fff_ffff)] {
            assert!(e4m3(odd).is_nan(), "{:#x}", odd.to_bits());
        }
    }

    #[test]
    fn every_value_is_the_nearest_of_its_grid() {
        let e4m3_value = |code: u32| match (code >> 3, code & 7) {
            (0, mantissa) => mantissa as f32 / 512.0,
            (exponent, mantissa) => {
                (1.0 + mantissa as f32 / 8.0) * f32::powi(2.0, exponent as i32 - 7)
            }
        };
        let e4m3_grid: Vec<f32> = (0..0x7f).map(e4m3_value).collect();
        assert_eq!(e4m3_grid.last(), Some(&E4M3_MAX));
        let e2m1_grid = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, E2M1_MAX];
        for x in around(&e4m3_grid) {
            assert_eq!(e4m3(x), nearest(&e4m3_grid, x), "{x}");
        }
        for x in around(&e2m1_grid) {
            assert_eq!(e2m1(x), nearest(&e2m1_grid, x), "{x}");
        }
    }
}
