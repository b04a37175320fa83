//! The Mamba-2 selective scan, token by token: `S = exp(dt A) S + dt x B^T`, `y = S C + D x` per head.
//!
//! Heads and sequences run in parallel, tokens in order, so that prefill and decode are the same sums. A head's state is
//! `[state_size, head_dim]`: vectors run over channels, and y is summed over the state in index order.
//!
//! Source: Mamba-2, arXiv:2405.21060, section 6; `time_step_limit` as in the reference modelling file.

use super::elementwise::{exp, softplus};
use super::kernels::{self, Isa, SCAN_CHANNELS, ScanStep, StateRows};
use super::multiversion::multiversion;
use super::shared_rows::SharedRows;
use crate::backend::{ScanShape, ScanWeights, Segment};
use crate::parallel;

/// Channels of a head where fewer than [`SCAN_CHANNELS`] are left.
const NARROW: usize = 16;

/// One head of one sequence.
struct Head<'a> {
    rows: std::ops::Range<usize>,
    head: usize,
    state: &'a mut [f32],
}

/// Gives `[rows, inner]`; see [`crate::backend::Backend::selective_scan`].
pub fn selective_scan(
    isa: Isa,
    xbc: &[f32],
    dt: &[f32],
    dt_stride: usize,
    weights: ScanWeights<'_, Vec<f32>>,
    shape: ScanShape,
    segments: &mut [Segment<'_, Vec<f32>>],
) -> Vec<f32> {
    let rows = xbc.len() / shape.conv_dim();
    let mut out = vec![0.0; rows * shape.inner()];
    let shared = SharedRows::new(&mut out, shape.inner());
    let mut heads = Vec::with_capacity(segments.len() * shape.heads);
    for segment in segments.iter_mut() {
        let states = segment
            .state
            .chunks_exact_mut(shape.state_len() / shape.heads);
        heads.extend(states.enumerate().map(|(head, state)| Head {
            rows: segment.rows.clone(),
            head,
            state,
        }));
    }
    let scan = Scan {
        isa,
        xbc,
        dt,
        dt_stride,
        weights,
        shape,
        out: &shared,
    };
    parallel::for_each(heads, |head| scan_head(isa, &scan, head));
    out
}

multiversion! {
    fn scan_head(scan: &Scan<'_>, head: Head<'_>) = Scan::head;
}

struct Scan<'a> {
    isa: Isa,
    xbc: &'a [f32],
    dt: &'a [f32],
    dt_stride: usize,
    weights: ScanWeights<'a, Vec<f32>>,
    shape: ScanShape,
    out: &'a SharedRows<'a>,
}

impl Scan<'_> {
    #[inline(always)]
    fn head(&self, item: Head) {
        let ScanShape {
            heads,
            head_dim,
            groups,
            state_size,
            ..
        } = self.shape;
        let Head { rows, head, state } = item;
        let (inner, group) = (self.shape.inner(), head / (heads / groups));
        let d = self.weights.d[head];
        let mut times = Times::default();
        for (index, row) in rows.clone().enumerate() {
            if index % TIMES == 0 {
                times = self.times(row..rows.end.min(row + TIMES), head);
            }
            let xbc = &self.xbc[row * self.shape.conv_dim()..][..self.shape.conv_dim()];
            let x = &xbc[head * head_dim..][..head_dim];
            let b = &xbc[inner + group * state_size..][..state_size];
            let c = &xbc[inner + (groups + group) * state_size..][..state_size];
            // SAFETY: a head of a row is written by this work item alone.
            let y = unsafe { self.out.part(row, head * head_dim, head_dim) };
            let step = Step {
                isa: self.isa,
                decay: times.decay[index % TIMES],
                dt: times.dt[index % TIMES],
                d,
                b,
                c,
            };
            step.advance(state, x, y);
        }
    }

    /// Time steps of up to [`TIMES`] rows of a head, computed together: the loops become vectors.
    #[inline(always)]
    fn times(&self, rows: std::ops::Range<usize>, head: usize) -> Times {
        let heads = self.shape.heads;
        let (low, high) = self.shape.time_step;
        let (a, bias) = (self.weights.a[head], self.weights.dt_bias[head]);
        let mut times = Times::default();
        for (raw, row) in times.dt.iter_mut().zip(rows) {
            *raw = self.dt[(row + 1) * self.dt_stride - heads + head];
        }
        for (dt, decay) in times.dt.iter_mut().zip(&mut times.decay) {
            let clamped = softplus(*dt + bias).max(low).min(high);
            *decay = exp(clamped * a);
            // `max` and `min` drop a NaN; a NaN must come out.
            *dt = if dt.is_nan() { *dt } else { clamped };
        }
        times
    }
}

