//! Copies between host and device, beside the kernels: a lane for what is brought, a stream for what is fetched, both through
//! pinned memory.
//!
//! Enters: bytes and addresses. Leaves: queued copies to the device, and bytes that came back from it. Knows addresses and no
//! allocations: what a copy has to wait for is the caller's to say.

use std::collections::VecDeque;
use std::ptr;

use cudarc::driver::result;
use cudarc::driver::sys::{self, CUdeviceptr, CUevent, CUstream};

use super::call::guarded;
use super::lane::{self, Lane};
use crate::error::Result;

/// Bytes of a part of a copy.
const PART_BYTES: usize = 8 << 20;
/// Parts that may be on their way while the host copies another.
const PARTS: usize = 4;

/// The way to the device, of one context, which must be current in every call.
#[derive(Debug)]
pub struct Uploads {
    pub lane: Lane,
    staging: Staging,
    next: usize,
}

/// The way back, likewise.
#[derive(Debug)]
pub struct Downloads {
    stream: CUstream,
    staging: Staging,
}

/// Parts of pinned memory, made when the first copy needs them.
#[derive(Debug, Default)]
struct Staging(Vec<Part>);

/// Pinned memory, free once its event is reached.
#[derive(Debug)]
struct Part {
    memory: *mut u8,
    copied: CUevent,
}

impl Uploads {
    pub fn new() -> Result<Self> {
        Ok(Self {
            lane: Lane::new()?,
            staging: Staging::default(),
            next: 0,
        })
    }

    /// Queues a copy to the device; the bytes are not needed any more afterwards.
    pub fn write(&mut self, address: CUdeviceptr, bytes: &[u8]) -> Result<()> {
        let parts = self.staging.parts()?;
        let (next, mut to) = (&mut self.next, address);
        self.lane.queue(|stream| {
            for chunk in bytes.chunks(PART_BYTES) {
                let part = &parts[*next];
                *next = (*next + 1) % PARTS;
                part.wait()?;
                part.send(stream, to, chunk)?;
                to += chunk.len() as u64;
            }
            Ok(())
        })
    }

    /// Gives everything back, after what was queued.
    pub fn release(&mut self) {
        self.lane.release();
        self.staging.release();
    }
}

impl Downloads {
    pub fn new() -> Result<Self> {
        Ok(Self {
            stream: lane::stream()?,
            staging: Staging::default(),
        })
    }

    /// What has to wait for the memory that is read next.
    pub fn stream(&self) -> CUstream {
        self.stream
    }

    /// Copies from the device, and returns when all bytes are there.
    pub fn read(&mut self, address: CUdeviceptr, bytes: &mut [u8]) -> Result<()> {
        let parts = self.staging.parts()?;
        let (mut from, mut on_their_way) = (address, VecDeque::new());
        for (chunk, part) in bytes.chunks_mut(PART_BYTES).zip(parts.iter().cycle()) {
            if on_their_way.len() == PARTS {
                on_their_way.pop_front().map_or(Ok(()), deliver)?;
            }
            part.fetch(self.stream, from, chunk.len())?;
            from += chunk.len() as u64;
            on_their_way.push_back((part, chunk));
        }
        on_their_way.into_iter().try_for_each(deliver)
    }

    /// Gives everything back, after what was queued.
    pub fn release(&mut self) {
        // What fails here has failed before, or the process ends.
        // SAFETY: the stream is alive.
        let _ = guarded("cuStreamSynchronize", || unsafe {
            result::stream::synchronize(self.stream)
        });
        lane::destroy_stream(self.stream);
        self.staging.release();
    }
}

/// Waits for a part of a download.
fn deliver((part, chunk): (&Part, &mut [u8])) -> Result<()> {
    part.wait()?;
    // SAFETY: the part holds PART_BYTES, to which a chunk was copied, and no copy writes them now that its event is reached.
    unsafe { ptr::copy_nonoverlapping(part.memory, chunk.as_mut_ptr(), chunk.len()) };
    Ok(())
}

impl Staging {
    /// All parts.
    fn parts(&mut self) -> Result<&[Part]> {
        while self.0.len() < PARTS {
            self.0.push(Part::new()?);
        }
        Ok(&self.0)
    }

    /// Gives them back; no copy may be on its way.
    fn release(&mut self) {
        for part in self.0.drain(..) {
            // SAFETY: allocated by `Part::new`, freed once. What fails here has failed before, or the process ends.
            let _ = guarded("cuMemFreeHost", || unsafe {
                result::free_host(part.memory.cast())
            });
            lane::destroy_event(part.copied);
        }
    }
}

impl Part {
    fn new() -> Result<Self> {
        // SAFETY: freed by `Staging::release`.
        let memory = guarded("cuMemHostAlloc", || unsafe {
            result::malloc_host(PART_BYTES, 0)
        })?;
        Ok(Self {
            memory: memory.cast(),
            copied: lane::event()?,
        })
    }

    /// Waits until no copy uses it.
    fn wait(&self) -> Result<()> {
        // SAFETY: the event is alive; one that was never recorded counts as reached.
        guarded("cuEventSynchronize", || unsafe {
            result::event::synchronize(self.copied)
        })
    }

    /// Queues a copy of at most [`PART_BYTES`] to the device; no other copy may use the part.
    fn send(&self, stream: CUstream, to: CUdeviceptr, chunk: &[u8]) -> Result<()> {
        // SAFETY: the part holds so many bytes, and no copy reads them.
        let pinned = unsafe {
            ptr::copy_nonoverlapping(chunk.as_ptr(), self.memory, chunk.len());
            std::slice::from_raw_parts(self.memory, chunk.len())
        };
        // SAFETY: the caller answers for the address; the part stays as it is until its event is reached.
        guarded("cuMemcpyHtoDAsync", || unsafe {
            result::memcpy_htod_async(to, pinned, stream)
        })?;
        lane::record(self.copied, stream)
    }

    /// Queues a copy of at most [`PART_BYTES`] from the device; what came before was delivered.
    fn fetch(&self, stream: CUstream, from: CUdeviceptr, bytes: usize) -> Result<()> {
        // SAFETY: the caller answers for the address; the part holds so many bytes, and nothing reads them until its event is
        // reached.
        guarded("cuMemcpyDtoHAsync", || unsafe {
            sys::cuMemcpyDtoHAsync_v2(self.memory.cast(), from, bytes, stream).result()
        })?;
        lane::record(self.copied, stream)
    }
}
