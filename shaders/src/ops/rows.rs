//! Kernels that take arrays row by row.

use std::ops::Range;

use super::{groups_of, word};
use crate::array::{Array, Device};
use crate::error::Result;
use crate::kernels;

/// How inputs of a matrix product are rounded.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Rounding {
    /// To BF16.
    Bf16,
    /// To F16.
    F16,
    /// 8 bit per block of 32, scale in F16.
    Q8_0,
    /// 8 bit per block of 256, the largest magnitude at -127.
    Q8K,
    /// 8 bit with one scale per row.
    RowInt8,
    /// 8 bit with this scale.
    StaticInt8(f32),
    /// F8_E4M3 with one scale per row.
    RowFloat8,
    /// F8_E4M3 with one scale per block of so many values.
    BlockFloat8(usize),
    /// F8_E4M3 with this scale.
    StaticFloat8(f32),
    /// E2M1 per block of 16, scales in F8_E4M3 in units of this.
    Nvfp4(f32),
}

/// Values of a block where they are rounded one by one.
const SMALL_BLOCK: usize = 4;

impl Rounding {
    /// Mode and scale as the kernel knows them, and the length of its blocks in rows of `width` values.
    fn mode(self, width: usize) -> (u32, f32, usize) {
        match self {
            Self::Bf16 => (0, 0.0, SMALL_BLOCK),
            Self::F16 => (1, 0.0, SMALL_BLOCK),
            Self::Q8_0 => (2, 0.0, 32),
            Self::Q8K => (3, 0.0, 256),
            Self::RowInt8 => (4, 0.0, width),
            Self::StaticInt8(scale) => (5, scale, SMALL_BLOCK),
            Self::RowFloat8 => (6, 0.0, width),
            Self::BlockFloat8(block) => (6, 0.0, block),
            Self::StaticFloat8(scale) => (7, scale, SMALL_BLOCK),
            Self::Nvfp4(unit) => (8, unit, 16),
        }
    }
}

/// Rows that follow each other in a list, and lie near each other in an array.
struct Run {
    /// In the list.
    places: Range<usize>,
    /// In the array: those of the list, and what is between them.
    rows: Range<usize>,
}

impl Run {
    fn of(place: usize, row: usize) -> Self {
        Self {
            places: place..place + 1,
            rows: row..row + 1,
        }
    }

    /// Both, and what is between them.
    fn and(&self, next: &Self) -> Self {
        Self {
            places: self.places.start..next.places.end,
            rows: self.rows.start.min(next.rows.start)..self.rows.end.max(next.rows.end),
        }
    }

    /// Its part of the list, counted from its first row.
    fn numbers(&self, list: &[u32]) -> Vec<u32> {
        let first = word(self.rows.start);
        let listed = &list[self.places.clone()];
        listed.iter().map(|row| row - first).collect()
    }
}

fn values_of(rows: &Range<usize>, width: usize) -> Range<usize> {
    rows.start * width..rows.end * width
}

impl Device {
    /// `x / sqrt(mean(x^2) + eps) * weight` per row of `weight`'s length.
    ///
    /// # Errors
    /// Out of memory, device lost.
    pub fn rms_norm(&self, input: &Array, weight: &Array, eps: f32) -> Result<Array> {
        let rows = input.len() / weight.len();
        let width = weight.len();
        let out = self.uninitialized(input.len())?;
        for part in self.parts_of_rows(0..rows, &[4 * width]) {
            let views = [
                part.view(input, width),
                weight.view(),
                part.view(&out, width),
            ];
            let rows = word(part.rows.len());
            let parameters = [rows, word(width), eps.to_bits()];
            self.launch(&kernels::RMS_NORM, rows, &views, &parameters)?;
        }
        Ok(out)
    }

    /// `y * silu(z)`, then one norm per group of channels, in place: `y [rows, inner]`, `z` the first `inner` of each
    /// `z_stride` values, `weight [inner]`.
    ///
    /// # Errors
    /// Device lost.
    pub fn gated_rms_norm(
        &self,
        y: &mut Array,
        z: &Array,
        z_stride: usize,
        weight: &Array,
        groups: usize,
        eps: f32,
    ) -> Result<()> {
        let inner = weight.len();
        let rows = y.len() / inner;
        for part in self.parts_of_rows(0..rows, &[4 * inner, 4 * z_stride]) {
            let rows = part.rows.len();
            let views = [part.view(y, inner), part.view(z, z_stride), weight.view()];
            let sizes = [rows, inner, z_stride, groups].map(word);
            let parameters = [&sizes[..], &[eps.to_bits()]].concat();
            let kernel = &kernels::GATED_RMS_NORM;
            self.launch(kernel, word(rows * groups), &views, &parameters)?;
        }
        Ok(())
    }

