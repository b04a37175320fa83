//! Integer grids of packed safetensors: `scale (q - zero)`, one scale per row or per group of columns.
//!
//! Enters: f32 rows. Leaves: integer rows, from which every layout is packed: the codes of a row, its scales, its zero
//! points. Knows no tensor names and no bit order.

mod bf16_steps;
mod nearest;
#[cfg(test)]
mod tests;

use std::fmt;

use half::{bf16, f16};
use nemoconv_formats::packed::Width;
use pulp::Simd;

use super::ScaleOverflow;
use super::lanes::{F16_MAX, Lanes};

/// The smallest code.
pub const fn lowest(width: Width) -> f32 {
    match width {
        Width::Four => -8.0,
        Width::Eight => -128.0,
    }
}

/// The largest code.
pub const fn highest(width: Width) -> f32 {
    -lowest(width) - 1.0
}

/// The float that scales are stored in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ScaleFloat {
    /// IEEE half precision: ggml's blocks, GPTQ's layout.
    F16,
    /// The upper half of an f32: compressed-tensors beside a BF16 model.
    Bf16,
}

impl ScaleFloat {
    /// The nearest value it can hold.
    #[inline(always)]
    pub fn nearest<S: Simd>(self, x: Lanes<S>) -> Lanes<S> {
        match self {
            Self::F16 => x.round_to_f16(),
            Self::Bf16 => x.round_to_bf16(),
        }
    }

    /// The nearest value it can hold; what overflows becomes the largest finite one.
    pub fn rounded(self, x: f32) -> f32 {
        match self {
            Self::F16 => f16::from_f32(x.clamp(-F16_MAX, F16_MAX)).to_f32(),
            Self::Bf16 => bf16::from_f32(x).to_f32(),
        }
    }

    /// The bits of a value it holds.
    pub fn bits(self, x: f32) -> u16 {
        match self {
            Self::F16 => f16::from_f32(x).to_bits(),
            Self::Bf16 => bf16::from_f32(x).to_bits(),
        }
    }

    /// The value of bits.
    pub fn value(self, bits: u16) -> f32 {
        match self {
            Self::F16 => f16::from_bits(bits).to_f32(),
            Self::Bf16 => bf16::from_bits(bits).to_f32(),
        }
    }

    /// Whether a scale is as large as the float can hold, and so may have been cut.
    pub fn is_saturated(self, scale: f32) -> bool {
        self == Self::F16 && scale.abs() >= F16_MAX
    }
}

/// How codes and scales of a matrix are chosen without samples.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Nearest {
    /// The scale is rounded to its float first; each code is nearest to the weight in units of the stored scale.
    ToStoredScale,
    /// As llm-compressor computes: every step rounded to BF16. Loses more; for comparisons byte by byte.
    InBf16Steps,
}

/// An integer grid.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct IntegerGrid {
    /// Width of a code.
    pub width: Width,
    /// Columns that share a scale; `None`: a whole row.
    pub group_size: Option<usize>,
    /// Whether groups have a zero point; scales are then of a range rather than of a magnitude.
    pub has_zero_point: bool,
    /// What scales are stored in.
    pub scale: ScaleFloat,
}

impl IntegerGrid {
    /// Scales of a row.
    pub fn groups(&self, columns: usize) -> usize {
        self.group_size.map_or(1, |size| columns / size)
    }

    /// Columns that share a scale.
    pub fn group_columns(&self, columns: usize) -> usize {
        self.group_size.unwrap_or(columns)
    }

    /// Whether rows of so many columns are whole groups.
    pub fn fits(&self, columns: usize) -> bool {
        columns > 0 && columns.is_multiple_of(self.group_columns(columns))
    }

    /// Bytes of an integer row: a code per column, then two bytes per scale, then a code per zero point.
    pub fn row_bytes(&self, columns: usize) -> usize {
        columns + self.groups(columns) * (2 + usize::from(self.has_zero_point))
    }

    /// Bits per weight once packed: codes, scales and zero points.
    pub fn bits_per_weight(&self, columns: usize) -> f64 {
        let bits = self.width.bits();
        let zero = if self.has_zero_point { bits } else { 0 };
        bits as f64 + (16 + zero) as f64 / self.group_columns(columns) as f64
    }

