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

mod entry_point;
mod memory;

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::{Mutex, MutexGuard, PoisonError};

pub use entry_point::EntryPoint;
use memory::Memory;
use nemoconv_device::{
    Description, DeviceError, Driver, Family, Handle, Launch, Limits, Result, View,
};

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
                splits_floats: false,
                limits: Limits {
                    view_bytes: 1 << 30,
                    view_alignment: VIEW_ALIGNMENT,
                    allocation_bytes: 1 << 32,
                    memory_bytes: None,
                    group_threads: 1024,
                },
            },
            state: Mutex::default(),
        }
    }

    /// The same with views of so many bytes at most, so that operations come in parts.
    pub fn with_view_bytes(mut self, view_bytes: u64) -> Self {
        self.description.limits.view_bytes = view_bytes;
        self
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
        let name = launch.kernel.name;
        let missing = || refused("launch", &format!("no kernel `{name}` was compiled"));
        let entry = EntryPoint::find(name).ok_or_else(missing)?;
        fit(entry, launch)?;
        // Held until the kernel has run: calls happen in order, and no memory is freed under a kernel.
        let mut state = self.state();
        let mut pointers = Vec::new();
        for view in launch.views {
            pointers.push(state.pointer(view)?);
        }
        #[cfg(sanitized)]
        state.close_but(launch.views);
        let threads = launch.kernel.threads;
        // SAFETY: views and parameters fit the kernel; every view lies in memory that the lock keeps.
        let result = unsafe {
            entry.run(
                launch.grid(),
                threads,
                self.order,
                &mut pointers,
                launch.parameters,
            )
        };
        #[cfg(sanitized)]
        state.memories.values().for_each(Memory::open);
        result.map_err(|reason| refused("launch", &format!("kernel `{name}`: {reason}")))
    }
}

/// A kernel gets what it takes.
fn fit(entry: &EntryPoint, launch: &Launch) -> Result<()> {
    let taken = (entry.views(), entry.parameter_bytes());
    let given = (launch.views.len(), launch.parameters.len() * 4);
    match taken == given {
        true => Ok(()),
        false => Err(refused(
            "launch",
            &format!(
                "kernel `{}` takes {} views and {} bytes of parameters, found {} and {}",
                launch.kernel.name, taken.0, taken.1, given.0, given.1
            ),
        )),
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