    /// Adds one row of values to every row, in place.
    ///
    /// # Errors
    /// Device lost.
    pub fn add_bias(&self, rows: &mut Array, bias: &Array) -> Result<()> {
        let (kernel, width) = (&kernels::ADD_BIAS, bias.len());
        for part in self.parts_of_rows(0..rows.len() / width, &[4 * width]) {
            let count = part.rows.len() * width;
            let views = [part.view(rows, width), bias.view()];
            let groups = groups_of(count, kernel.threads);
            self.launch(kernel, groups, &views, &[word(count), word(width)])?;
        }
        Ok(())
    }

    /// The given rows of `width` values each.
    ///
    /// # Errors
    /// Out of memory, device lost.
    ///
    /// # Panics
    /// A row is not there.
    pub fn gather(&self, input: &Array, width: usize, rows: &[u32]) -> Result<Array> {
        assert!(
            rows.iter()
                .all(|row| (*row as usize + 1) * width <= input.len())
        );
        let out = self.uninitialized(rows.len() * width)?;
        let kernel = &kernels::GATHER;
        for run in self.runs(width, rows) {
            let (input, first_input) = input.part(values_of(&run.rows, width));
            let (out, first_out) = out.part(values_of(&run.places, width));
            let numbers = self.upload_bytes(bytemuck::cast_slice(&run.numbers(rows)))?;
            let views = [input, numbers.view(), out];
            let count = run.places.len() * width;
            let parameters = [word(count), word(width), first_input, first_out];
            let groups = groups_of(count, kernel.threads);
            self.launch(kernel, groups, &views, &parameters)?;
        }
        Ok(out)
    }

    /// A list of rows of `width` values in runs: views show all rows of one, and all its places in the list.
    fn runs(&self, width: usize, list: &[u32]) -> Vec<Run> {
        let fits = |rows: &Range<usize>| self.fits_a_view(&values_of(rows, 4 * width));
        let mut runs: Vec<Run> = Vec::new();
        for (place, row) in list.iter().enumerate() {
            let own = Run::of(place, *row as usize);
            let longer = runs.last().map(|run| run.and(&own));
            match (runs.last_mut(), longer) {
                (Some(last), Some(longer)) if fits(&longer.places) && fits(&longer.rows) => {
                    *last = longer;
                }
                _ => runs.push(own),
            }
        }
        runs
    }

    /// `sum[rows[i]] += weights[i] * values[i]`; no row is named twice.
    ///
    /// # Errors
    /// Out of memory, device lost.
    ///
    /// # Panics
    /// A row is not there, or the lengths do not belong together.
    pub fn scatter_add(
        &self,
        sum: &mut Array,
        width: usize,
        values: &Array,
        rows: &[u32],
        weights: &[f32],
    ) -> Result<()> {
        assert!(
            rows.iter()
                .all(|row| (*row as usize + 1) * width <= sum.len())
        );
        assert!(rows.len() == weights.len() && rows.len() * width <= values.len());
        let kernel = &kernels::SCATTER_ADD;
        for run in self.runs(width, rows) {
            let (sum, first_sum) = sum.part(values_of(&run.rows, width));
            let (values, first_value) = values.part(values_of(&run.places, width));
            let numbers = self.upload_bytes(bytemuck::cast_slice(&run.numbers(rows)))?;
            let weights = self.upload(&weights[run.places.clone()])?;
            let views = [sum, values, numbers.view(), weights.view()];
            let count = run.places.len() * width;
            let parameters = [word(count), word(width), first_sum, first_value];
            let groups = groups_of(count, kernel.threads);
            self.launch(kernel, groups, &views, &parameters)?;
        }
        Ok(())
    }

    /// Rows of `width` values as a runtime takes them.
    ///
    /// # Errors
    /// Out of memory, device lost.
    ///
    /// # Panics
    /// Rows are not whole blocks.
    pub fn round_activation(
        &self,
        input: &Array,
        width: usize,
        rounding: Rounding,
    ) -> Result<Array> {
        let out = self.uninitialized(input.len())?;
        let (mode, scale, block) = rounding.mode(width);
        // Where values are rounded one by one, blocks may reach into the next row.
        assert!(block == SMALL_BLOCK || width.is_multiple_of(block));
        let kernel = &kernels::ROUND_ACTIVATION;
        for part in self.parts_of_rows(0..input.len().div_ceil(block), &[4 * block]) {
            let count = input.len().min(part.rows.end * block) - part.rows.start * block;
            let views = [part.view(input, block), part.view(&out, block)];
            let parameters = [word(count), word(block), mode, scale.to_bits()];
            let groups = groups_of(part.rows.len(), kernel.threads);
            self.launch(kernel, groups, &views, &parameters)?;
        }
        Ok(out)
    }
}
