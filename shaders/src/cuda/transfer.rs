//! The two streams of a device: one computes, one brings what no kernel has seen yet, through pinned memory.
//!
//! Enters: bytes and addresses. Leaves: queued copies. Knows addresses and no allocations.

use std::ptr;

use cudarc::driver::result;
use cudarc::driver::sys::{CUdeviceptr, CUevent, CUevent_flags, CUevent_wait_flags, CUstream};

use super::call::guarded;
use crate::error::Result;

/// Bytes of a part of an upload.
const PART_BYTES: usize = 8 << 20;
/// Parts that may be on their way while the next is filled.
const PARTS: usize = 4;

/// Streams of one context, which must be current in every call.
#[derive(Debug)]
pub struct Streams {
    /// Where kernels run.
    pub compute: CUstream,
    /// Where memory that no kernel has seen is filled, beside the kernels.
    pub upload: CUstream,
    /// Reached when the uploads so far are done.
    uploaded: CUevent,
    has_uploads: bool,
    parts: Vec<Part>,
    next: usize,
}

/// Pinned memory, free once its event is reached.
#[derive(Debug)]
struct Part {
    memory: *mut u8,
    copied: CUevent,
}

impl Streams {
    pub fn new() -> Result<Self> {
        let stream = || {
            guarded("cuStreamCreate", || {
                result::stream::create(result::stream::StreamKind::NonBlocking)
            })
        };
        Ok(Self {
            compute: stream()?,
            upload: stream()?,
            uploaded: event()?,
            has_uploads: false,
            parts: Vec::new(),
            next: 0,
        })
    }

    /// Says that something was queued on the upload stream: what is computed from now on waits for it.
    pub fn note_upload(&mut self) {
        self.has_uploads = true;
    }

    /// Makes the compute stream wait for the uploads so far.
    pub fn join(&mut self) -> Result<()> {
        if !self.has_uploads {
            return Ok(());
        }
        // SAFETY: stream and event are alive.
        guarded("cuEventRecord", || unsafe {
            result::event::record(self.uploaded, self.upload)
        })?;
        let flags = CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: stream and event are alive.
        guarded("cuStreamWaitEvent", || unsafe {
            result::stream::wait_event(self.compute, self.uploaded, flags)
        })?;
        self.has_uploads = false;
        Ok(())
    }

    /// Waits until both are done.
    pub fn synchronize(&self) -> Result<()> {
        for stream in [self.upload, self.compute] {
            // SAFETY: the stream is alive.
            guarded("cuStreamSynchronize", || unsafe {
                result::stream::synchronize(stream)
            })?;
        }
        Ok(())
    }

    /// Queues a copy to the device; the bytes are not needed any more afterwards.
    pub fn write(&mut self, stream: CUstream, address: CUdeviceptr, bytes: &[u8]) -> Result<()> {
        self.make_parts()?;
        let mut to = address;
        for chunk in bytes.chunks(PART_BYTES) {
            let part = &self.parts[self.next];
            self.next = (self.next + 1) % PARTS;
            // SAFETY: the event is alive; one that was never recorded counts as reached.
            guarded("cuEventSynchronize", || unsafe {
                result::event::synchronize(part.copied)
            })?;
            // SAFETY: the part holds PART_BYTES, and no copy reads it now that its event is reached.
            let pinned = unsafe {
                ptr::copy_nonoverlapping(chunk.as_ptr(), part.memory, chunk.len());
                std::slice::from_raw_parts(part.memory, chunk.len())
            };
            // SAFETY: the caller answers for the address; the part stays as it is until its event is reached.
            guarded("cuMemcpyHtoDAsync", || unsafe {
                result::memcpy_htod_async(to, pinned, stream)
            })?;
            // SAFETY: stream and event are alive.
            guarded("cuEventRecord", || unsafe {
                result::event::record(part.copied, stream)
            })?;
            to += chunk.len() as u64;
        }
        Ok(())
    }

    fn make_parts(&mut self) -> Result<()> {
        while self.parts.len() < PARTS {
            // SAFETY: freed when this value is released.
            let memory = guarded("cuMemHostAlloc", || unsafe {
                result::malloc_host(PART_BYTES, 0)
            })?;
            self.parts.push(Part {
                memory: memory.cast(),
                copied: event()?,
            });
        }
        Ok(())
    }

    /// Gives everything back, after what was queued.
    pub fn release(&mut self) {
        // What fails here has failed before, or the process ends.
        let _ = self.synchronize();
        for part in self.parts.drain(..) {
            // SAFETY: allocated here, and no copy is on its way.
            let _ = guarded("cuMemFreeHost", || unsafe {
                result::free_host(part.memory.cast())
            });
            // SAFETY: created here, destroyed once.
            let _ = guarded("cuEventDestroy", || unsafe {
                result::event::destroy(part.copied)
            });
        }
        // SAFETY: created here, destroyed once.
        let _ = guarded("cuEventDestroy", || unsafe {
            result::event::destroy(self.uploaded)
        });
        for stream in [self.upload, self.compute] {
            // SAFETY: created here, destroyed once.
            let _ = guarded("cuStreamDestroy", || unsafe {
                result::stream::destroy(stream)
            });
        }
    }
}

fn event() -> Result<CUevent> {
    guarded("cuEventCreate", || {
        result::event::create(CUevent_flags::CU_EVENT_DISABLE_TIMING)
    })
}
