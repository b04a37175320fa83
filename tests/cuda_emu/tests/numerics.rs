//! One test per kernel: odd sizes, tails, groups beyond the last.

use nemoconv_cuda_emu::Order;
use nemoconv_device::kernels;

use crate::reference::{assert_close, bits, floats, silu, softplus, unknown, values};
use crate::{run, run_ordered};

/// A sum of some hundred products.
const SUM: f64 = 2e-6;
/// One or two roundings.
const ROUNDING: f64 = 2e-7;

fn f64s(values: &[f32]) -> Vec<f64> {
    values.iter().map(|x| f64::from(*x)).collect()
}

#[test]
fn every_kernel_was_compiled() {
    for kernel in kernels::all() {
        let views = vec![vec![0; 64]; kernel.views];
        // Parameters of the wrong size: told apart from a kernel that is not there.
        let error = run_ordered(Order::Ascending, kernel, 1, &views, &[0; 20]).unwrap_err();
        assert!(error.to_string().contains("bytes of parameters"), "{error}");
    }
}

/// Strides of an operand `[rows, columns]` within a larger array.
fn strides(rows: usize, columns: usize, is_transposed: bool) -> [usize; 2] {
    if is_transposed {
        [1, rows + 3]
    } else {
        [columns + 3, 1]
    }
}

fn check_matmul(
    kernel: &'static kernels::Kernel,
    tile: usize,
    [m, n, k]: [usize; 3],
    transposed: [bool; 2],
    beta: f32,
) {
    let [a_row, a_column] = strides(m, k, transposed[0]);
    let [b_row, b_column] = strides(k, n, transposed[1]);
    let a = values(5 + m * a_row + k * a_column, 1);
    let b = values(7 + k * b_row + n * b_column, 2);
    let out_row = n + 1;
    let before = values(2 + m * out_row, 3);
    let alpha = 0.5;
    let mut expected = f64s(&before);
    for i in 0..m {
        for j in 0..n {
            let at = |l| {
                f64::from(a[5 + i * a_row + l * a_column])
                    * f64::from(b[7 + l * b_row + j * b_column])
            };
            let sum: f64 = (0..k).map(at).sum();
            let out = &mut expected[2 + i * out_row + j];
            *out = f64::from(alpha) * sum + f64::from(beta) * *out;
        }
    }
    let mut out = bits(&before);
    if beta == 0.0 {
        // What is there does not matter then.
        (0..m).for_each(|i| out[2 + i * out_row..][..n].fill(f32::NAN.to_bits()));
    }
    let sizes = [m, n, k, 5, a_row, a_column, 7, b_row, b_column, 2, out_row];
    let mut parameters = sizes.map(|size| size as u32).to_vec();
    parameters.extend(bits(&[alpha, beta]));
    if kernel == &kernels::MATMUL_DIRECT {
        parameters.extend(OF_DIRECT);
    }
    let groups = m.div_ceil(tile) * n.div_ceil(tile);
    let results = run(
        kernel,
        groups as u32,
        &[bits(&a), bits(&b), out],
        &parameters,
    );
    assert_close(&results[2], &expected, SUM);
}

/// Words that the direct kernel takes besides.
const OF_DIRECT: [u32; 2] = [0, 0];

fn check_matmul_kernel(kernel: &'static kernels::Kernel, tile: usize) {
    for sizes in [
        [1, 1, 1],
        [67, 70, 33],
        [65, 3, 300],
        [2, 129, 16],
        [64, 64, 512],
        [5, 6, 0],
    ] {
        for transposed in [[false, false], [true, false], [false, true], [true, true]] {
            check_matmul(kernel, tile, sizes, transposed, 0.0);
        }
    }
    check_matmul(kernel, tile, [33, 65, 100], [false, true], 0.75);
}

#[test]
fn matmul_tiled() {
    check_matmul_kernel(&kernels::MATMUL_TILED, 64);
}

#[test]
fn matmul_direct() {
    check_matmul_kernel(&kernels::MATMUL_DIRECT, 32);
}

