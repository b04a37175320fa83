//! Passes after the first: with everything else held, each scale and each code moves to where the loss is least.
//!
//! Enters: rounded rows, the gradient of a chunk of columns, the second moments. Leaves: rows with no more loss. One row per
//! lane, sums in order of columns.

use std::ops::Range;

use pulp::{Simd, WithSimd};

use super::super::integer::ScaleFloat;
use super::super::lanes::Lanes;
use super::super::symmetric::Nearest;
use super::cholesky::Strips;
use super::grid::Lattice;
use super::scales::Scales;
use super::sweep::{Half, ROWS, Row, gather, spread, write};

/// One pass over a chunk of columns.
///
/// The loss is `tr(E M E^T)`; with `g = E M`, an error that changes by `c` in column j changes it by
/// `c (2 g[j] + c M[j][j])`.
pub struct Pass<'a, N, const SUB: usize> {
    /// The rows.
    pub half: &'a mut Half,
    /// Columns of the chunk: whole sub-blocks.
    pub chunk: Range<usize>,
    /// `E M`, `[column of the chunk]`.
    pub gradient: &'a mut [Row],
    /// Changes of errors, `[column]`: working space.
    pub changes: &'a mut [Row],
    /// M.
    pub moments: &'a Strips,
    /// How scales may move.
    pub lattice: Lattice,
    /// Rounds to the type's codes.
    pub nearest: N,
}

impl<N: Nearest, const SUB: usize> WithSimd for Pass<'_, N, SUB> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        for lane in (0..ROWS).step_by(Lanes::<S>::COUNT) {
            self.lanes(simd, lane);
        }
    }
}

impl<N: Nearest, const SUB: usize> Pass<'_, N, SUB> {
    #[inline(always)]
    fn lanes<S: Simd>(&mut self, simd: S, lane: usize) {
        let mut inner = [[0.0; SUB]; SUB];
        for first in self.chunk.clone().step_by(SUB) {
            gather(self.moments, first, &mut inner);
            let mut sub = self.open(simd, lane, first, &inner);
            sub.refit_scales(self.lattice);
            sub.move_codes(self.nearest);
            self.close(lane, first, &sub);
            let done = first..first + SUB;
            spread(
                simd,
                lane,
                self.moments,
                self.changes,
                done,
                self.chunk.end,
                self.gradient,
            );
        }
    }

    #[inline(always)]
    fn open<'i, S: Simd>(
        &self,
        simd: S,
        lane: usize,
        first: usize,
        inner: &'i [[f32; SUB]; SUB],
    ) -> Sub<'i, S, SUB> {
        let zero = Lanes::zero(simd);
        let mut sub = Sub {
            wanted: [zero; SUB],
            errors: [zero; SUB],
            before: [zero; SUB],
            values: [zero; SUB],
            gradient: [zero; SUB],
            scales: Scales::read(simd, &self.half.scales[first / SUB], lane),
            inner,
        };
        for j in 0..SUB {
            sub.wanted[j] = Lanes::read(simd, &self.half.wanted[first + j][lane..]);
            sub.errors[j] = Lanes::read(simd, &self.half.errors[first + j][lane..]);
            sub.values[j] = Lanes::read(simd, &self.half.values[first + j][lane..]);
            sub.gradient[j] =
                Lanes::read(simd, &self.gradient[first + j - self.chunk.start][lane..]);
        }
        sub.before = sub.errors;
        sub
    }

    #[inline(always)]
    fn close<S: Simd>(&mut self, lane: usize, first: usize, sub: &Sub<S, SUB>) {
        for j in 0..SUB {
            write(&mut self.half.errors[first + j][lane..], sub.errors[j]);
            write(&mut self.half.values[first + j][lane..], sub.values[j]);
            write(
                &mut self.changes[first + j][lane..],
                sub.errors[j] - sub.before[j],
            );
        }
        sub.scales.write(&mut self.half.scales[first / SUB], lane);
    }
}

/// A sub-block while it moves.
struct Sub<'a, S: Simd, const SUB: usize> {
    wanted: [Lanes<S>; SUB],
    errors: [Lanes<S>; SUB],
    before: [Lanes<S>; SUB],
    values: [Lanes<S>; SUB],
    gradient: [Lanes<S>; SUB],
    scales: Scales<S>,
    /// M inside the sub-block, see [`gather`].
    inner: &'a [[f32; SUB]; SUB],
}

