//! What tables of cases have in common, whichever way operations are called: numbers, plain loops in f64, and how what is
//! found is held against what is expected.

use nemoconv_device::{AttentionLayout, ConvLayout, MatmulLayout, ScanLayout, SoftmaxSums};

/// Numbers from -2 to 2 that look random and are the same everywhere.
pub fn numbers(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 22) as f32 - 2.0
    };
    (0..count).map(|_| next()).collect()
}

/// Largest difference from what is expected, relative to the largest expected magnitude.
pub const TOLERANCE: f64 = 2e-6;
/// The same of recurrences, which add up what each step loses.
pub const RECURRENT: f64 = 1e-5;
/// The same of sums that are rounded to F16 a hundred times.
pub const F16_SUMS: f64 = 2e-2;
/// Largest relative difference of a sum of exponentials: those of single values are off by 3e-7.
pub const EXPONENTIALS: f64 = 5e-7;
/// Largest difference of a KL divergence, nats: relative where it is above 1, absolute below.
pub const DIVERGENCE: f64 = 5e-7;

/// Every value is what is expected, within `tolerance` of the largest; infinities are the same, any NaN is one.
#[track_caller]
pub fn check(device: &str, found: &[f32], expected: &[f64], tolerance: f64) {
    assert_eq!(found.len(), expected.len(), "{device}");
    let finite = expected.iter().filter(|x| x.is_finite());
    let largest = finite.fold(1e-30_f64, |max, x| max.max(x.abs()));
    for (index, (found, expected)) in found.iter().zip(expected).enumerate() {
        let is_close = (f64::from(*found) - expected).abs() / largest <= tolerance;
        let is_same_infinity = f64::from(*found) == *expected;
        let is_same_nan = found.is_nan() && expected.is_nan();
        assert!(
            is_close || is_same_infinity || is_same_nan,
            "{device}: value {index} is {found}, expected {expected}"
        );
    }
}

/// The same values.
pub fn f64s(values: &[f32]) -> Vec<f64> {
    values.iter().map(|x| f64::from(*x)).collect()
}

/// `a b` in its layout, over what was in `out`.
pub fn matmul(layout: &MatmulLayout, a: &[f32], b: &[f32], out: &[f32]) -> Vec<f64> {
    let mut expected = f64s(out);
    for i in 0..layout.rows {
        for j in 0..layout.columns {
            let sum: f64 = (0..layout.inner)
                .map(|k| {
                    let left = a[layout.a[0] + i * layout.a[1] + k * layout.a[2]];
                    let right = b[layout.b[0] + k * layout.b[1] + j * layout.b[2]];
                    f64::from(left) * f64::from(right)
                })
                .sum();
            let at = &mut expected[layout.out[0] + i * layout.out[1] + j];
            *at = f64::from(layout.alpha) * sum + f64::from(layout.beta) * *at;
        }
    }
    expected
}

/// `x / (1 + e^-x)`
pub fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

fn normed(row: &[f64], weight: &[f32], eps: f64) -> Vec<f64> {
    let mean = row.iter().map(|x| x * x).sum::<f64>() / row.len() as f64;
    let scale = 1.0 / (mean + eps).sqrt();
    row.iter()
        .zip(weight)
        .map(|(x, w)| x * scale * f64::from(*w))
        .collect()
}

/// One norm per row of `weight`'s length.
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f64) -> Vec<f64> {
    let x = f64s(x);
    let rows = x.chunks(weight.len());
    rows.flat_map(|row| normed(row, weight, eps)).collect()
}

/// `y silu(z)`, then one norm per group; the gates of a row are the first of its `stride` values.
pub fn gated_rms_norm(
    y: &[f32],
    (z, stride): (&[f32], usize),
    weight: &[f32],
    groups: usize,
    eps: f64,
) -> Vec<f64> {
    let group = weight.len() / groups;
    let mut expected = Vec::new();
    for (y, z) in y.chunks(weight.len()).zip(z.chunks(stride)) {
        let pairs = y.iter().zip(z);
        let gated: Vec<f64> = pairs
            .map(|(y, z)| f64::from(*y) * silu(f64::from(*z)))
            .collect();
        let parts = gated.chunks(group).zip(weight.chunks(group));
        parts.for_each(|(part, weight)| expected.extend(normed(part, weight, eps)));
    }
    expected
}

/// What a recurrence gives for the rows of one sequence, and its state after them.
pub struct Advanced {
    /// Row by row.
    pub out: Vec<f64>,
    /// In the order of the layout's operation.
    pub state: Vec<f64>,
}