/// Both kernels sum in the same order.
#[test]
fn matmuls_agree_to_the_bit() {
    let [m, n, k] = [70, 66, 700];
    let operands = [
        bits(&values(m * k, 1)),
        bits(&values(k * n, 2)),
        unknown(m * n),
    ];
    let sizes = [m, n, k, 0, k, 1, 0, n, 1, 0, n];
    let mut parameters = sizes.map(|size| size as u32).to_vec();
    parameters.extend(bits(&[1.0, 0.0]));
    let tiled = run(&kernels::MATMUL_TILED, 4, &operands, &parameters);
    parameters.extend(OF_DIRECT);
    let direct = run(&kernels::MATMUL_DIRECT, 9, &operands, &parameters);
    assert!(tiled[2] == direct[2]);
}

/// f64 values of which no two products round alike.
fn doubles(count: usize, seed: u64) -> Vec<f64> {
    let tails = values(count, seed + 100);
    let pairs = values(count, seed).into_iter().zip(tails);
    pairs
        .map(|(x, tail)| f64::from(x) + f64::from(tail) * 1e-9)
        .collect()
}

/// Words of f64 values, the low one first.
fn words(values: &[f64]) -> Vec<u32> {
    let halves = |x: &f64| [x.to_bits() as u32, (x.to_bits() >> 32) as u32];
    values.iter().flat_map(halves).collect()
}

#[test]
fn matmul_f64() {
    for sizes in [
        [1, 1, 1, 1],
        [3, 5, 70, 33],
        [2, 67, 3, 300],
        [1, 64, 129, 16],
        [2, 5, 6, 0],
    ] {
        check_matmul_f64(sizes, false);
        check_matmul_f64(sizes, true);
    }
}

/// To the bit. Runs share a transposed A and have their own B, or the other way round.
fn check_matmul_f64([runs, rows, columns, inner]: [usize; 4], shares_a: bool) {
    let [a_row, a_column] = strides(rows, inner, shares_a);
    let a_run = usize::from(!shares_a) * (rows + 3) * (inner + 3);
    let b_run = usize::from(shares_a) * inner * columns;
    let out_row = columns + 1;
    let a = doubles(runs * (rows + 3) * (inner + 3), 1);
    let b = doubles((runs * inner * columns).max(1), 2);
    let before = doubles((runs * inner).max(1), 3);
    let after = doubles(columns, 4);
    let unwritten = doubles(runs * rows * out_row, 5);
    let mut expected = unwritten.clone();
    for at in 0..runs * rows * columns {
        let (run, i, j) = (at / columns / rows, at / columns % rows, at % columns);
        let mut sum = 0.0;
        for k in 0..inner {
            let factor = before[run * inner + k] * b[run * b_run + k * columns + j];
            sum += a[run * a_run + i * a_row + k * a_column] * (factor * after[j]);
        }
        expected[(run * rows + i) * out_row + j] = sum;
    }
    let sizes = [runs, rows, columns, inner];
    let steps = [a_run, a_row, a_column, b_run, columns, inner, 0];
    let parameters = [&sizes[..], &steps, &[rows * out_row, out_row]].concat();
    let parameters: Vec<u32> = parameters.iter().map(|size| *size as u32).collect();
    let groups = runs * rows.div_ceil(64) * columns.div_ceil(64) + 1;
    let views = [&a, &b, &before, &after, &unwritten].map(|values| words(values));
    let results = run(&kernels::MATMUL_F64, groups as u32, &views, &parameters);
    assert!(results[4] == words(&expected), "{sizes:?}, {shares_a}");
}

#[test]
fn widen_f64() {
    let (x, before, after) = (values(300, 1), doubles(7, 2), doubles(7, 3));
    let views = [bits(&x), words(&before), words(&after), unknown(600)];
    let results = run(&kernels::WIDEN_F64, 3, &views, &[299, 7]);
    let value = |at: usize| f64::from(x[at]) * before[at % 7] * after[at % 7];
    let expected: Vec<f64> = (0..299).map(value).collect();
    assert!(results[3][..598] == words(&expected));
    assert!(results[3][598..] == unknown(2));
}

