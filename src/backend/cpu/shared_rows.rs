//! An output that many threads fill in disjoint parts which no split of the slice can express: columns of rows.

use std::marker::PhantomData;

/// Rows of equal length, written from several threads.
pub struct SharedRows<'a, T = f32> {
    values: *mut T,
    len: usize,
    row_len: usize,
    borrowed: PhantomData<&'a mut [T]>,
}

// SAFETY: parts are handed out by `part` only, whose callers promise that no two threads hold the same one.
unsafe impl<T: Send> Sync for SharedRows<'_, T> {}

impl<'a, T> SharedRows<'a, T> {
    /// Borrows `values` as rows.
    pub fn new(values: &'a mut [T], row_len: usize) -> Self {
        Self {
            values: values.as_mut_ptr(),
            len: values.len(),
            row_len,
            borrowed: PhantomData,
        }
    }

    /// Columns `first..first + count` of `row`.
    ///
    /// # Safety
    /// No other reference to any of these values exists while the result lives.
    ///
    /// # Panics
    /// The part is not inside the rows.
    #[allow(clippy::mut_from_ref, reason = "disjointness is the caller's promise")]
    pub unsafe fn part(&self, row: usize, first: usize, count: usize) -> &mut [T] {
        let begin = row * self.row_len + first;
        assert!(first + count <= self.row_len && begin + count <= self.len);
        // SAFETY: the part is inside the borrowed slice by the check above, and unaliased by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.values.add(begin), count) }
    }
}
