//! Matrix products.

use std::ops::Range;

use super::word;
use crate::array::{Array, Device, MatmulKernel};
use crate::driver::View;
use crate::error::Result;
use crate::kernels::{self, Kernel};

/// `out = alpha A B + beta out`: where the values of all three are.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MatmulLayout {
    /// Rows of A and of the result.
    pub rows: usize,
    /// Columns of B and of the result.
    pub columns: usize,
    /// Columns of A, rows of B.
    pub inner: usize,
    /// First value of A, and steps to its next row and column.
    pub a: [usize; 3],
    /// First value of B, and steps to its next row and column.
    pub b: [usize; 3],
    /// First value of the result, and the step to its next row.
    pub out: [usize; 2],
    /// Factor of the product.
    pub alpha: f32,
    /// Factor of what was there.
    pub beta: f32,
    /// Products and sums are rounded once also where the device has to compute that step by step: for what is decided by last
    /// bits.
    pub is_fused: bool,
}

impl MatmulLayout {
    /// `x W^T`: `x [rows, inner]`, `W [columns, inner]`, written to columns `first_column..` of rows of `out_row` values.
    pub fn linear(
        rows: usize,
        inner: usize,
        columns: usize,
        first_column: usize,
        out_row: usize,
    ) -> Self {
        Self {
            rows,
            columns,
            inner,
            a: [0, inner, 1],
            b: [0, 1, inner],
            out: [first_column, out_row],
            alpha: 1.0,
            beta: 0.0,
            is_fused: false,
        }
    }

    fn a_values(&self) -> Range<usize> {
        span(self.a, self.rows, self.inner)
    }

    fn b_values(&self) -> Range<usize> {
        span(self.b, self.inner, self.columns)
    }

    fn out_values(&self) -> Range<usize> {
        span([self.out[0], self.out[1], 1], self.rows, self.columns)
    }

    /// The same for some rows.
    fn part(&self, rows: Range<usize>) -> Self {
        Self {
            rows: rows.len(),
            a: [self.a[0] + rows.start * self.a[1], self.a[1], self.a[2]],
            out: [self.out[0] + rows.start * self.out[1], self.out[1]],
            ..*self
        }
    }
}

/// The values that a matrix of this layout touches.
fn span([first, row, column]: [usize; 3], rows: usize, columns: usize) -> Range<usize> {
    first..first + rows.saturating_sub(1) * row + columns.saturating_sub(1) * column + 1
}

impl Device {
    /// A matrix product: of parts where that is faster and there is room for them, a library's, or the own kernel's.
    ///
    /// # Errors
    /// Device lost; B alone is larger than a view may be.
    ///
    /// # Panics
    /// The layout goes beyond an array.
    pub fn matmul(
        &self,
        layout: &MatmulLayout,
        a: &Array,
        b: &Array,
        out: &mut Array,
    ) -> Result<()> {
        if layout.rows == 0 || layout.columns == 0 {
            return Ok(());
        }
        assert!(
            layout.a_values().end <= a.len() || layout.inner == 0,
            "A is too short"
        );
        assert!(
            layout.b_values().end <= b.len() || layout.inner == 0,
            "B is too short"
        );
        assert!(
            layout.out_values().end <= out.len(),
            "the result is too short"
        );
        if let Some([left, right]) = self.split_operands(layout, a, b)? {
            let factors = [layout.alpha, layout.beta];
            return self.matmul_split(&left, 0..layout.rows, &right, factors, layout.out, out);
        }
        let step = self.rows_in_a_view(layout);
        for first in (0..layout.rows).step_by(step) {
            let part = layout.part(first..layout.rows.min(first + step));
            self.matmul_part(&part, a, b, out)?;
        }
        Ok(())
    }

    /// Rows whose inputs and results fit views.
    fn rows_in_a_view(&self, layout: &MatmulLayout) -> usize {
        let limits = self.description().limits;
        let values = ((limits.view_bytes - limits.view_alignment) / 4) as usize;
        let row = layout.out[1].max(layout.a[1]).max(1);
        // A result may begin anywhere in its first row.
        (values / row).saturating_sub(1).max(1)
    }

    fn matmul_part(&self, layout: &MatmulLayout, a: &Array, b: &Array, out: &Array) -> Result<()> {
        let (a_view, a_first) = a.part(clamped(layout.a_values(), a.len()));
        let (b_view, b_first) = b.part(clamped(layout.b_values(), b.len()));
        let (out_view, out_first) = out.part(layout.out_values());
        let views: [View; 3] = [a_view, b_view, out_view];
        let in_views = MatmulLayout {
            a: [a_first as usize, layout.a[1], layout.a[2]],
            b: [b_first as usize, layout.b[1], layout.b[2]],
            out: [out_first as usize, layout.out[1]],
            ..*layout
        };
        if let Some(result) = self.library_product(&in_views, &views) {
            return result;
        }
        let parameters = [
            word(layout.rows),
            word(layout.columns),
            word(layout.inner),
            a_first,
            word(layout.a[1]),
            word(layout.a[2]),
            b_first,
            word(layout.b[1]),
            word(layout.b[2]),
            out_first,
            word(layout.out[1]),
            layout.alpha.to_bits(),
            layout.beta.to_bits(),
            // Of the direct kernel alone; the last one is a zero that compilers must not know.
            u32::from(layout.is_fused),
            0,
        ];
        let plain = &parameters[..parameters.len() - 2];
        let (kernel, tile, parameters): (&'static Kernel, _, _) = match self.matmul_kernel() {
            MatmulKernel::Tiled => (&kernels::MATMUL_TILED, 64, plain),
            MatmulKernel::Direct => (&kernels::MATMUL_DIRECT, 32, &parameters[..]),
        };
        let groups = layout.rows.div_ceil(tile) * layout.columns.div_ceil(tile);
        self.launch(kernel, word(groups), &views, parameters)
    }
}

/// A product without inner values touches nothing, but views are never empty.
fn clamped(values: Range<usize>, len: usize) -> Range<usize> {
    values.start.min(len)..values.end.min(len)
}