#[test]
fn gram() {
    for (n, rows) in [(1, 1), (33, 7), (70, 50), (64, 129)] {
        let first_row = 2;
        let x = values((first_row + rows) * n, 1);
        let high = values(n * n, 2);
        let sums: Vec<f32> = high.iter().flat_map(|high| [high * 1e4, 0.0]).collect();
        let across = n.div_ceil(32);
        let parameters = [rows, n, 0, n, first_row * n, 0].map(|size| size as u32);
        let results = run(
            &kernels::GRAM,
            (across * across) as u32,
            &[bits(&x), bits(&sums)],
            &parameters,
        );
        let found = floats(&results[1]);
        for i in 0..n {
            for j in 0..n {
                let before = f64::from(sums[2 * (i * n + j)]);
                let at = |row| f64::from(x[row * n + i]) * f64::from(x[row * n + j]);
                let sum: f64 = (first_row..first_row + rows).map(at).sum();
                let expected = before + if i / 32 > j / 32 { 0.0 } else { sum };
                let pair = &found[2 * (i * n + j)..][..2];
                let deviation = (f64::from(pair[0]) + f64::from(pair[1]) - expected).abs();
                // Nothing of the sum is lost beside the large value: f32 alone would be off by 4e-4.
                assert!(
                    deviation < 2e-5,
                    "[{i}, {j}]: {pair:?}, expected {expected}"
                );
            }
        }
    }
}

#[test]
fn accumulate() {
    let (sums, x) = (values(600, 1), values(300, 2));
    let views = [bits(&sums), bits(&x)];
    let found = floats(&run(&kernels::ACCUMULATE, 2, &views, &[299, 0])[0]);
    for (i, pair) in found.chunks_exact(2).take(299).enumerate() {
        let before = f64::from(sums[2 * i]) + f64::from(sums[2 * i + 1]);
        let sum = before + f64::from(x[i]);
        let deviation = (f64::from(pair[0]) + f64::from(pair[1]) - sum).abs();
        assert!(
            deviation < 1e-6 * sums[2 * i + 1].abs().max(1e-6) as f64,
            "{i}: {pair:?}, expected {sum}"
        );
    }
    assert_eq!(found[598..], sums[598..]);
}

#[test]
fn rms_norm() {
    for (rows, width) in [(1, 1), (3, 64), (5, 200)] {
        let x = values(rows * width, 1);
        let weight = values(width, 2);
        let mut expected = f64s(&x);
        for row in expected.chunks_mut(width) {
            normalize(row, &weight, 1e-5);
        }
        let views = [bits(&x), bits(&weight), unknown(x.len())];
        let parameters = [rows as u32, width as u32, 1e-5f32.to_bits()];
        let results = run(&kernels::RMS_NORM, rows as u32 + 2, &views, &parameters);
        assert_close(&results[2], &expected, SUM);
    }
}

fn normalize(row: &mut [f64], weight: &[f32], eps: f64) {
    let mean = row.iter().map(|x| x * x).sum::<f64>() / row.len() as f64;
    for (x, weight) in row.iter_mut().zip(weight) {
        *x *= f64::from(*weight) / (mean + eps).sqrt();
    }
}

/// More groups than one dimension of the grid has.
#[test]
fn groups_fill_two_dimensions() {
    let rows = 65_535 + 2;
    let x = values(rows, 1);
    let views = [bits(&x), bits(&[1.0]), unknown(rows)];
    let parameters = [rows as u32, 1, 0.0f32.to_bits()];
    let results = run_ordered(
        Order::Ascending,
        &kernels::RMS_NORM,
        rows as u32,
        &views,
        &parameters,
    )
    .unwrap();
    let expected: Vec<f64> = x.iter().map(|x| f64::from(x.signum())).collect();
    assert_close(&results[2], &expected, ROUNDING);
}

