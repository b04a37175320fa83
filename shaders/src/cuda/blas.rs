//! cuBLAS, where it is present: large products in F32.
//!
//! Enters: layouts and addresses. Leaves: queued products. Nothing depends on it: without the library, or for layouts that it
//! does not know, products are those of the own kernel.

use std::ffi::{CStr, OsString, c_char, c_int, c_void};
use std::mem::ManuallyDrop;
use std::ptr;

use cudarc::driver::sys::{CUdeviceptr, CUstream};
use libloading::Library;

use super::library::candidates;
use crate::error::{DeviceError, Result};
use crate::ops::MatmulLayout;

type Handle = *mut c_void;

/// An open library for one stream of one context, which must be current in every call.
#[derive(Debug)]
pub struct Blas {
    handle: Handle,
    destroy: unsafe extern "C" fn(Handle) -> c_int,
    sgemm: Sgemm,
    status_text: unsafe extern "C" fn(c_int) -> *const c_char,
    /// Never unloaded: it may have threads of its own.
    _library: ManuallyDrop<Library>,
}

type Sgemm = unsafe extern "C" fn(
    Handle,
    c_int,
    c_int,
    c_int,
    c_int,
    c_int,
    *const f32,
    CUdeviceptr,
    c_int,
    CUdeviceptr,
    c_int,
    *const f32,
    CUdeviceptr,
    c_int,
) -> c_int;

/// F32 throughout: no TF32, whose 10 bits are too few for what is promised of a device.
const DEFAULT_MATH: c_int = 0;
/// A kernel could not run: no later one will.
const EXECUTION_FAILED: c_int = 13;

/// An operand as the library takes it: columns of values that are neighbours, perhaps those of its transpose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Operand {
    /// `CUBLAS_OP_T` and not `CUBLAS_OP_N`.
    is_transposed: bool,
    /// Values from column to column.
    leading: c_int,
}

/// A product as the library takes it, of the transposes: `C^T = B^T A^T`, as columns of a transpose are rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Call {
    /// Rows and columns of `C^T`, and what is summed over.
    sizes: [c_int; 3],
    /// `B^T [columns, inner]`.
    left: Operand,
    /// `A^T [inner, rows]`.
    right: Operand,
    out_leading: c_int,
}

impl Operand {
    /// A matrix of so many rows and columns, with these steps to the next row and column.
    fn of([rows, columns]: [usize; 2], [row_step, column_step]: [usize; 2]) -> Option<Self> {
        let operand = |is_transposed, leading, least: usize| {
            let leading = (leading >= least.max(1)).then_some(leading)?;
            Some(Self {
                is_transposed,
                leading: c_int::try_from(leading).ok()?,
            })
        };
        match (row_step, column_step) {
            (1, leading) if leading >= rows => operand(false, leading, rows),
            (leading, 1) => operand(true, leading, columns),
            _ => None,
        }
    }
}

impl Call {
    fn of(layout: &MatmulLayout) -> Option<Self> {
        let (rows, columns, inner) = (layout.rows, layout.columns, layout.inner);
        if rows == 0 || columns == 0 || inner == 0 || layout.out[1] < columns {
            return None;
        }
        let size = |size| c_int::try_from(size).ok();
        Some(Self {
            sizes: [size(columns)?, size(rows)?, size(inner)?],
            left: Operand::of([columns, inner], [layout.b[2], layout.b[1]])?,
            right: Operand::of([inner, rows], [layout.a[2], layout.a[1]])?,
            out_leading: size(layout.out[1])?,
        })
    }
}

/// Whether the library can take a layout.
pub fn fits(layout: &MatmulLayout) -> bool {
    Call::of(layout).is_some()
}

impl Blas {
    /// The first library that can be used with the device and driver at hand.
    pub fn open(stream: CUstream) -> Option<Self> {
        let names: &[&str] = match cfg!(windows) {
            true => &["cublas64_13.dll", "cublas64_12.dll"],
            false => &["libcublas.so", "libcublas.so.13", "libcublas.so.12"],
        };
        candidates(names)
            .into_iter()
            .find_map(|name| Self::open_at(name, stream))
    }

