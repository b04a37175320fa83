//! Backwards through the Mamba-2 selective scan.
//!
//! Forwards, per head: `S_t = a_t S_{t-1} + u_t B_t^T`, `y_t = S_t C_t + D x_t`, with `u = dt x`, `a = exp(dt A)` and
//! `dt` a clamped softplus. With L_t the gradient at S_t, backwards:
//! `L_t = dy_t C_t^T + a_{t+1} L_{t+1}`, `dC_t = S_t^T dy_t`, `dB_t = L_t^T u_t`, `du_t = L_t B_t`,
//! `dx_t = dt_t du_t + D dy_t`, `d(dt_t) = du_t . x_t + A a_t (L_t . S_{t-1})`.
//! States are computed again, a stretch of tokens at a time, from one that is kept at the beginning of each.
//!
//! Source: Mamba-2, arXiv:2405.21060, section 6, differentiated.

use std::ops::Range;

use super::{Assembly, sigmoid};
use crate::backend::cpu::kernels::Isa;
use crate::backend::cpu::multiversion::multiversion;
use crate::backend::cpu::{dot, exp, softplus};
use crate::backend::{ScanShape, ScanWeights};
use crate::parallel;

/// Tokens whose states are in memory at once.
const STRETCH: usize = 32;

/// Gradients at the inputs of a scan.
#[derive(Debug)]
pub struct ScanGradient {
    /// At x, B and C, `[rows, conv_dim]`.
    pub xbc: Vec<f32>,
    /// At the time step before bias and softplus, `[rows, heads]`.
    pub dt: Vec<f32>,
}

/// Inputs of a scan, as [`crate::backend::Backend::selective_scan`] takes them, and the gradient at its output.
pub struct Scan<'a> {
    /// `[rows, conv_dim]`.
    pub xbc: &'a [f32],
    /// The dt of a row are the last `heads` of each `dt_stride` values.
    pub dt: &'a [f32],
    /// Row length of `dt`.
    pub dt_stride: usize,
    /// One value per head each.
    pub weights: ScanWeights<'a, Vec<f32>>,
    /// Sizes.
    pub shape: ScanShape,
    /// `[rows, inner]`.
    pub gradient: &'a [f32],
}

/// The gradients at everything but the weights.
pub fn selective_scan(scan: &Scan, sequences: &[Range<usize>]) -> ScanGradient {
    let shape = scan.shape;
    let rows = scan.xbc.len() / shape.conv_dim();
    let items = sequences.iter().flat_map(|rows| {
        let heads = 0..shape.heads;
        heads.map(move |head| (rows.clone(), head))
    });
    let items: Vec<_> = items.collect();
    let isa = Isa::detect();
    let found = parallel::map(&items, |(rows, head)| {
        scan_head(isa, scan, rows.clone(), *head)
    });
    let mut xbc = Assembly::new(rows, shape.conv_dim());
    let mut dt = Assembly::new(rows, shape.heads);
    for ((rows, head), found) in items.into_iter().zip(found) {
        let (b, c) = scan.columns_of_group(head);
        xbc.add(rows.start, head * shape.head_dim, &found.x, shape.head_dim);
        xbc.add(rows.start, b, &found.b, shape.state_size);
        xbc.add(rows.start, c, &found.c, shape.state_size);
        dt.add(rows.start, head, &found.dt, 1);
    }
    ScanGradient {
        xbc: xbc.values,
        dt: dt.values,
    }
}

multiversion! {
    fn scan_head(scan: &Scan<'_>, rows: Range<usize>, head: usize) -> HeadGradient = Scan::head;
}

/// What one head of one sequence adds, `[tokens, _]` each.
struct HeadGradient {
    x: Vec<f32>,
    b: Vec<f32>,
    c: Vec<f32>,
    dt: Vec<f32>,
}

/// One token of one head.
struct Token<'a> {
    x: &'a [f32],
    b: &'a [f32],
    c: &'a [f32],
    /// The gradient at y.
    dy: &'a [f32],
    dt: f32,
    decay: f32,
    /// Of the clamped softplus.
    slope: f32,
    a: f32,
    d: f32,
}

/// Where the gradients of a token go.
struct TokenGradient<'a> {
    x: &'a mut [f32],
    b: &'a mut [f32],
    c: &'a mut [f32],
    dt: &'a mut f32,
}