#[test]
fn gated_rms_norm() {
    let (rows, inner, stride, groups) = (3, 150, 170, 2);
    let y = values(rows * inner, 1);
    let z: Vec<f32> = values(rows * stride, 2).iter().map(|x| x * 20.0).collect();
    let weight = values(inner, 3);
    let mut expected = f64s(&y);
    for (row, gates) in expected.chunks_mut(inner).zip(z.chunks(stride)) {
        row.iter_mut()
            .zip(gates)
            .for_each(|(y, z)| *y *= silu(f64::from(*z)));
        for (part, weight) in row
            .chunks_mut(inner / groups)
            .zip(weight.chunks(inner / groups))
        {
            normalize(part, weight, 1e-5);
        }
    }
    let views = [bits(&y), bits(&z), bits(&weight)];
    let parameters = [
        rows as u32,
        inner as u32,
        stride as u32,
        groups as u32,
        1e-5f32.to_bits(),
    ];
    let results = run(
        &kernels::GATED_RMS_NORM,
        (rows * groups) as u32 + 1,
        &views,
        &parameters,
    );
    assert_close(&results[0], &expected, SUM);
}

/// Rows of a sequence: before it others, channels inside wider rows.
struct Conv {
    rows: usize,
    first_row: usize,
    stride: usize,
    first: usize,
    channels: usize,
    taps: usize,
    input: Vec<f32>,
    state: Vec<f32>,
}

impl Conv {
    fn new(rows: usize) -> Self {
        let (first_row, stride, first, channels, taps) = (2, 110, 7, 99, 4);
        Self {
            rows,
            first_row,
            stride,
            first,
            channels,
            taps,
            input: values((first_row + rows) * stride, 1),
            state: values((taps - 1) * channels, 2),
        }
    }

    /// A raw value, rows counted from the first of the state.
    fn raw(&self, since: usize, c: usize) -> f32 {
        match since.checked_sub(self.taps - 1) {
            None => self.state[since * self.channels + c],
            Some(row) => self.input[(self.first_row + row) * self.stride + self.first + c],
        }
    }

    fn parameters(&self, last: usize) -> Vec<u32> {
        let sizes = [
            self.rows,
            self.first_row,
            self.stride,
            self.first,
            self.channels,
            last,
        ];
        sizes.map(|size| size as u32).to_vec()
    }
}

#[test]
fn conv1d_silu() {
    for rows in [1, 2, 9] {
        let conv = Conv::new(rows);
        let weight = values(conv.channels * conv.taps, 3);
        let bias = values(conv.channels, 4);
        let mut expected = vec![0.0; (conv.first_row + rows) * conv.channels];
        for row in 0..rows {
            for c in 0..conv.channels {
                let product = |tap| {
                    f64::from(weight[c * conv.taps + tap]) * f64::from(conv.raw(row + tap, c))
                };
                let sum = f64::from(bias[c]) + (0..conv.taps).map(product).sum::<f64>();
                expected[(conv.first_row + row) * conv.channels + c] = silu(sum);
            }
        }
        let views = [
            bits(&conv.input),
            bits(&conv.state),
            bits(&weight),
            bits(&bias),
            vec![0; expected.len()],
        ];
        let groups = (rows * conv.channels).div_ceil(256) as u32 + 1;
        let results = run(
            &kernels::CONV1D_SILU,
            groups,
            &views,
            &conv.parameters(conv.taps),
        );
        assert_close(&results[4], &expected, SUM);
    }
}

#[test]
fn conv1d_advance() {
    for rows in [1, 2, 9] {
        let conv = Conv::new(rows);
        let keep = conv.taps - 1;
        let expected: Vec<u32> = (0..keep * conv.channels)
            .map(|i| {
                conv.raw(i / conv.channels + rows, i % conv.channels)
                    .to_bits()
            })
            .collect();
        let views = [
            bits(&conv.input),
            bits(&conv.state),
            unknown(expected.len()),
        ];
        let results = run(&kernels::CONV1D_ADVANCE, 2, &views, &conv.parameters(keep));
        assert!(results[2] == expected);
    }
}

#[test]
fn selective_scan() {
    for state_size in [5, 64, 131] {
        check_scan(3, 4, 2, 24, state_size);
    }
    check_scan(1, 2, 1, 64, 128);
}

