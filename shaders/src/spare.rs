//! What lies on a device only as long as nothing else needs its memory.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

/// A value that gives way where memory is short, unless somebody uses it at the time.
pub struct Spare<T>(Arc<Slot<T>>);

struct Slot<T>(Mutex<Option<Arc<T>>>);

impl<T> Slot<T> {
    fn value(&self) -> MutexGuard<'_, Option<Arc<T>>> {
        // It is there or not, whatever another thread did.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T> Spare<T> {
    /// The value, which stays while this is held; `None` once it gave way.
    pub fn get(&self) -> Option<Arc<T>> {
        self.0.value().clone()
    }
}

trait GivesWay: Send + Sync {
    /// Drops the value; `false` where there is none, or it is used.
    fn give_way(&self) -> bool;
}

impl<T: Send + Sync> GivesWay for Slot<T> {
    fn give_way(&self) -> bool {
        let mut value = self.value();
        let is_idle = value
            .as_ref()
            .is_some_and(|value| Arc::strong_count(value) == 1);
        is_idle && value.take().is_some()
    }
}

/// All that can give way on a device, in the order in which it came.
#[derive(Default)]
pub(crate) struct Spares {
    slots: Mutex<Vec<Weak<dyn GivesWay>>>,
    given_up: AtomicU64,
}

impl Spares {
    pub(crate) fn keep<T: Send + Sync + 'static>(&self, value: T) -> Spare<T> {
        let slot = Arc::new(Slot(Mutex::new(Some(Arc::new(value)))));
        let weak: Weak<dyn GivesWay> = Arc::downgrade(&(Arc::clone(&slot) as Arc<dyn GivesWay>));
        let mut slots = self.slots();
        slots.retain(|slot| slot.strong_count() > 0);
        slots.push(weak);
        Spare(slot)
    }

    /// Gives up what came last and is not used: what is read in turn, again and again, keeps most of itself that way. `false`
    /// where there is nothing.
    pub(crate) fn give_up_one(&self) -> bool {
        let slots = self.slots().clone();
        let found = slots
            .iter()
            .rev()
            .filter_map(Weak::upgrade)
            .any(|slot| slot.give_way());
        self.given_up.fetch_add(u64::from(found), Ordering::Relaxed);
        found
    }

    /// How many gave way so far.
    pub(crate) fn given_up(&self) -> u64 {
        self.given_up.load(Ordering::Relaxed)
    }

    fn slots(&self) -> MutexGuard<'_, Vec<Weak<dyn GivesWay>>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_used_stays_and_the_last_goes_first() {
        let spares = Spares::default();
        let [first, second, third] = [1, 2, 3].map(|value| spares.keep(value));
        let used = third.get();
        assert!(spares.give_up_one());
        assert_eq!((first.get().as_deref(), second.get()), (Some(&1), None));
        assert!(spares.give_up_one() && first.get().is_none());
        assert!(!spares.give_up_one() && third.get() == used);
        drop(used);
        assert!(spares.give_up_one() && third.get().is_none());
        assert_eq!(spares.given_up(), 3);
    }

    #[test]
    fn what_was_dropped_is_not_there() {
        let spares = Spares::default();
        drop(spares.keep(1));
        assert!(!spares.give_up_one());
    }
}
