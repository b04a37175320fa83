//! What every target needs: a bound on memory.

use cap::Cap;
use std::alloc::System;

#[global_allocator]
static ALLOCATOR: Cap<System> = Cap::new(System, usize::MAX);

/// Allowed without regard to the input: error messages, hash tables, JSON scratch.
const BASE_BYTES: usize = 64 << 10;

/// Allowed per byte of input. The worst honest case is a JSON value of two bytes: a whole `serde_json::Value`, in a
/// vector that has just doubled.
const BYTES_PER_BYTE: usize = 256;

/// Runs `read` with memory for what `input` can fill honestly; a reader that believes a count aborts.
pub fn bounded<T>(input: &[u8], read: impl FnOnce() -> T) -> T {
    let limit = ALLOCATOR.allocated() + BASE_BYTES + BYTES_PER_BYTE * input.len();
    ALLOCATOR
        .set_limit(limit)
        .expect("the limit is above what is allocated");
    let result = read();
    ALLOCATOR
        .set_limit(usize::MAX)
        .expect("no limit is above all");
    result
}
