//! Memory of the emulated device: exactly as long as asked for, so that sanitizers see what goes beyond it.

use std::alloc::{Layout, alloc, dealloc};
use std::ptr::NonNull;

/// One allocation.
#[derive(Debug)]
pub struct Memory {
    first: NonNull<u8>,
    layout: Layout,
}

// SAFETY: the allocation belongs to this value alone.
unsafe impl Send for Memory {}

/// What new memory holds: read as f32 a NaN, so that results which depend on it show.
const UNDEFINED: u8 = 0xff;

impl Memory {
    /// `None` without enough memory, or without bytes.
    pub fn new(bytes: u64, alignment: u64) -> Option<Self> {
        let layout = Layout::from_size_align(
            usize::try_from(bytes).ok()?,
            usize::try_from(alignment).ok()?,
        )
        .ok()?;
        if layout.size() == 0 {
            return None;
        }
        // SAFETY: the layout is not empty.
        let first = NonNull::new(unsafe { alloc(layout) })?;
        // SAFETY: so many bytes were just allocated.
        unsafe { first.write_bytes(UNDEFINED, layout.size()) };
        Some(Self { first, layout })
    }

    /// Some of the bytes; `None` beyond the end.
    pub fn part(&mut self, offset: u64, bytes: u64) -> Option<&mut [u8]> {
        // SAFETY: all bytes are initialized, and borrowed as long as this value is.
        let all =
            unsafe { std::slice::from_raw_parts_mut(self.first.as_ptr(), self.layout.size()) };
        let first = usize::try_from(offset).ok()?;
        let end = first.checked_add(usize::try_from(bytes).ok()?)?;
        all.get_mut(first..end)
    }
}

#[cfg(sanitized)]
unsafe extern "C" {
    fn __asan_poison_memory_region(first: *const u8, bytes: usize);
    fn __asan_unpoison_memory_region(first: *const u8, bytes: usize);
}

#[cfg(sanitized)]
impl Memory {
    /// Tells the sanitizer that only these ranges may be touched, until [`Self::open`].
    pub fn close_but(&self, ranges: impl Iterator<Item = (u64, u64)>) {
        // SAFETY: marks bytes of this allocation.
        unsafe { __asan_poison_memory_region(self.first.as_ptr(), self.layout.size()) };
        for (offset, bytes) in ranges {
            // SAFETY: as above; views were checked to lie in the allocation.
            unsafe {
                __asan_unpoison_memory_region(
                    self.first.as_ptr().add(offset as usize),
                    bytes as usize,
                );
            }
        }
    }

    /// Everything may be touched again.
    pub fn open(&self) {
        // SAFETY: marks bytes of this allocation.
        unsafe { __asan_unpoison_memory_region(self.first.as_ptr(), self.layout.size()) };
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout, and not used after this.
        unsafe { dealloc(self.first.as_ptr(), self.layout) };
    }
}
