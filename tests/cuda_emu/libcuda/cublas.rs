//! The one product of cuBLAS, as plain loops over columns.

use std::ffi::{c_char, c_int};

use crate::world::{Op, World, world};
use crate::{SUCCESS, answer, calls};

const NOT_INITIALIZED: c_int = 1;
const INVALID_VALUE: c_int = 7;
const DEFAULT_MATH: c_int = 0;

/// A matrix in columns of `leading` values, perhaps taken as its transpose.
#[derive(Clone, Copy)]
struct Operand {
    first: u64,
    leading: usize,
    is_transposed: bool,
    /// As it is multiplied.
    rows: usize,
    columns: usize,
}

/// `C = alpha A B + beta C`.
pub struct Gemm {
    a: Operand,
    b: Operand,
    c: Operand,
    alpha: f32,
    beta: f32,
}

impl Operand {
    fn stored(&self) -> [usize; 2] {
        match self.is_transposed {
            true => [self.columns, self.rows],
            false => [self.rows, self.columns],
        }
    }

    fn is_valid(&self) -> bool {
        self.leading >= self.stored()[0].max(1)
    }

    fn range(&self) -> (u64, usize) {
        let [rows, columns] = self.stored();
        (self.first, 4 * ((columns - 1) * self.leading + rows))
    }

    fn at(&self, row: usize, column: usize) -> *mut f32 {
        let (row, column) = match self.is_transposed {
            true => (column, row),
            false => (row, column),
        };
        (self.first as usize + 4 * (row + column * self.leading)) as *mut f32
    }
}

impl Gemm {
    /// Bytes that it touches.
    pub fn ranges(&self) -> [(u64, usize); 3] {
        [self.a, self.b, self.c].map(|operand| operand.range())
    }

    pub fn run(&self) {
        for j in 0..self.c.columns {
            for i in 0..self.c.rows {
                // SAFETY: the ranges were checked.
                let product = |l| unsafe {
                    f64::from(self.a.at(i, l).read()) * f64::from(self.b.at(l, j).read())
                };
                let sum = self.alpha * (0..self.a.columns).map(product).sum::<f64>() as f32;
                let at = self.c.at(i, j);
                // SAFETY: as above.
                unsafe {
                    let before = if self.beta == 0.0 { 0.0 } else { at.read() };
                    at.write(sum + self.beta * before);
                }
            }
        }
    }
}

calls! {
    cublasCreate_v2(world, handle: *mut usize) {
        if !world.settings.has_blas {
            return NOT_INITIALIZED;
        }
        let created = world.handle();
        world.blas.insert(created, 0);
        answer(handle, created)
    }
    cublasDestroy_v2(world, handle: usize) {
        world.blas.remove(&handle).expect("a handle");
        SUCCESS
    }
    cublasSetStream_v2(world, handle: usize, stream: usize) {
        *world.blas.get_mut(&handle).expect("a handle") = stream;
        SUCCESS
    }
    cublasSetMathMode(_world, _handle: usize, mode: c_int) {
        if mode == DEFAULT_MATH { SUCCESS } else { INVALID_VALUE }
    }
    cublasSgemm_v2(
        world, handle: usize, a_operation: c_int, b_operation: c_int, m: c_int, n: c_int, k: c_int, alpha: *const f32,
        a: u64, lda: c_int, b: u64, ldb: c_int, beta: *const f32, c: u64, ldc: c_int
    ) {
        let operand = |first, leading, operation, rows, columns| Operand {
            first,
            leading: leading as usize,
            is_transposed: operation == 1,
            rows: rows as usize,
            columns: columns as usize,
        };
        let gemm = Gemm {
            a: operand(a, lda, a_operation, m, k),
            b: operand(b, ldb, b_operation, k, n),
            c: operand(c, ldc, 0, m, n),
            alpha: *alpha,
            beta: *beta,
        };
        if m <= 0 || n <= 0 || k <= 0 || ![gemm.a, gemm.b, gemm.c].iter().all(Operand::is_valid) {
            return INVALID_VALUE;
        }
        let stream = world.blas[&handle];
        world.queue(stream, Op::Gemm(gemm));
        SUCCESS
    }
}

#[unsafe(no_mangle)]
pub extern "C" fn cublasGetStatusString(_status: c_int) -> *const c_char {
    c"an emulated status".as_ptr()
}
