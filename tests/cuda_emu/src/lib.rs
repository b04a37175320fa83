//! Runs the CUDA kernels of `nemoconv-device` as C++ on the processor, one fiber per CUDA thread.
//!
//! Enters: launches with the arguments that `cuLaunchKernel` would get. Leaves: what a GPU would have written, or the
//! defect that was found: barriers that not all threads of a group reach, results that depend on the [`Order`] of
//! threads, and with sanitizers what leaves its memory. Proves indices, bounds, barriers and arithmetic; neither speed
//! nor what depends on the memory order between groups.
//!
//! With sanitizers, which must be loaded first:
//!
//! ```text
//! NEMOCONV_EMU_SANITIZE=1 \
//! CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER="env LD_PRELOAD=$(gcc -print-file-name=libasan.so)" \
//! ASAN_OPTIONS=detect_leaks=0 cargo test -p nemoconv-cuda-emu
//! ```

mod memory;

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::{Mutex, MutexGuard, PoisonError};

use memory::Memory;
use nemoconv_device::{
    Description, DeviceError, Driver, Family, Handle, Launch, Limits, Result, View,
};

include!(concat!(env!("OUT_DIR"), "/entries.rs"));

/// In which order the threads of a group run between barriers. Correct kernels give the same bits for each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// From the first to the last.
    Ascending,
    /// From the last to the first.
    Descending,
    /// Neighbours far from each other.
    Strided,
}

impl Order {
    /// Every order.
    pub const ALL: [Self; 3] = [Self::Ascending, Self::Descending, Self::Strided];
}

/// A processor that stands in for a CUDA device.
#[derive(Debug)]
pub struct Emulator {
    order: Order,
    description: Description,
    state: Mutex<State>,
}

/// What has been allocated.
#[derive(Debug, Default)]
struct State {
    memories: HashMap<Handle, Memory>,
    allocated: u64,
}

/// Whether this build has the sanitizers.
pub const IS_SANITIZED: bool = cfg!(sanitized);

/// Where views may begin.
const VIEW_ALIGNMENT: u64 = 256;