/// Rows of one sequence, of which `before` are the raw ones before it.
pub fn conv1d_silu(layout: ConvLayout, [input, before, weight, bias]: [&[f32]; 4]) -> Advanced {
    let ConvLayout {
        stride,
        first,
        channels,
        taps,
    } = layout;
    let kept = taps - 1;
    // Rows counted from the first of the state.
    let x = |since: usize, c: usize| match since.checked_sub(kept) {
        Some(row) => f64::from(input[row * stride + first + c]),
        None => f64::from(before[since * channels + c]),
    };
    let rows = input.len() / stride;
    let all =
        |rows: std::ops::Range<usize>| rows.flat_map(|row| (0..channels).map(move |c| (row, c)));
    let value = |(row, c): (usize, usize)| {
        let weight = |tap| f64::from(weight[c * taps + tap]);
        let sum: f64 = (0..taps).map(|tap| weight(tap) * x(row + tap, c)).sum();
        silu(sum + f64::from(bias[c]))
    };
    Advanced {
        out: all(0..rows).map(value).collect(),
        state: all(rows..rows + kept).map(|(row, c)| x(row, c)).collect(),
    }
}

/// Rows of one sequence: `xbc`, `dt`, then `a`, `d` and `dt_bias` of heads, and the state before.
pub fn selective_scan(
    layout: ScanLayout,
    [xbc, dt, a, d, dt_bias, before]: [&[f32]; 6],
) -> Advanced {
    let ScanLayout {
        heads,
        head_dim,
        groups,
        state_size,
        dt_stride,
        time_step: (least, most),
    } = layout;
    let inner = heads * head_dim;
    let width = inner + 2 * groups * state_size;
    let (mut out, mut state) = (Vec::new(), f64s(before));
    for row in 0..xbc.len() / width {
        let at = |c: usize| f64::from(xbc[row * width + c]);
        for head in 0..heads {
            let raw =
                f64::from(dt[(row + 1) * dt_stride - heads + head]) + f64::from(dt_bias[head]);
            let step = raw.exp().ln_1p().clamp(f64::from(least), f64::from(most));
            let group = head / (heads / groups);
            for channel in 0..head_dim {
                let x = at(head * head_dim + channel);
                let mut y = f64::from(d[head]) * x;
                for n in 0..state_size {
                    let s = &mut state[(head * state_size + n) * head_dim + channel];
                    *s = *s * (step * f64::from(a[head])).exp()
                        + step * x * at(inner + group * state_size + n);
                    y += *s * at(inner + (groups + group) * state_size + n);
                }
                out.push(y);
            }
        }
    }
    Advanced { out, state }
}

/// Queries of one sequence, whose keys and values begin `position` tokens before.
pub fn attention(
    layout: AttentionLayout,
    position: usize,
    [query, keys, values]: [&[f32]; 3],
) -> Vec<f64> {
    let AttentionLayout {
        heads,
        key_value_heads,
        head_dim,
        ..
    } = layout;
    let cache = key_value_heads * head_dim;
    let mut expected = Vec::new();
    for (place, q) in query.chunks(head_dim).enumerate() {
        let (row, head) = (place / heads, place % heads);
        let own = head / (heads / key_value_heads) * head_dim;
        let score = |at: usize| {
            let key = &keys[at * cache + own..][..head_dim];
            let products = q
                .iter()
                .zip(key)
                .map(|(q, k)| f64::from(*q) * f64::from(*k));
            (products.sum::<f64>() / (head_dim as f64).sqrt()).exp()
        };
        let weights: Vec<f64> = (0..=position + row).map(score).collect();
        let total: f64 = weights.iter().sum();
        for c in 0..head_dim {
            let weighted = weights.iter().enumerate();
            let value = |at: usize| f64::from(values[at * cache + own + c]);
            let sum: f64 = weighted.map(|(at, weight)| weight * value(at)).sum();
            expected.push(sum / total);
        }
    }
    expected
}

/// What softmax needs of a row; the row has a largest value.
pub fn softmax_sums(row: &[f32]) -> SoftmaxSums {
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let terms = row.iter().map(|x| (f64::from(*x) - f64::from(max)).exp());
    SoftmaxSums {
        max,
        best: row.iter().position(|x| *x == max).unwrap(),
        sum: terms.sum(),
    }
}

/// KL(x || y), nats.
pub fn kl_divergence(x: &[f32], y: &[f32]) -> f64 {
    let log_probabilities = |row: &[f32]| -> Vec<f64> {
        let SoftmaxSums { max, sum, .. } = softmax_sums(row);
        let log_sum = f64::from(max) + sum.ln();
        row.iter().map(|x| f64::from(*x) - log_sum).collect()
    };
    let pairs = log_probabilities(x).into_iter().zip(log_probabilities(y));
    pairs.map(|(p, q)| p.exp() * (p - q)).sum()
}