fn check_scan(rows: usize, heads: usize, groups: usize, head_dim: usize, state_size: usize) {
    let (first_row, dt_stride, dt_range) = (1, heads + 5, [0.01, 0.9]);
    let inner = heads * head_dim;
    let width = inner + 2 * groups * state_size;
    let all = first_row + rows;
    let xbc = values(all * width, 1);
    let dt: Vec<f32> = values(all * dt_stride, 2).iter().map(|x| x * 3.0).collect();
    let a: Vec<f32> = values(heads, 3)
        .iter()
        .map(|x| -1.0 - x.abs() * 8.0)
        .collect();
    let d = values(heads, 4);
    let dt_bias = values(heads, 5);
    let state = values(heads * state_size * head_dim, 6);
    let mut expected_state = f64s(&state);
    let mut expected = vec![0.0; all * inner];
    for row in first_row..all {
        let line = f64s(&xbc[row * width..][..width]);
        for channel in 0..inner {
            let (head, within) = (channel / head_dim, channel % head_dim);
            let raw = dt[(row + 1) * dt_stride - heads + head] + dt_bias[head];
            let step = softplus(f64::from(raw)).clamp(dt_range[0], dt_range[1]);
            let decay = (step * f64::from(a[head])).exp();
            let b = inner + head / (heads / groups) * state_size;
            let mut y = f64::from(d[head]) * line[channel];
            for n in 0..state_size {
                let s = &mut expected_state[(head * state_size + n) * head_dim + within];
                *s = *s * decay + step * line[channel] * line[b + n];
                y += *s * line[b + groups * state_size + n];
            }
            expected[row * inner + channel] = y;
        }
    }
    let views = [
        bits(&xbc),
        bits(&dt),
        bits(&a),
        bits(&d),
        bits(&dt_bias),
        bits(&state),
        vec![0; all * inner],
    ];
    let sizes = [
        rows, first_row, heads, head_dim, groups, state_size, dt_stride,
    ];
    let mut parameters = sizes.map(|size| size as u32).to_vec();
    parameters.extend(bits(&dt_range.map(|x| x as f32)));
    let results = run(
        &kernels::SELECTIVE_SCAN,
        inner.div_ceil(64) as u32 + 1,
        &views,
        &parameters,
    );
    assert_close(&results[5], &expected_state, SUM);
    assert_close(&results[6], &expected, SUM);
}

#[test]
fn attention() {
    for (rows, position, head_dim) in [
        (1, 0, 16),
        (3, 5, 40),
        (2, 63, 100),
        (70, 0, 7),
        (1, 200, 256),
    ] {
        check_attention(rows, position, 4, 2, head_dim, false);
    }
    check_attention(3, 70, 2, 1, 64, true);
}

fn check_attention(
    rows: usize,
    position: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    is_f16: bool,
) {
    let first_row = 1;
    let query = values((first_row + rows) * heads * head_dim, 1);
    let width = kv_heads * head_dim;
    let keys = values((position + rows) * width, 2);
    let cached = values((position + rows) * width, 3);
    let mut expected = vec![0.0; query.len()];
    for row in 0..rows {
        for head in 0..heads {
            let q = ((first_row + row) * heads + head) * head_dim;
            let cache = head / (heads / kv_heads) * head_dim;
            let score = |at: usize| {
                let product = |c| f64::from(query[q + c]) * f64::from(keys[at * width + cache + c]);
                (0..head_dim).map(product).sum::<f64>() / (head_dim as f64).sqrt()
            };
            let weights: Vec<f64> = (0..=position + row).map(|at| score(at).exp()).collect();
            let total: f64 = weights.iter().sum();
            for c in 0..head_dim {
                let value = |at: usize| weights[at] * f64::from(cached[at * width + cache + c]);
                expected[q + c] = (0..weights.len()).map(value).sum::<f64>() / total;
            }
        }
    }
    let views = [
        bits(&query),
        bits(&keys),
        bits(&cached),
        vec![0; query.len()],
    ];
    let parameters = [
        rows,
        first_row,
        position,
        heads,
        kv_heads,
        head_dim,
        usize::from(is_f16),
    ]
    .map(|size| size as u32);
    let results = run(
        &kernels::ATTENTION,
        (rows * heads) as u32 + 1,
        &views,
        &parameters,
    );
    assert_close(&results[3], &expected, if is_f16 { 3e-3 } else { SUM });
}