impl Scan<'_> {
    /// First columns of B and of C of a head's group.
    fn columns_of_group(&self, head: usize) -> (usize, usize) {
        let shape = self.shape;
        let group = head / (shape.heads / shape.groups);
        let b = shape.inner() + group * shape.state_size;
        (b, b + shape.groups * shape.state_size)
    }

    #[inline(always)]
    fn head(&self, rows: Range<usize>, head: usize) -> HeadGradient {
        let (head_dim, state_size) = (self.shape.head_dim, self.shape.state_size);
        let tokens: Vec<Token> = rows.map(|row| self.token(row, head)).collect();
        let mut state = vec![0.0; state_size * head_dim];
        let mut begins = Vec::new();
        for stretch in tokens.chunks(STRETCH) {
            begins.push(state.clone());
            stretch.iter().for_each(|token| token.advance(&mut state));
        }
        let mut found = HeadGradient {
            x: vec![0.0; tokens.len() * head_dim],
            b: vec![0.0; tokens.len() * state_size],
            c: vec![0.0; tokens.len() * state_size],
            dt: vec![0.0; tokens.len()],
        };
        let mut adjoint = vec![0.0; state_size * head_dim];
        for (index, begin) in begins.iter().enumerate().rev() {
            let first = index * STRETCH;
            let stretch = &tokens[first..tokens.len().min(first + STRETCH)];
            let states = states(begin, stretch);
            for (t, token) in stretch.iter().enumerate().rev() {
                let at = first + t;
                let out = TokenGradient {
                    x: &mut found.x[at * head_dim..][..head_dim],
                    b: &mut found.b[at * state_size..][..state_size],
                    c: &mut found.c[at * state_size..][..state_size],
                    dt: &mut found.dt[at],
                };
                token.back(&states[t], &states[t + 1], &mut adjoint, out);
            }
        }
        found
    }

    #[inline(always)]
    fn token(&self, row: usize, head: usize) -> Token<'_> {
        let shape = self.shape;
        let xbc = &self.xbc[row * shape.conv_dim()..][..shape.conv_dim()];
        let (b, c) = self.columns_of_group(head);
        let channels = head * shape.head_dim;
        let raw = self.dt[(row + 1) * self.dt_stride - shape.heads + head];
        let raw = raw + self.weights.dt_bias[head];
        let (low, high) = shape.time_step;
        let free = softplus(raw);
        let (dt, a) = (free.max(low).min(high), self.weights.a[head]);
        Token {
            x: &xbc[channels..][..shape.head_dim],
            b: &xbc[b..][..shape.state_size],
            c: &xbc[c..][..shape.state_size],
            dy: &self.gradient[row * shape.inner() + channels..][..shape.head_dim],
            dt,
            decay: exp(dt * a),
            slope: if free == dt { sigmoid(raw) } else { 0.0 },
            a,
            d: self.weights.d[head],
        }
    }
}

/// The state before every token of a stretch, and after the last.
#[inline(always)]
fn states(begin: &[f32], stretch: &[Token]) -> Vec<Vec<f32>> {
    let mut states = vec![begin.to_vec()];
    for (t, token) in stretch.iter().enumerate() {
        let mut state = states[t].clone();
        token.advance(&mut state);
        states.push(state);
    }
    states
}