impl Emulator {
    /// A device without memory in use.
    pub fn new(order: Order) -> Self {
        Self {
            order,
            description: Description {
                family: Family::Cuda,
                name: "CUDA emulator".to_owned(),
                detail: format!("C++ on the processor, threads {order:?}").to_lowercase(),
                is_software: true,
                limits: Limits {
                    view_bytes: 1 << 30,
                    view_alignment: VIEW_ALIGNMENT,
                    allocation_bytes: 1 << 32,
                    memory_bytes: None,
                },
            },
            state: Mutex::default(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Driver for Emulator {
    fn description(&self) -> &Description {
        &self.description
    }

    fn allocate(&self, bytes: u64) -> Result<Handle> {
        let mut state = self.state();
        state.allocated += 1;
        let handle = Handle(state.allocated);
        let memory =
            Memory::new(bytes, VIEW_ALIGNMENT).ok_or(DeviceError::OutOfMemory { bytes })?;
        state.memories.insert(handle, memory);
        Ok(handle)
    }

    fn free(&self, memory: Handle) {
        self.state().memories.remove(&memory);
    }

    fn write(&self, memory: Handle, offset: u64, bytes: &[u8]) -> Result<()> {
        let mut state = self.state();
        let part = state.part("write", memory, offset, bytes.len() as u64)?;
        part.copy_from_slice(bytes);
        Ok(())
    }

    fn read(&self, memory: Handle, offset: u64, bytes: &mut [u8]) -> Result<()> {
        let mut state = self.state();
        let part = state.part("read", memory, offset, bytes.len() as u64)?;
        bytes.copy_from_slice(part);
        Ok(())
    }

    fn copy(
        &self,
        from: Handle,
        from_offset: u64,
        to: Handle,
        to_offset: u64,
        bytes: u64,
    ) -> Result<()> {
        let mut state = self.state();
        if from == to {
            return Err(refused("copy", "within one allocation"));
        }
        let copied = state.part("copy", from, from_offset, bytes)?.to_vec();
        state
            .part("copy", to, to_offset, bytes)?
            .copy_from_slice(&copied);
        Ok(())
    }

    fn clear(&self, memory: Handle, offset: u64, bytes: u64) -> Result<()> {
        self.state().part("clear", memory, offset, bytes)?.fill(0);
        Ok(())
    }

    fn launch(&self, launch: &Launch) -> Result<()> {
        let entry = entry_of(launch.kernel.name)?;
        // Held until the kernel has run: calls happen in order, and no memory is freed under a kernel.
        let mut state = self.state();
        let mut pointers = Vec::new();
        for view in launch.views {
            pointers.push(state.pointer(view)?);
        }
        #[cfg(sanitized)]
        state.close_but(launch.views);
        let result = run(entry, launch, self.order, &mut pointers);
        #[cfg(sanitized)]
        state.memories.values().for_each(Memory::open);
        result
    }
}

impl State {
    /// Kernels may touch their views, and nothing else.
    #[cfg(sanitized)]
    fn close_but(&self, views: &[View]) {
        for (handle, memory) in &self.memories {
            let own = views.iter().filter(|view| view.memory == *handle);
            memory.close_but(own.map(|view| (view.offset, view.bytes)));
        }
    }

    fn part(
        &mut self,
        call: &'static str,
        memory: Handle,
        offset: u64,
        bytes: u64,
    ) -> Result<&mut [u8]> {
        let memory = self.memories.get_mut(&memory);
        let memory = memory.ok_or_else(|| refused(call, "no such memory"))?;
        memory
            .part(offset, bytes)
            .ok_or_else(|| refused(call, "beyond the end of the memory"))
    }

    fn pointer(&mut self, view: &View) -> Result<*mut c_void> {
        if !view.offset.is_multiple_of(VIEW_ALIGNMENT)
            || !view.bytes.is_multiple_of(4)
            || view.bytes == 0
        {
            return Err(refused("launch", "a view that is empty or not aligned"));
        }
        let part = self.part("launch", view.memory, view.offset, view.bytes)?;
        Ok(part.as_mut_ptr().cast())
    }
}

fn refused(call: &'static str, reason: &str) -> DeviceError {
    DeviceError::Call {
        call,
        reason: reason.to_owned(),
    }
}

/// `dim3` of the header.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct Dim3 {
    x: u32,
    y: u32,
    z: u32,
}

/// `emulator::Request` of the header.
#[derive(Debug)]
#[repr(C)]
struct Request {
    grid: Dim3,
    threads: u32,
    order: u32,
    arguments: *mut *mut c_void,
    views: usize,
    parameter_bytes: usize,
    message: *mut u8,
    message_bytes: usize,
}

type Entry = unsafe extern "C" fn(request: *const Request) -> bool;

/// Longest text of an error.
const MESSAGE_BYTES: usize = 512;

fn entry_of(name: &str) -> Result<Entry> {
    let found = ENTRIES.iter().find(|(other, _)| *other == name);
    let missing = || refused("launch", &format!("no kernel `{name}` was compiled"));
    found.map(|(_, entry)| *entry).ok_or_else(missing)
}

fn run(entry: Entry, launch: &Launch, order: Order, pointers: &mut [*mut c_void]) -> Result<()> {
    let mut parameters = launch.parameters.to_vec();
    // As for cuLaunchKernel: a pointer to each argument.
    let mut arguments: Vec<*mut c_void> =
        pointers.iter_mut().map(|p| (&raw mut *p).cast()).collect();
    arguments.push(parameters.as_mut_ptr().cast());
    let [x, y] = launch.grid();
    let mut message = [0; MESSAGE_BYTES];
    let request = Request {
        grid: Dim3 { x, y, z: 1 },
        threads: launch.kernel.threads,
        order: order as u32,
        arguments: arguments.as_mut_ptr(),
        views: pointers.len(),
        parameter_bytes: parameters.len() * 4,
        message: message.as_mut_ptr(),
        message_bytes: message.len(),
    };
    // SAFETY: the request has the layout of the header; the launcher compares the number of views and the size of the
    // structure with the kernel's before it reads them; every view lies in memory that the caller keeps.
    if unsafe { entry(&raw const request) } {
        return Ok(());
    }
    let text = message.split(|byte| *byte == 0).next().unwrap_or_default();
    let text = String::from_utf8_lossy(text);
    Err(refused(
        "launch",
        &format!("kernel `{}`: {text}", launch.kernel.name),
    ))
}
