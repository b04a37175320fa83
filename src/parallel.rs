//! Work on several threads: rayon, compiled once here and not anew for every closure.
//!
//! Enters: items, and what to do with one. Leaves: results, in the order of the items. Runs in rayon's current pool, and
//! knows nothing of the work.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use rayon::prelude::*;

/// Does something with every item, in any order. An item costs a lock: many that are finer than some thousand operations
/// go in chunks.
///
/// # Panics
/// The work does.
pub fn for_each<T: Send>(items: impl IntoIterator<Item = T>, work: impl Fn(T) + Sync) {
    // A loop is less to compile than what collecting comes to, here and below.
    let mut slots = Vec::new();
    for item in items {
        slots.push(Mutex::new(Some(item)));
    }
    for_each_index(slots.len(), &|index| work(taken(&slots[index])));
}

/// What comes of every item, in the order of the items; they cost as much as in [`for_each`].
///
/// # Panics
/// The work does.
pub fn map<T: Send, R: Send>(
    items: impl IntoIterator<Item = T>,
    work: impl Fn(T) -> R + Sync,
) -> Vec<R> {
    let mut pairs: Vec<(Option<T>, Option<R>)> = Vec::new();
    for item in items {
        pairs.push((Some(item), None));
    }
    for_each(&mut pairs, |(item, result)| {
        *result = item.take().map(&work);
    });
    let mut results = Vec::with_capacity(pairs.len());
    for (_, result) in pairs {
        results.push(result.expect("every item was worked on"));
    }
    results
}

/// As [`map`], where the work can fail: no item behind one that failed is begun.
///
/// # Errors
/// That of the first item that fails, in the order of the items, whatever the number of threads.
pub fn try_map<T: Send, R: Send, E: Send>(
    items: impl IntoIterator<Item = T>,
    work: impl Fn(T) -> Result<R, E> + Sync,
) -> Result<Vec<R>, E> {
    let first_failed = AtomicUsize::new(usize::MAX);
    let results = map(items.into_iter().enumerate(), |(index, item)| {
        if index > first_failed.load(Ordering::Relaxed) {
            return None;
        }
        let result = work(item);
        if result.is_err() {
            first_failed.fetch_min(index, Ordering::Relaxed);
        }
        Some(result)
    });
    // What was left out lies behind an error.
    results.into_iter().flatten().collect()
}

fn taken<T>(slot: &Mutex<Option<T>>) -> T {
    let mut item = slot.lock().expect("no work is done under this lock");
    item.take().expect("every index comes once")
}

/// The one place where threads share work: whatever is generic stays outside.
fn for_each_index(count: usize, work: &(dyn Fn(usize) + Sync)) {
    match count {
        0 => {}
        1 => work(0),
        _ => (0..count).into_par_iter().for_each(work),
    }
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use super::*;

    fn on_three_threads<R: Send>(run: impl FnOnce() -> R + Send) -> R {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build();
        pool.unwrap().install(run)
    }

    #[test]
    fn every_item_is_taken_once_and_results_keep_their_order() {
        for count in [0, 1, 2, 1000] {
            let doubled = on_three_threads(|| map(0..count, |x| 2 * x));
            assert_eq!(doubled, (0..count).map(|x| 2 * x).collect::<Vec<_>>());
            let mut seen = vec![0; count];
            on_three_threads(|| for_each(&mut seen, |seen| *seen += 1));
            assert_eq!(seen, vec![1; count]);
        }
    }

    #[test]
    fn the_first_error_is_returned_and_little_is_begun_behind_it() {
        for count in [1, 2, 1000] {
            assert_eq!(try_map(0..count, Ok::<_, ()>), Ok((0..count).collect()));
        }
        let begun = AtomicUsize::new(0);
        let work = |x: usize| {
            begun.fetch_add(1, Ordering::Relaxed);
            if x % 400 == 7 { Err(x) } else { Ok(x) }
        };
        assert_eq!(try_map(0..1000, work), Err(7));
        let one = rayon::ThreadPoolBuilder::new().num_threads(1).build();
        begun.store(0, Ordering::Relaxed);
        assert_eq!(one.unwrap().install(|| try_map(0..1000, work)), Err(7));
        assert_eq!(begun.load(Ordering::Relaxed), 8);
        for _ in 0..20 {
            assert_eq!(on_three_threads(|| try_map(0..1000, work)), Err(7));
        }
    }

    #[test]
    fn work_runs_in_the_current_pool() {
        let threads = on_three_threads(|| map(0..100, |_| rayon::current_num_threads()));
        assert_eq!(threads, [3; 100]);
    }

    #[test]
    fn a_panic_reaches_the_caller() {
        for count in [1, 100] {
            let work = |x| assert!(x + 1 < count, "the last");
            let run = || on_three_threads(|| for_each(0..count, work));
            let panic = catch_unwind(AssertUnwindSafe(run)).unwrap_err();
            assert_eq!(panic.downcast_ref(), Some(&"the last"));
        }
    }
}