#[test]
fn elementwise() {
    let count = 1000;
    let x = values(count, 1);
    let y = values(count, 2);
    let n = count as u32;

    let found = run(&kernels::ADD, 5, &[bits(&x), bits(&y)], &[n]);
    let sums: Vec<f32> = x.iter().zip(&y).map(|(x, y)| x + y).collect();
    assert!(found[0] == bits(&sums));

    let found = run(&kernels::SCALE, 4, &[bits(&x)], &[n, 0.3f32.to_bits()]);
    let scaled: Vec<f32> = x.iter().map(|x| x * 0.3).collect();
    assert!(found[0] == bits(&scaled));

    let width = 40;
    let found = run(
        &kernels::ADD_BIAS,
        4,
        &[bits(&x), bits(&y[..width])],
        &[n, width as u32],
    );
    let biased: Vec<f32> = x
        .iter()
        .enumerate()
        .map(|(i, x)| x + y[i % width])
        .collect();
    assert!(found[0] == bits(&biased));
}

#[test]
fn relu_squared() {
    let mut x = values(300, 1);
    x[7] = f32::NAN;
    x[8] = f32::NEG_INFINITY;
    let expected = x.iter().map(|x| if *x <= 0.0 { 0.0 } else { x * x });
    let expected: Vec<f32> = expected.collect();
    let found = floats(&run(&kernels::RELU_SQUARED, 2, &[bits(&x)], &[300])[0]);
    assert!(found[7].is_nan());
    assert!(found[8] == 0.0);
    assert_eq!(found[9..], expected[9..]);
}

#[test]
fn is_finite() {
    let mut x = values(600, 1);
    let found = |x: &[f32]| run(&kernels::IS_FINITE, 3, &[bits(x), vec![0]], &[600])[1][0];
    assert_eq!(found(&x), 0);
    x[599] = f32::INFINITY;
    assert_eq!(found(&x), 1);
    x[599] = f32::NAN;
    assert_eq!(found(&x), 1);
}

#[test]
fn gather_and_scatter_add() {
    let (width, rows) = (37, [3u32, 0, 5]);
    let x = values(6 * width, 1);
    let count = (rows.len() * width) as u32;
    // Values of the views before the first ones.
    let [before_x, before_y] = [values(5, 4), values(3, 5)].map(|values| bits(&values));
    let parameters = [count, width as u32, 5, 3];
    let found = run(
        &kernels::GATHER,
        1,
        &[
            [&before_x[..], &bits(&x)].concat(),
            rows.to_vec(),
            [&before_y[..], &unknown(count as usize)].concat(),
        ],
        &parameters,
    );
    let expected: Vec<f32> = rows
        .iter()
        .flat_map(|row| x[*row as usize * width..][..width].to_vec())
        .collect();
    assert!(found[2] == [&before_y[..], &bits(&expected)].concat());

    let y = values(count as usize, 2);
    let weights = values(rows.len(), 3);
    let mut expected = x.clone();
    for (i, row) in rows.iter().enumerate() {
        for c in 0..width {
            expected[*row as usize * width + c] += weights[i] * y[i * width + c];
        }
    }
    let views = [
        [&before_x[..], &bits(&x)].concat(),
        [&before_y[..], &bits(&y)].concat(),
        rows.to_vec(),
        bits(&weights),
    ];
    let found = run(&kernels::SCATTER_ADD, 1, &views, &parameters);
    assert!(found[0] == [&before_x[..], &bits(&expected)].concat());
}