impl<S: Simd, const SUB: usize> Sub<'_, S, SUB> {
    /// Moves scale and minimum, codes held, to the best the type can store.
    #[inline(always)]
    fn refit_scales(&mut self, lattice: Lattice) {
        match lattice {
            Lattice::Fixed => {}
            Lattice::Own(float) => self.move_step(|scales, change| Scales {
                d: float.nearest(scales.d + change),
                ..scales
            }),
            Lattice::ZeroPoint(float, low, high) => {
                self.move_step_and_offset(float);
                self.move_offset(|scales, change| Scales {
                    min: whole(scales.min + change * scales.d.recip_or_zero(), low, high),
                    ..scales
                });
            }
            Lattice::HalfWithMin => {
                self.move_step(|scales, change| Scales {
                    d: (scales.d + change).round_to_f16(),
                    ..scales
                });
                self.move_offset(|scales, change| Scales {
                    dmin: (scales.dmin + change).round_to_f16(),
                    ..scales
                });
            }
            Lattice::Whole(low, high, min) => {
                self.move_step(|scales, change| Scales {
                    scale: whole(scales.scale + change * scales.d.recip_or_zero(), low, high),
                    ..scales
                });
                if let Some(high) = min {
                    self.move_offset(|scales, change| Scales {
                        min: whole(scales.min + change * scales.dmin.recip_or_zero(), 0.0, high),
                        ..scales
                    });
                }
            }
        }
    }

    #[inline(always)]
    fn move_step(&mut self, moved: impl Fn(Scales<S>, Lanes<S>) -> Scales<S>) {
        let direction = self.values;
        let (slope, curvature, bends) = self.along(&direction);
        // A step that grows by c makes every error shrink by c times its value.
        let scales = moved(self.scales, slope * curvature.recip_or_zero());
        let change = self.scales.step() - scales.step();
        self.accept(scales, change, slope, curvature, &bends);
    }

    /// Moves a scale that the minimum is a multiple of.
    #[inline(always)]
    fn move_step_and_offset(&mut self, float: ScaleFloat) {
        let direction = self.values.map(|value| value - self.scales.min);
        let (slope, curvature, bends) = self.along(&direction);
        let moved = float.nearest(self.scales.d + slope * curvature.recip_or_zero());
        let positive = moved.gt(moved.like(0.0));
        let d = positive.select(moved, self.scales.d);
        let change = self.scales.d - d;
        let scales = Scales {
            d,
            dmin: d,
            ..self.scales
        };
        self.accept(scales, change, slope, curvature, &bends);
    }

    #[inline(always)]
    fn move_offset(&mut self, moved: impl Fn(Scales<S>, Lanes<S>) -> Scales<S>) {
        let direction = [self.gradient[0].like(1.0); SUB];
        let (slope, curvature, bends) = self.along(&direction);
        let scales = moved(self.scales, -(slope * curvature.recip_or_zero()));
        let change = scales.offset() - self.scales.offset();
        self.accept(scales, change, slope, curvature, &bends);
    }

    /// For errors that change along a direction v: `g v`, `v M v` and `v M`.
    #[inline(always)]
    fn along(&self, direction: &[Lanes<S>; SUB]) -> (Lanes<S>, Lanes<S>, [Lanes<S>; SUB]) {
        let zero = self.gradient[0].like(0.0);
        let (mut slope, mut curvature, mut bends) = (zero, zero, [zero; SUB]);
        for j in 0..SUB {
            let row = &self.inner[j];
            let mut bend = zero;
            for i in 0..SUB {
                bend = direction[i].mul_add(zero.like(row[i]), bend);
            }
            bends[j] = bend;
            slope = self.gradient[j].mul_add(direction[j], slope);
            curvature = bend.mul_add(direction[j], curvature);
        }
        (slope, curvature, bends)
    }

    /// Takes the scales, which change errors by `change` along the direction, where that loses less.
    #[inline(always)]
    fn accept(
        &mut self,
        scales: Scales<S>,
        change: Lanes<S>,
        slope: Lanes<S>,
        curvature: Lanes<S>,
        bends: &[Lanes<S>; SUB],
    ) {
        let zero = change.like(0.0);
        let better = (change * (slope + slope + change * curvature)).lt(zero);
        let change = better.select(change, zero);
        self.scales = self.scales.or_where(better, &scales);
        let (step, offset) = (self.scales.step(), self.scales.offset());
        for (j, bend) in bends.iter().enumerate() {
            self.errors[j] = self.wanted[j] - (step * self.values[j] - offset);
            self.gradient[j] = change.mul_add(*bend, self.gradient[j]);
        }
    }

    /// Moves every code in turn.
    #[inline(always)]
    fn move_codes(&mut self, nearest: impl Nearest) {
        let zero = self.gradient[0].like(0.0);
        let (step, offset) = (self.scales.step(), self.scales.offset());
        let inverse = step.recip_or_zero();
        let mut changes = [zero; SUB];
        for j in 0..SUB {
            let row = &self.inner[j];
            let mut gradient = self.gradient[j];
            for (change, moment) in changes[..j].iter().zip(row) {
                gradient = change.mul_add(zero.like(*moment), gradient);
            }
            let curvature = zero.like(row[j]);
            let target = self.wanted[j] - self.errors[j] + gradient * curvature.recip_or_zero();
            let value = nearest.nearest((target + offset) * inverse);
            let error = self.wanted[j] - (step * value - offset);
            let change = error - self.errors[j];
            let better = (change * (gradient + gradient + change * curvature)).lt(zero);
            self.values[j] = better.select(value, self.values[j]);
            self.errors[j] = better.select(error, self.errors[j]);
            changes[j] = better.select(change, zero);
        }
    }
}

/// The nearest whole number within bounds.
#[inline(always)]
fn whole<S: Simd>(x: Lanes<S>, low: f32, high: f32) -> Lanes<S> {
    x.max(x.like(low)).min(x.like(high)).round()
}
