//! Causal depthwise convolution over time, then SiLU: `silu(b + sum_k w_k x_{t-K+1+k})`.

use super::elementwise::silu;
use super::kernels::Isa;
use super::multiversion::multiversion;
use crate::backend::Segment;
use crate::parallel;

/// Some channels of wider rows.
#[derive(Debug, Clone, Copy)]
pub struct Channels<'a> {
    /// Rows of `stride` values.
    pub values: &'a [f32],
    /// Row length.
    pub stride: usize,
    /// First channel.
    pub first: usize,
}

impl<'a> Channels<'a> {
    fn row(&self, row: usize, channels: usize) -> &'a [f32] {
        &self.values[row * self.stride + self.first..][..channels]
    }
}

/// Rows that one task computes.
const PART_ROWS: usize = 32;

/// `weight [channels, taps]`, oldest tap first; a state holds the last `taps - 1` raw rows.
pub fn conv1d_silu(
    isa: Isa,
    input: Channels,
    weight: &[f32],
    bias: &[f32],
    segments: &mut [Segment<'_, Vec<f32>>],
) -> Vec<f32> {
    let channels = bias.len();
    let taps = weight.len() / channels;
    let by_tap: Vec<Vec<f32>> = (0..taps)
        .map(|tap| weight.iter().skip(tap).step_by(taps).copied().collect())
        .collect();
    let rows = segments
        .iter()
        .map(|segment| segment.rows.len())
        .sum::<usize>();
    let mut out = vec![0.0; rows * channels];
    let mut rest = out.as_mut_slice();
    let mut parts = Vec::new();
    for segment in segments.iter() {
        let (mine, after) = rest.split_at_mut(segment.rows.len() * channels);
        rest = after;
        for (index, part) in mine.chunks_mut(PART_ROWS * channels).enumerate() {
            parts.push((segment, index * PART_ROWS, part));
        }
    }
    parallel::for_each(parts, |(segment, first, part)| {
        // Row `t` of the sequence, negative ones from the state.
        let source = |t: isize| match usize::try_from(t) {
            Ok(t) => input.row(segment.rows.start + t, channels),
            Err(_) => &segment.state[(t + taps as isize - 1) as usize * channels..][..channels],
        };
        for (index, out) in part.chunks_exact_mut(channels).enumerate() {
            let t = (first + index) as isize;
            out.copy_from_slice(bias);
            for (tap, weight) in by_tap.iter().enumerate() {
                let x = source(t + 1 + tap as isize - taps as isize);
                add_tap(isa, out, weight, x);
            }
            silu_row(isa, out);
        }
    });
    for segment in segments {
        advance(input, channels, taps - 1, segment);
    }
    out
}

multiversion! {
    fn add_tap(out: &mut [f32], weight: &[f32], x: &[f32]) = add_products;
}

multiversion! {
    fn silu_row(row: &mut [f32]) = silu_each;
}

#[inline(always)]
fn add_products(out: &mut [f32], weight: &[f32], x: &[f32]) {
    for ((out, weight), x) in out.iter_mut().zip(weight).zip(x) {
        *out += weight * x;
    }
}

#[inline(always)]
fn silu_each(row: &mut [f32]) {
    row.iter_mut().for_each(|x| *x = silu(*x));
}

/// Keeps the last `keep` raw rows.
fn advance(input: Channels, channels: usize, keep: usize, segment: &mut Segment<'_, Vec<f32>>) {
    let new = segment.rows.len().min(keep);
    segment.state.copy_within(new * channels.., 0);
    let fresh = &mut segment.state[(keep - new) * channels..];
    for (row, out) in
        (segment.rows.end - new..segment.rows.end).zip(fresh.chunks_exact_mut(channels))
    {
        out.copy_from_slice(input.row(row, channels));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two channels inside rows of three; taps 3.
    fn run(pieces: &[usize]) -> Vec<f32> {
        let rows: usize = pieces.iter().sum();
        let values: Vec<f32> = (0..rows * 3).map(|i| (i * 7 % 11) as f32 - 5.0).collect();
        let weight = [0.5, -1.0, 2.0, 0.25, 1.0, -0.5];
        let mut state = vec![0.0; 4];
        let mut out = Vec::new();
        let mut begin = 0;
        for &piece in pieces {
            let part = Channels {
                values: &values[begin * 3..(begin + piece) * 3],
                stride: 3,
                first: 1,
            };
            let segment = Segment {
                rows: 0..piece,
                position: begin,
                state: &mut state,
            };
            out.extend(conv1d_silu(
                Isa::detect(),
                part,
                &weight,
                &[0.1, 0.2],
                &mut [segment],
            ));
            begin += piece;
        }
        out
    }

    #[test]
    fn pieces_give_what_the_whole_gives() {
        let whole = run(&[70]);
        assert_eq!(run(&[1; 70]), whole);
        assert_eq!(run(&[2, 40, 1, 27]), whole);
    }

    #[test]
    fn the_first_row_sees_zeros_before_it() {
        // Row 0 is [-5, 2, -2]: channel 0 has x = 2 and last tap 2.
        let expected = 4.1 / (1.0 + f32::exp(-4.1));
        assert!((run(&[1])[0] - expected).abs() < 1e-5);
    }
}