    fn open_at(name: OsString, stream: CUstream) -> Option<Self> {
        type Create = unsafe extern "C" fn(*mut Handle) -> c_int;
        type SetStream = unsafe extern "C" fn(Handle, CUstream) -> c_int;
        type SetMathMode = unsafe extern "C" fn(Handle, c_int) -> c_int;
        // SAFETY: opens NVIDIA's library; the types of its functions are those of cublas_api.h since CUDA 11.4.
        unsafe {
            let library = ManuallyDrop::new(Library::new(name).ok()?);
            let create: Create = *library.get(b"cublasCreate_v2\0").ok()?;
            let set_stream: SetStream = *library.get(b"cublasSetStream_v2\0").ok()?;
            let set_math_mode: SetMathMode = *library.get(b"cublasSetMathMode\0").ok()?;
            let mut blas = Self {
                handle: ptr::null_mut(),
                destroy: *library.get(b"cublasDestroy_v2\0").ok()?,
                sgemm: *library.get(b"cublasSgemm_v2\0").ok()?,
                status_text: *library.get(b"cublasGetStatusString\0").ok()?,
                _library: library,
            };
            let is_ready = create(&raw mut blas.handle) == 0
                && set_stream(blas.handle, stream) == 0
                && set_math_mode(blas.handle, DEFAULT_MATH) == 0;
            is_ready.then_some(blas)
        }
    }

    /// Queues a product; addresses are those of the first values.
    ///
    /// # Errors
    /// The library refuses, device lost.
    ///
    /// # Safety
    /// The values of the layout are there, and stay until what is queued is done; the layout [`fits`].
    pub unsafe fn multiply(
        &self,
        layout: &MatmulLayout,
        [a, b, out]: [CUdeviceptr; 3],
    ) -> Result<()> {
        let refused = |reason: String| DeviceError::Call {
            call: "cublasSgemm",
            reason,
        };
        let call = Call::of(layout).ok_or_else(|| refused("a layout that it lacks".to_owned()))?;
        let [m, n, k] = call.sizes;
        // SAFETY: see above; both factors are on the host, as is the default, and are copied by the call.
        let status = unsafe {
            (self.sgemm)(
                self.handle,
                c_int::from(call.left.is_transposed),
                c_int::from(call.right.is_transposed),
                m,
                n,
                k,
                &raw const layout.alpha,
                b,
                call.left.leading,
                a,
                call.right.leading,
                &raw const layout.beta,
                out,
                call.out_leading,
            )
        };
        if status == 0 {
            return Ok(());
        }
        // SAFETY: the library answers every status with a text of its own.
        let text = unsafe { CStr::from_ptr((self.status_text)(status)) };
        let reason = text.to_string_lossy().into_owned();
        Err(match status {
            EXECUTION_FAILED => DeviceError::Lost { reason },
            _ => refused(reason),
        })
    }
}

impl Drop for Blas {
    fn drop(&mut self) {
        if !self.handle.is_null() {
            // SAFETY: created by the same library, destroyed once. What fails here has failed before.
            let _ = unsafe { (self.destroy)(self.handle) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(layout: MatmulLayout, expected: Option<[(bool, c_int); 2]>) {
        let found = Call::of(&layout).map(|call| {
            [call.left, call.right].map(|operand| (operand.is_transposed, operand.leading))
        });
        assert_eq!(found, expected, "{layout:?}");
    }

    /// 4 x 6 = 4 x 5 times 5 x 6.
    fn layout(a: [usize; 2], b: [usize; 2]) -> MatmulLayout {
        MatmulLayout {
            a: [0, a[0], a[1]],
            b: [0, b[0], b[1]],
            ..MatmulLayout::linear(4, 5, 6, 0, 6)
        }
    }

    #[test]
    fn rows_are_columns_of_transposes() {
        check(layout([5, 1], [1, 5]), Some([(true, 5), (false, 5)]));
        check(layout([5, 1], [6, 1]), Some([(false, 6), (false, 5)]));
        check(layout([1, 4], [6, 1]), Some([(false, 6), (true, 4)]));
        check(layout([1, 9], [1, 8]), Some([(true, 8), (true, 9)]));
    }

    #[test]
    fn other_layouts_are_left_alone() {
        // Two steps, rows that overlap, results that overlap, nothing to sum.
        check(layout([10, 2], [6, 1]), None);
        check(layout([3, 1], [6, 1]), None);
        check(layout([5, 1], [1, 4]), None);
        check(
            MatmulLayout {
                out: [0, 5],
                ..layout([5, 1], [6, 1])
            },
            None,
        );
        check(MatmulLayout::linear(4, 0, 6, 0, 6), None);
        check(MatmulLayout::linear(1 << 40, 5, 6, 0, 6), None);
    }

    #[test]
    fn one_column_may_have_any_step() {
        // One value of inner: steps along it mean nothing, but the library wants them in its range.
        check(
            MatmulLayout {
                a: [0, 1, 1],
                b: [0, 1, 1],
                ..MatmulLayout::linear(4, 1, 6, 0, 6)
            },
            Some([(true, 1), (false, 1)]),
        );
    }
}