/// Halves, every 8-bit mode, blocks of zeros.
#[test]
fn round_activation() {
    for (mode, block) in [(0, 32), (1, 32), (2, 32), (3, 256), (4, 100), (5, 100)] {
        let count = 70 * block + 5;
        let mut x: Vec<f32> = values(count, 1).iter().map(|x| x * 3.0).collect();
        x[block..2 * block].fill(0.0);
        let scale = 0.02;
        let views = [bits(&x), unknown(x.len())];
        let parameters = [count as u32, block as u32, mode, f32::to_bits(scale)];
        let found = floats(&run(&kernels::ROUND_ACTIVATION, 2, &views, &parameters)[1]);
        for (x, found) in x.chunks(block).zip(found.chunks(block)) {
            let largest = x.iter().fold(0.0, |max: f32, x| max.max(x.abs()));
            let half_step = match mode {
                0 => largest / 256.0,
                1 => largest / 2048.0,
                5 => scale / 2.0,
                _ => largest / 253.0,
            };
            for (x, found) in x.iter().zip(found) {
                let reachable = if mode == 5 {
                    x.clamp(-128.0 * scale, 127.0 * scale)
                } else {
                    *x
                };
                // The scale of Q8_0 is itself rounded to 11 bits.
                assert!(
                    (reachable - found).abs() <= half_step + largest / 2048.0,
                    "mode {mode}: {x} became {found}"
                );
            }
        }
    }
}

/// Rounding to halves, value by value: ties, subnormals, what is too large, NaN.
#[test]
fn halves_round_to_even() {
    let cases = [
        (1.0, 1.0, 1.0),
        (1.0 + 1.0 / 2048.0, 1.0, 1.0),
        (1.0 + 3.0 / 2048.0, 1.0 + 1.0 / 512.0, 1.0),
        (1.0 + 1.0 / 256.0, 1.0 + 1.0 / 256.0, 1.0),
        (1.0 + 3.0 / 256.0, 1.0 + 3.0 / 256.0, 1.0 + 1.0 / 64.0),
        (65519.0, 65504.0, 65536.0),
        (65520.0, f32::INFINITY, 65536.0),
        (-1e-8, -0.0, -1e-8),
        (2f32.powi(-25), 0.0, 2f32.powi(-25)),
        (3.0 * 2f32.powi(-25), 2f32.powi(-23), 3.0 * 2f32.powi(-25)),
        (f32::NEG_INFINITY, f32::NEG_INFINITY, f32::NEG_INFINITY),
    ];
    let x = cases.map(|case| case.0);
    let rounded = |mode| {
        let parameters = [x.len() as u32, x.len() as u32, mode, 0];
        floats(
            &run(
                &kernels::ROUND_ACTIVATION,
                1,
                &[bits(&x), unknown(x.len())],
                &parameters,
            )[1],
        )
    };
    assert_eq!(rounded(1), cases.map(|case| case.1));
    let close = |(found, expected): (&f32, f32)| {
        *found == expected || (found / expected - 1.0).abs() < 0.004
    };
    assert!(rounded(0).iter().zip(cases.map(|case| case.2)).all(close));
}

#[test]
fn dequantize_q4_0() {
    let blocks = 40;
    let mut bytes: Vec<u8> = (0..blocks * 18).map(|i| (i * 37 % 251) as u8).collect();
    let scales = [0x3c00u16, 0x3555, 0x0001, 0x8400, 0x7bff];
    let numbers = [
        1.0,
        0.333_251_953_125,
        2f64.powi(-24),
        -2f64.powi(-14),
        65504.0,
    ];
    for (i, block) in bytes.chunks_mut(18).enumerate() {
        block[..2].copy_from_slice(&scales[i % 5].to_le_bytes());
    }
    let first = 18;
    let count: usize = (blocks - 1) * 32;
    let mut expected = Vec::new();
    for (i, block) in bytes.chunks(18).enumerate().skip(1) {
        let low = block[2..].iter().map(|byte| byte & 15);
        let high = block[2..].iter().map(|byte| byte >> 4);
        expected.extend(
            low.chain(high)
                .map(|code| ((f64::from(code) - 8.0) * numbers[i % 5]) as f32),
        );
    }
    let words = crate::to_words(&bytes);
    let kernel = kernels::dequantize(nemoconv_formats::GgmlType::Q4_0).unwrap();
    let found = run(
        kernel,
        count.div_ceil(256) as u32,
        &[words, unknown(count)],
        &[count as u32, first],
    );
    assert_eq!(floats(&found[1]), expected);
}