    /// The parts of an integer row of [`Self::row_bytes`].
    pub fn split<'a>(&self, columns: usize, row: &'a [u8]) -> IntegerRow<'a> {
        let (codes, rest) = row.split_at(columns);
        let (scales, zeros) = rest.split_at(2 * self.groups(columns));
        IntegerRow {
            codes: bytemuck::cast_slice(codes),
            scales: scales.as_chunks().0,
            zeros: bytemuck::cast_slice(zeros),
        }
    }

    /// The same, to be written.
    pub(super) fn split_mut<'a>(&self, columns: usize, row: &'a mut [u8]) -> IntegerRowMut<'a> {
        let (codes, rest) = row.split_at_mut(columns);
        let (scales, zeros) = rest.split_at_mut(2 * self.groups(columns));
        IntegerRowMut {
            codes: bytemuck::cast_slice_mut(codes),
            scales: scales.as_chunks_mut().0,
            zeros: bytemuck::cast_slice_mut(zeros),
        }
    }

    /// Quantizes whole rows to the nearest codes.
    ///
    /// `rows`: `[n, columns]`, row-major; `out`: n rows of [`Self::row_bytes`]. Gives the scales that did not fit their float.
    ///
    /// # Panics
    /// The lengths do not belong together, or rows are not whole groups.
    pub fn quantize_rows(
        &self,
        columns: usize,
        rows: &[f32],
        how: Nearest,
        out: &mut [u8],
    ) -> ScaleOverflow {
        assert!(self.fits(columns) && rows.len().is_multiple_of(columns));
        assert_eq!(out.len(), rows.len() / columns * self.row_bytes(columns));
        let outs = out.chunks_exact_mut(self.row_bytes(columns));
        let mut overflow = 0;
        for (row, out) in rows.chunks_exact(columns).zip(outs) {
            let out = self.split_mut(columns, out);
            overflow += match how {
                Nearest::ToStoredScale => nearest::row(self, row, out),
                Nearest::InBf16Steps => bf16_steps::row(self, row, out),
            };
        }
        ScaleOverflow(overflow)
    }

    /// The weights of integer rows: `scale (q - zero)` in f32, which is exact.
    ///
    /// # Panics
    /// The lengths do not belong together.
    pub fn dequantize(&self, columns: usize, rows: &[u8], out: &mut [f32]) {
        assert_eq!(out.len(), rows.len() / self.row_bytes(columns) * columns);
        let rows = rows.chunks_exact(self.row_bytes(columns));
        for (row, out) in rows.zip(out.chunks_exact_mut(columns)) {
            let row = self.split(columns, row);
            let size = self.group_columns(columns);
            let groups = row.codes.chunks(size).zip(out.chunks_mut(size));
            for (group, (codes, out)) in groups.enumerate() {
                let (scale, zero) = (row.scale(self.scale, group), row.zero(group));
                for (out, code) in out.iter_mut().zip(codes) {
                    *out = scale * f32::from(i16::from(*code) - i16::from(zero));
                }
            }
        }
    }
}

impl fmt::Display for IntegerGrid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "int{}", self.width.bits())?;
        match self.group_size {
            Some(size) => write!(f, " per {size}")?,
            None => write!(f, " per row")?,
        }
        match self.has_zero_point {
            true => write!(f, " with zero points"),
            false => Ok(()),
        }
    }
}

/// One row: a code per column, a scale and perhaps a zero point per group.
#[derive(Debug, Clone, Copy)]
pub struct IntegerRow<'a> {
    /// `q`.
    pub codes: &'a [i8],
    /// Bits of the scales, little-endian.
    pub scales: &'a [[u8; 2]],
    /// Codes that stand for zero; empty in symmetric grids.
    pub zeros: &'a [i8],
}

impl IntegerRow<'_> {
    fn scale(&self, float: ScaleFloat, group: usize) -> f32 {
        float.value(u16::from_le_bytes(self.scales[group]))
    }

    fn zero(&self, group: usize) -> i8 {
        self.zeros.get(group).copied().unwrap_or(0)
    }
}

/// [`IntegerRow`], to be written.
pub(super) struct IntegerRowMut<'a> {
    pub codes: &'a mut [i8],
    pub scales: &'a mut [[u8; 2]],
    pub zeros: &'a mut [i8],
}

impl IntegerRowMut<'_> {
    /// Writes what belongs to a group.
    pub fn set_scale(&mut self, float: ScaleFloat, group: usize, scale: f32, zero: f32) {
        self.scales[group] = float.bits(scale).to_le_bytes();
        if let Some(to) = self.zeros.get_mut(group) {
            *to = zero as i8;
        }
    }
}
