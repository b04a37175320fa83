//! The threads that compute.

use rayon::ThreadPoolBuilder;

/// What the main thread of a program has on most systems; a pool's threads would have less.
const STACK_BYTES: usize = 8 << 20;

/// Runs `work` on `threads` workers; all cores by default.
///
/// The work itself is one of their tasks, so that an operation inside it wakes nobody to begin.
pub fn on_workers<R: Send>(threads: Option<u16>, work: impl FnOnce() -> R + Send) -> R {
    ThreadPoolBuilder::new()
        .num_threads(threads.map_or(0, usize::from))
        .stack_size(STACK_BYTES)
        .build()
        .expect("the system gives as many threads as were asked for")
        .install(work)
}
