//! Streams whose operations are counted, so that one can wait for what another has queued, and for no more than that.
//!
//! Enters: calls that queue something. Leaves: the same, with an event behind each. Knows neither memory nor kernels.

use cudarc::driver::result;
use cudarc::driver::sys::{CUevent, CUevent_flags, CUevent_wait_flags, CUstream};

use super::call::guarded;
use crate::error::Result;

/// Operations that can be told apart; those before are waited for together.
const MARKS: usize = 1024;

/// A stream of a context, which must be current in every call.
#[derive(Debug)]
pub struct Lane {
    stream: CUstream,
    /// Operations so far, counted from 1.
    queued: u64,
    /// Reached when an operation is done: those of the last ones, each at its [`slot`].
    marks: Vec<CUevent>,
    /// Operations of the other lane that this one waits for.
    joined: u64,
}

/// Where the mark of an operation is.
fn slot(operation: u64) -> usize {
    ((operation - 1) % MARKS as u64) as usize
}

impl Lane {
    pub fn new() -> Result<Self> {
        Ok(Self {
            stream: stream()?,
            queued: 0,
            marks: Vec::new(),
            joined: 0,
        })
    }

    pub fn stream(&self) -> CUstream {
        self.stream
    }

    /// The operation that is queued next.
    pub fn next(&self) -> u64 {
        self.queued + 1
    }

    /// Queues an operation on the stream that it is given, and its mark behind it.
    pub fn queue<T>(&mut self, operation: impl FnOnce(CUstream) -> Result<T>) -> Result<T> {
        let slot = slot(self.next());
        if slot == self.marks.len() {
            self.marks.push(event()?);
        }
        self.queued = self.next();
        let result = operation(self.stream);
        // Behind one that failed too, which may have queued a part.
        let marked = record(self.marks[slot], self.stream);
        let value = result?;
        marked?;
        Ok(value)
    }

    /// Makes this lane wait for an operation of the other one.
    pub fn join(&mut self, other: &Self, operation: u64) -> Result<()> {
        let operation = operation.min(other.queued);
        if operation > self.joined {
            other.hold(self.stream, operation)?;
            self.joined = operation;
        }
        Ok(())
    }

    /// Makes a stream wait for an operation of this lane; number 0 is done.
    pub fn hold(&self, stream: CUstream, operation: u64) -> Result<()> {
        if operation == 0 {
            return Ok(());
        }
        let first_marked = self.next().saturating_sub(MARKS as u64);
        let operation = operation.max(first_marked).min(self.queued);
        let flags = CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: stream and event are alive.
        guarded("cuStreamWaitEvent", || unsafe {
            result::stream::wait_event(stream, self.marks[slot(operation)], flags)
        })
    }

    /// Waits until everything is done.
    pub fn synchronize(&self) -> Result<()> {
        // SAFETY: the stream is alive.
        guarded("cuStreamSynchronize", || unsafe {
            result::stream::synchronize(self.stream)
        })
    }

    /// Gives stream and events back, after what was queued.
    pub fn release(&mut self) {
        // What fails here has failed before, or the process ends.
        let _ = self.synchronize();
        self.marks.drain(..).for_each(destroy_event);
        destroy_stream(self.stream);
    }
}

pub fn stream() -> Result<CUstream> {
    guarded("cuStreamCreate", || {
        result::stream::create(result::stream::StreamKind::NonBlocking)
    })
}

pub fn event() -> Result<CUevent> {
    guarded("cuEventCreate", || {
        result::event::create(CUevent_flags::CU_EVENT_DISABLE_TIMING)
    })
}

/// Has an event reached when what the stream holds so far is done.
pub fn record(event: CUevent, stream: CUstream) -> Result<()> {
    // SAFETY: stream and event are alive.
    guarded("cuEventRecord", || unsafe {
        result::event::record(event, stream)
    })
}

/// What fails here has failed before, or the process ends.
pub fn destroy_event(event: CUevent) {
    // SAFETY: created by `event`, destroyed once.
    let _ = guarded("cuEventDestroy", || unsafe {
        result::event::destroy(event)
    });
}

/// What fails here has failed before, or the process ends.
pub fn destroy_stream(stream: CUstream) {
    // SAFETY: created by `stream`, destroyed once.
    let _ = guarded("cuStreamDestroy", || unsafe {
        result::stream::destroy(stream)
    });
}