impl Token<'_> {
    /// `S = a S + u B^T`, `[state_size, head_dim]`.
    #[inline(always)]
    fn advance(&self, state: &mut [f32]) {
        for (row, b) in state.chunks_exact_mut(self.x.len()).zip(self.b) {
            let input = self.dt * b;
            let values = row.iter_mut().zip(self.x);
            values.for_each(|(value, x)| *value = *value * self.decay + input * x);
        }
    }

    /// `adjoint` enters as what later tokens ask of the state behind this one, and leaves as what they and this one ask
    /// of the state before it.
    #[inline(always)]
    fn back(&self, before: &[f32], after: &[f32], adjoint: &mut [f32], out: TokenGradient) {
        let width = self.x.len();
        let states = before.chunks_exact(width).zip(after.chunks_exact(width));
        let mut kept = 0.0;
        for (n, (row, (before, after))) in adjoint.chunks_exact_mut(width).zip(states).enumerate() {
            let (b, c) = (self.b[n], self.c[n]);
            let values = row.iter_mut().zip(self.dy);
            values.for_each(|(value, dy)| *value += dy * c);
            out.c[n] = dot(after, self.dy);
            out.b[n] = self.dt * dot(row, self.x);
            kept += dot(row, before);
            let sums = out.x.iter_mut().zip(row.iter());
            sums.for_each(|(sum, value)| *sum += value * b);
            row.iter_mut().for_each(|value| *value *= self.decay);
        }
        let at_dt = dot(out.x, self.x) + self.a * self.decay * kept;
        *out.dt = at_dt * self.slope;
        for (x, dy) in out.x.iter_mut().zip(self.dy) {
            *x = self.dt * *x + self.d * dy;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::differences::{check, values, widened};
    use super::*;

    /// Longer than one stretch, and a short sequence before it.
    const SEQUENCES: [Range<usize>; 2] = [0..3, 3..STRETCH + 8];
    const ROWS: usize = STRETCH + 8;
    const DT_STRIDE: usize = 6;
    const A: [f32; 4] = [-0.5, -0.3, -1.0, -0.1];
    const D: [f32; 4] = [0.3, -0.4, 1.0, 0.2];
    const BIAS: [f32; 4] = [0.1, -0.2, 0.3, 0.0];

    fn shape(low: f32) -> ScanShape {
        ScanShape {
            heads: 4,
            head_dim: 3,
            groups: 2,
            state_size: 2,
            time_step: (low, 0.9),
        }
    }

    /// `sum of gradient * y`, step by step.
    fn loss(shape: ScanShape, xbc: &[f64], dt: &[f64], gradient: &[f32]) -> f64 {
        let mut sum = 0.0;
        for (sequence, head) in SEQUENCES
            .iter()
            .flat_map(|rows| (0..shape.heads).map(move |head| (rows, head)))
        {
            let mut state = vec![0.0; shape.state_size * shape.head_dim];
            for row in sequence.clone() {
                let at = |column: usize| xbc[row * shape.conv_dim() + column];
                let raw = dt[row * shape.heads + head] + f64::from(BIAS[head]);
                let (low, high) = shape.time_step;
                let dt = raw.exp().ln_1p().clamp(low.into(), high.into());
                let b = shape.inner() + head / 2 * shape.state_size;
                for p in 0..shape.head_dim {
                    let x = at(head * shape.head_dim + p);
                    let mut y = f64::from(D[head]) * x;
                    for n in 0..shape.state_size {
                        let value = &mut state[n * shape.head_dim + p];
                        *value = *value * (dt * f64::from(A[head])).exp() + dt * x * at(b + n);
                        y += *value * at(b + shape.groups * shape.state_size + n);
                    }
                    let outside = gradient[row * shape.inner() + head * shape.head_dim + p];
                    sum += y * f64::from(outside);
                }
            }
        }
        sum
    }

    fn check_scan(low: f32) {
        let shape = shape(low);
        let xbc = values(ROWS * shape.conv_dim(), 1);
        let wide = values(ROWS * DT_STRIDE, 2);
        let gradient = values(ROWS * shape.inner(), 3);
        let scan = Scan {
            xbc: &xbc,
            dt: &wide,
            dt_stride: DT_STRIDE,
            weights: ScanWeights {
                a: &A.to_vec(),
                d: &D.to_vec(),
                dt_bias: &BIAS.to_vec(),
            },
            shape,
            gradient: &gradient,
        };
        let found = selective_scan(&scan, &SEQUENCES);
        let dt: Vec<f32> = wide
            .chunks(DT_STRIDE)
            .flat_map(|row| row[DT_STRIDE - 4..].to_vec())
            .collect();
        check(&xbc, &found.xbc, |xbc| {
            loss(shape, xbc, &widened(&dt), &gradient)
        });
        check(&dt, &found.dt, |dt| {
            loss(shape, &widened(&xbc), dt, &gradient)
        });
    }

    #[test]
    fn the_recurrence_runs_backwards() {
        check_scan(0.0);
    }

    #[test]
    fn a_clamped_time_step_has_no_slope() {
        check_scan(0.6);
    }
}