/// Rows whose time steps are computed together.
const TIMES: usize = 16;

/// Time steps and decays of a head.
#[derive(Default)]
struct Times {
    dt: [f32; TIMES],
    decay: [f32; TIMES],
}

/// One token of one head.
struct Step<'a> {
    isa: Isa,
    decay: f32,
    dt: f32,
    d: f32,
    b: &'a [f32],
    c: &'a [f32],
}

impl Step<'_> {
    #[inline(always)]
    fn advance(&self, state: &mut [f32], x: &[f32], y: &mut [f32]) {
        let mut channel = 0;
        while channel + SCAN_CHANNELS <= x.len() {
            self.channels::<SCAN_CHANNELS>(state, x, y, channel);
            channel += SCAN_CHANNELS;
        }
        while channel + NARROW <= x.len() {
            self.channels::<NARROW>(state, x, y, channel);
            channel += NARROW;
        }
        while channel < x.len() {
            self.channels::<1>(state, x, y, channel);
            channel += 1;
        }
    }

    #[inline(always)]
    fn channels<const W: usize>(&self, state: &mut [f32], x: &[f32], y: &mut [f32], first: usize) {
        let head_dim = x.len();
        let x: &[f32; W] = x[first..]
            .first_chunk()
            .expect("the caller counts channels");
        let input = x.map(|x| self.dt * x);
        let sums = self.kernel(state, head_dim, &input, first);
        let sums = sums.unwrap_or_else(|| self.sums(state, head_dim, &input, first));
        for lane in 0..W {
            y[first + lane] = sums[lane] + self.d * x[lane];
        }
    }

    /// What the machine has a kernel for.
    #[inline(always)]
    fn kernel<const W: usize>(
        &self,
        state: &mut [f32],
        row_len: usize,
        input: &[f32; W],
        first: usize,
    ) -> Option<[f32; W]> {
        let step = ScanStep {
            decay: self.decay,
            input: input.as_slice().try_into().ok()?,
            b: self.b,
            c: self.c,
        };
        let values = state;
        let state = StateRows {
            values,
            row_len,
            first,
        };
        kernels::scan_rows(self.isa, state, step)?
            .as_slice()
            .try_into()
            .ok()
    }

    #[inline(always)]
    fn sums<const W: usize>(
        &self,
        state: &mut [f32],
        row_len: usize,
        input: &[f32; W],
        first: usize,
    ) -> [f32; W] {
        let mut sums = [0.0; W];
        for ((row, b), c) in state.chunks_exact_mut(row_len).zip(self.b).zip(self.c) {
            let row: &mut [f32; W] = row[first..]
                .first_chunk_mut()
                .expect("a state row is as wide as x");
            for lane in 0..W {
                row[lane] = row[lane] * self.decay + input[lane] * b;
                sums[lane] += row[lane] * c;
            }
        }
        sums
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: ScanShape = ScanShape {
        heads: 4,
        head_dim: 19,
        groups: 2,
        state_size: 5,
        time_step: (0.0, f32::INFINITY),
    };

    fn values(count: usize, seed: usize) -> Vec<f32> {
        (0..count)
            .map(|i| ((i * 31 + seed * 17) % 23) as f32 / 11.0 - 1.0)
            .collect()
    }

    fn run(pieces: &[usize], shape: ScanShape) -> Vec<f32> {
        run_on(Isa::detect(), pieces, shape)
    }

    fn run_on(isa: Isa, pieces: &[usize], shape: ScanShape) -> Vec<f32> {
        let rows: usize = pieces.iter().sum();
        let (xbc, dt) = (values(rows * shape.conv_dim(), 1), values(rows * 6, 2));
        let (a, d, bias) = (vec![-0.5; 4], vec![0.3; 4], vec![0.1, -0.2, 0.3, 0.0]);
        let mut state = vec![0.0; shape.state_len()];
        let (mut out, mut begin) = (Vec::new(), 0);
        for &piece in pieces {
            let segment = Segment {
                rows: 0..piece,
                position: begin,
                state: &mut state,
            };
            let weights = ScanWeights {
                a: &a,
                d: &d,
                dt_bias: &bias,
            };
            let end = begin + piece;
            let xbc = &xbc[begin * shape.conv_dim()..end * shape.conv_dim()];
            out.extend(selective_scan(
                isa,
                xbc,
                &dt[begin * 6..end * 6],
                6,
                weights,
                shape,
                &mut [segment],
            ));
            begin = end;
        }
        out
    }

    /// The parallel form: `y_t = sum_s exp(sum dt A) (C_t B_s) dt_s x_s + D x_t`, in f64.
    fn parallel_form(rows: usize) -> Vec<f64> {
        let shape = SHAPE;
        let (xbc, dt) = (values(rows * shape.conv_dim(), 1), values(rows * 6, 2));
        let bias = [0.1, -0.2, 0.3, 0.0];
        let at = |row: usize, channel: usize| f64::from(xbc[row * shape.conv_dim() + channel]);
        let mut out = vec![0.0; rows * shape.inner()];
        for head in 0..shape.heads {
            let group = head / 2;
            let step: Vec<f64> = (0..rows)
                .map(|row| {
                    (f64::from(dt[row * 6 + 2 + head]) + bias[head])
                        .exp()
                        .ln_1p()
                })
                .collect();
            for t in 0..rows {
                for p in 0..shape.head_dim {
                    let x = |row: usize| at(row, head * shape.head_dim + p);
                    let mut y = 0.3 * x(t);
                    for s in 0..=t {
                        let decay: f64 = step[s + 1..=t].iter().map(|dt| dt * -0.5).sum();
                        let cb: f64 = (0..shape.state_size)
                            .map(|n| {
                                let b = shape.inner() + group * shape.state_size + n;
                                at(s, b) * at(t, b + shape.groups * shape.state_size)
                            })
                            .sum();
                        y += decay.exp() * cb * step[s] * x(s);
                    }
                    out[t * shape.inner() + head * shape.head_dim + p] = y;
                }
            }
        }
        out
    }

    #[test]
    fn the_recurrence_equals_the_parallel_form() {
        for (found, expected) in run(&[9], SHAPE).iter().zip(parallel_form(9)) {
            assert!(
                (f64::from(*found) - expected).abs() < 1e-5,
                "{found} {expected}"
            );
        }
    }

    #[test]
    fn pieces_give_what_the_whole_gives() {
        assert_eq!(run(&[1, 4, 2, 2], SHAPE), run(&[9], SHAPE));
    }

    #[test]
    fn kernels_give_what_the_loop_gives() {
        // One kernel of 64 channels, sixteen and three by the loop.
        let wide = ScanShape {
            head_dim: SCAN_CHANNELS + NARROW + 3,
            ..SHAPE
        };
        for isa in Isa::all() {
            assert_eq!(run_on(isa, &[9], wide), run_on(Isa::Portable, &[9], wide));
        }
    }

    #[test]
    fn time_steps_are_clamped_where_asked() {
        let clamped = ScanShape {
            time_step: (0.9, f32::INFINITY),
            ..SHAPE
        };
        assert_ne!(run(&[9], clamped), run(&[9], SHAPE));
    }
}
