//! Kernels that take arrays row by row.

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

impl Device {
    /// `x / sqrt(mean(x^2) + eps) * weight` per row of `weight`'s length.
    ///
    /// # Errors
    /// Out of memory, device lost.
    pub fn rms_norm(&self, input: &Array, weight: &Array, eps: f32) -> Result<Array> {
        let rows = input.len() / weight.len();
        let out = self.uninitialized(input.len())?;
        let views = [input.view(), weight.view(), out.view()];
        let parameters = [word(rows), word(weight.len()), eps.to_bits()];
        self.launch(&kernels::RMS_NORM, word(rows), &views, &parameters)?;
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
        let views = [y.view(), z.view(), weight.view()];
        let sizes = [rows, inner, z_stride, groups].map(word);
        let parameters = [&sizes[..], &[eps.to_bits()]].concat();
        self.launch(
            &kernels::GATED_RMS_NORM,
            word(rows * groups),
            &views,
            &parameters,
        )
    }

    /// Adds one row of values to every row, in place.
    ///
    /// # Errors
    /// Device lost.
    pub fn add_bias(&self, rows: &mut Array, bias: &Array) -> Result<()> {
        let kernel = &kernels::ADD_BIAS;
        let groups = groups_of(rows.len(), kernel.threads);
        let parameters = [word(rows.len()), word(bias.len())];
        self.launch(kernel, groups, &[rows.view(), bias.view()], &parameters)
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
        let rows = self.upload_bytes(bytemuck::cast_slice(rows))?;
        let views = [input.view(), rows.view(), out.view()];
        let parameters = [word(out.len()), word(width)];
        self.launch(
            kernel,
            groups_of(out.len(), kernel.threads),
            &views,
            &parameters,
        )?;
        Ok(out)
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
        let count = rows.len() * width;
        let rows = self.upload_bytes(bytemuck::cast_slice(rows))?;
        let weights = self.upload(weights)?;
        let views = [sum.view(), values.view(), rows.view(), weights.view()];
        let parameters = [word(count), word(width)];
        self.launch(
            kernel,
            groups_of(count, kernel.threads),
            &views,
            &parameters,
        )
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
        let blocks = input.len().div_ceil(block);
        let groups = groups_of(blocks, kernel.threads);
        let parameters = [word(input.len()), word(block), mode, scale.to_bits()];
        self.launch(kernel, groups, &[input.view(), out.view()], &parameters)?;
        Ok(out)
    }
}
