//! Products in f64 whose bits are those of the CPU: for devices that have f64.

use super::{groups_of, word};
use crate::array::{Array, Device, Doubles};
use crate::error::Result;
use crate::kernels;

/// Rows and columns of outputs that a group of threads computes.
const TILE: usize = 64;

/// One product of `matmul_f64`: its words but for the runs.
struct Layout {
    rows: usize,
    columns: usize,
    inner: usize,
    /// Steps of A to its next run, row and column.
    a: [usize; 3],
    /// Steps of B to its next run and row.
    b: [usize; 2],
    /// Steps to the next run of the factors of rows and of columns of B.
    factors: [usize; 2],
    /// Steps of the result to its next run and row.
    out: [usize; 2],
}

impl Layout {
    fn words(&self, runs: usize) -> [u32; 13] {
        let Self {
            rows,
            columns,
            inner,
            a,
            b,
            factors,
            out,
        } = self;
        [
            runs, *rows, *columns, *inner, a[0], a[1], a[2], b[0], b[1], factors[0], factors[1],
            out[0], out[1],
        ]
        .map(word)
    }

    fn groups(&self, runs: usize) -> u32 {
        word(runs * self.rows.div_ceil(TILE) * self.columns.div_ceil(TILE))
    }
}

impl Device {
    /// `(x diag(before)) diag(after)` for `x [_, before]`.
    ///
    /// # Errors
    /// Out of memory, device lost; an array is larger than a view may be.
    ///
    /// # Panics
    /// The lengths do not belong together.
    pub fn widen(&self, x: &Array, before: &Doubles, after: &Doubles) -> Result<Doubles> {
        let width = before.len();
        assert!(after.len() == width && x.len().is_multiple_of(width.max(1)));
        let out = self.uninitialized_doubles(x.len())?;
        let kernel = &kernels::WIDEN_F64;
        let views = [x.view(), before.view(), after.view(), out.view()];
        let groups = groups_of(x.len(), kernel.threads);
        self.launch(kernel, groups, &views, &[x.len(), width].map(word))?;
        Ok(out)
    }

    /// `x (diag(before) Q diag(after))` for `x [_, before]`, with the same `q [size, size]`, row-major, for every run of columns.
    ///
    /// # Errors
    /// Out of memory, device lost; an array is larger than a view may be.
    ///
    /// # Panics
    /// The lengths do not belong together.
    pub fn mix_columns(
        &self,
        x: &Doubles,
        q: &Doubles,
        before: &Doubles,
        after: &Doubles,
    ) -> Result<Doubles> {
        let (width, size) = (before.len(), q.len().isqrt());
        assert!(after.len() == width && x.len().is_multiple_of(width.max(1)));
        assert!(width.is_multiple_of(size) && q.len() == size * size);
        let layout = Layout {
            rows: x.len() / width.max(1),
            columns: size,
            inner: size,
            a: [size, width, 1],
            b: [0, size],
            factors: [size, size],
            out: [size, width],
        };
        self.matmul_f64(&layout, width / size, [x, q, before, after])
    }

    /// `Q^T (diag(before) x)` for `x [before, width]`, with the same `q [size, size]`, row-major, for every run of rows.
    ///
    /// # Errors
    /// Out of memory, device lost; an array is larger than a view may be.
    ///
    /// # Panics
    /// The lengths do not belong together.
    pub fn mix_rows(&self, x: &Doubles, q: &Doubles, before: &Doubles) -> Result<Doubles> {
        let (rows, size) = (before.len(), q.len().isqrt());
        assert!(rows.is_multiple_of(size) && q.len() == size * size);
        assert!(x.len().is_multiple_of(rows.max(1)));
        let width = x.len() / rows.max(1);
        let ones = self.upload_doubles(&vec![1.0; width])?;
        let layout = Layout {
            rows: size,
            columns: width,
            inner: size,
            a: [0, 1, size],
            b: [size * width, width],
            factors: [size, 0],
            out: [size * width, width],
        };
        self.matmul_f64(&layout, rows / size, [q, x, before, &ones])
    }

    /// A product of every run; the result is as long as all runs of it.
    fn matmul_f64(&self, layout: &Layout, runs: usize, views: [&Doubles; 4]) -> Result<Doubles> {
        let out = self.uninitialized_doubles(runs * layout.rows * layout.columns)?;
        let [a, b, before, after] = views.map(Doubles::view);
        let views = [a, b, before, after, out.view()];
        let groups = layout.groups(runs);
        self.launch(&kernels::MATMUL_F64, groups, &views, &layout.words(runs))?;
        Ok(out)
    }
}
