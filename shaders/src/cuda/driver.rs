//! An open CUDA device.
//!
//! Enters: launches and copies, from any thread. Leaves: results, in the order of the calls. One lock orders them all;
//! kernels and uploads of new memory overlap on the device.

use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::sync::{Mutex, MutexGuard, PoisonError};

use cudarc::driver::result;
use cudarc::driver::sys::{self, CUcontext, CUdevice, CUdeviceptr, CUfunction, CUmodule};

use super::blas::{self, Blas};
use super::cache::Cache;
use super::call::{guarded, is_out_of_memory};
use super::transfer::Streams;
use super::{Found, compiler};
use crate::driver::{Description, Driver, Handle, Launch, View};
use crate::error::{DeviceError, Result};
use crate::kernels::Kernel;
use crate::ops::MatmulLayout;

/// A device with its context.
#[derive(Debug)]
pub struct Cuda {
    description: Description,
    device: CUdevice,
    context: CUcontext,
    /// Such as `sm_90`.
    architecture: String,
    has_pools: bool,
    cache: Cache,
    state: Mutex<State>,
}

// SAFETY: the driver's handles may be used from every thread in which their context is current, which each call sees to.
unsafe impl Send for Cuda {}
// SAFETY: everything that changes is behind a lock.
unsafe impl Sync for Cuda {}

#[derive(Debug)]
struct State {
    streams: Streams,
    memories: HashMap<Handle, Allocation>,
    allocated: u64,
    functions: HashMap<&'static str, CUfunction>,
    modules: Vec<CUmodule>,
    blas: Looked,
}

/// cuBLAS, opened for the first product that is large enough.
#[derive(Debug)]
enum Looked {
    NotYet,
    Absent,
    Found(Blas),
}

/// Memory. Handles are counted, and not addresses: those come again.
#[derive(Debug)]
struct Allocation {
    address: CUdeviceptr,
    bytes: u64,
    /// Nothing on the compute stream has named it.
    is_fresh: bool,
}

impl Cuda {
    pub fn new(found: &Found, architecture: String) -> Result<Self> {
        // SAFETY: the device is one of the driver's.
        let context = guarded("cuDevicePrimaryCtxRetain", || unsafe {
            result::primary_ctx::retain(found.device)
        })?;
        make_current(context)?;
        if found.has_pools {
            keep_freed_memory(found.device)?;
        }
        Ok(Self {
            description: found.description(),
            device: found.device,
            context,
            architecture,
            has_pools: found.has_pools,
            cache: Cache::of_user(),
            state: Mutex::new(State {
                streams: Streams::new()?,
                memories: HashMap::new(),
                allocated: 0,
                functions: HashMap::new(),
                modules: Vec::new(),
                blas: Looked::NotYet,
            }),
        })
    }

    /// The state, with the context current in this thread.
    fn enter(&self) -> Result<MutexGuard<'_, State>> {
        make_current(self.context)?;
        Ok(self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn try_allocate(&self, state: &mut State, bytes: u64) -> Result<Option<CUdeviceptr>> {
        let count = usize::try_from(bytes).map_err(|_| DeviceError::OutOfMemory { bytes })?;
        let allocated = guarded("cuMemAlloc", || {
            // SAFETY: the stream is alive and the context current; the memory is freed by `release_memory`.
            let address = unsafe {
                match self.has_pools {
                    true => result::malloc_async(state.streams.upload, count),
                    false => result::malloc_sync(count),
                }
            };
            match address {
                Ok(address) => Ok(Some(address)),
                Err(error) if is_out_of_memory(&error) => Ok(None),
                Err(error) => Err(error),
            }
        })?;
        state.streams.note_upload();
        Ok(allocated)
    }

    fn release_memory(&self, state: &mut State, address: CUdeviceptr) -> Result<()> {
        if self.has_pools {
            state.streams.join()?;
            // SAFETY: an address of this device, freed once: it has just been taken from the table.
            return guarded("cuMemFreeAsync", || unsafe {
                result::free_async(address, state.streams.compute)
            });
        }
        state.streams.synchronize()?;
        // SAFETY: as above, and nothing that is queued uses it.
        guarded("cuMemFree", || unsafe { result::free_sync(address) })
    }

    /// Gives memory that was freed back to the device.
    fn trim(&self, state: &State) -> Result<()> {
        state.streams.synchronize()?;
        if self.has_pools {
            // SAFETY: the device is one of the driver's.
            let pool = guarded("cuDeviceGetMemPool", || unsafe {
                result::device::get_mem_pool(self.device)
            })?;
            // SAFETY: the pool of the device, alive as long as it is.
            guarded("cuMemPoolTrimTo", || unsafe {
                result::mem_pool::trim_to(pool, 0)
            })?;
        }
        Ok(())
    }

    fn function(&self, state: &mut State, kernel: &'static Kernel) -> Result<CUfunction> {
        if let Some(function) = state.functions.get(kernel.name) {
            return Ok(*function);
        }
        let module = self.module(kernel)?;
        state.modules.push(module);
        let name = CString::new(kernel.name).unwrap_or_default();
        // SAFETY: the module stays loaded as long as the device is open.
        let function = guarded("cuModuleGetFunction", || unsafe {
            result::module::get_function(module, name)
        })?;
        state.functions.insert(kernel.name, function);
        Ok(function)
    }

    fn module(&self, kernel: &'static Kernel) -> Result<CUmodule> {
        let text = kernel.cuda_text();
        let (major, minor) = compiler::version()?;
        let version = format!("{major}.{minor}");
        let mut ingredients = vec![text.as_str(), &self.architecture, &version];
        ingredients.extend(compiler::OPTIONS);
        let compile = || Ok(compiler::compile(&text, kernel.name, &self.architecture)?.cubin);
        if let Ok(module) = load(&self.cache.get_or(&ingredients, compile)?) {
            return Ok(module);
        }
        // What was kept may be of no use for this driver.
        self.cache.forget(&ingredients);
        load(&self.cache.get_or(&ingredients, compile)?)
    }
}

fn make_current(context: CUcontext) -> Result<()> {
    // SAFETY: the context is retained as long as the device is open.
    guarded("cuCtxSetCurrent", || unsafe {
        result::ctx::set_current(context)
    })
}

/// Else memory goes back to the system whenever the device is waited for, and has to be mapped again.
fn keep_freed_memory(device: CUdevice) -> Result<()> {
    // SAFETY: the device is one of the driver's.
    let pool = guarded("cuDeviceGetMemPool", || unsafe {
        result::device::get_mem_pool(device)
    })?;
    let mut threshold = u64::MAX;
    let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
    // SAFETY: the attribute is a number of 64 bits, which outlives the call.
    guarded("cuMemPoolSetAttribute", || unsafe {
        result::mem_pool::set_attribute(pool, attribute, (&raw mut threshold).cast())
    })
}

fn load(cubin: &[u8]) -> Result<CUmodule> {
    // SAFETY: machine code that says itself how long it is, whole: it comes from the compiler or has its checksum.
    guarded("cuModuleLoadData", || unsafe {
        result::module::load_data(cubin.as_ptr().cast())
    })
}

impl State {
    fn blas(&mut self) -> Option<&Blas> {
        if matches!(self.blas, Looked::NotYet) {
            self.blas = Blas::open(self.streams.compute).map_or(Looked::Absent, Looked::Found);
        }
        match &self.blas {
            Looked::Found(blas) => Some(blas),
            _ => None,
        }
    }

    /// Queues a product on cuBLAS, which must be there.
    fn multiply(&mut self, layout: &MatmulLayout, views: &[View; 3]) -> Result<()> {
        let firsts = [layout.a[0], layout.b[0], layout.out[0]];
        let addresses = self.addresses(views)?;
        let at = |i: usize| addresses[i] + 4 * firsts[i] as u64;
        match &self.blas {
            // SAFETY: views lie in memory that is freed after what is queued before, and layouts in their views.
            Looked::Found(blas) => unsafe { blas.multiply(layout, [at(0), at(1), at(2)]) },
            _ => Ok(()),
        }
    }

    /// The address of some bytes of an allocation.
    fn part(
        &mut self,
        call: &'static str,
        memory: Handle,
        offset: u64,
        bytes: u64,
    ) -> Result<(CUdeviceptr, &mut Allocation)> {
        let allocation = self.memories.get_mut(&memory);
        let allocation = allocation.filter(|allocation| {
            offset
                .checked_add(bytes)
                .is_some_and(|end| end <= allocation.bytes)
        });
        let allocation = allocation.ok_or_else(|| DeviceError::Call {
            call,
            reason: "the memory is not there, or ends before".to_owned(),
        })?;
        Ok((allocation.address + offset, allocation))
    }

    /// The same, to be used by the compute stream.
    fn computed_part(
        &mut self,
        call: &'static str,
        memory: Handle,
        offset: u64,
        bytes: u64,
    ) -> Result<CUdeviceptr> {
        self.streams.join()?;
        let (address, allocation) = self.part(call, memory, offset, bytes)?;
        allocation.is_fresh = false;
        Ok(address)
    }

    fn addresses(&mut self, views: &[View]) -> Result<Vec<CUdeviceptr>> {
        let address = |view: &View| {
            self.computed_part("cuLaunchKernel", view.memory, view.offset, view.bytes)
        };
        views.iter().map(address).collect()
    }
}

impl Driver for Cuda {
    fn description(&self) -> &Description {
        &self.description
    }

    fn allocate(&self, bytes: u64) -> Result<Handle> {
        let mut state = self.enter()?;
        let mut address = self.try_allocate(&mut state, bytes)?;
        if address.is_none() {
            self.trim(&state)?;
            address = self.try_allocate(&mut state, bytes)?;
        }
        let allocation = Allocation {
            address: address.ok_or(DeviceError::OutOfMemory { bytes })?,
            bytes,
            is_fresh: true,
        };
        state.allocated += 1;
        let handle = Handle(state.allocated);
        state.memories.insert(handle, allocation);
        Ok(handle)
    }

    fn free(&self, memory: Handle) {
        let Ok(mut state) = self.enter() else {
            return;
        };
        if let Some(allocation) = state.memories.remove(&memory) {
            // A device that was lost says so in the next call that can.
            let _ = self.release_memory(&mut state, allocation.address);
        }
    }

    fn write(&self, memory: Handle, offset: u64, bytes: &[u8]) -> Result<()> {
        let mut state = self.enter()?;
        let (address, allocation) =
            state.part("cuMemcpyHtoD", memory, offset, bytes.len() as u64)?;
        if allocation.is_fresh {
            let upload = state.streams.upload;
            state.streams.note_upload();
            return state.streams.write(upload, address, bytes);
        }
        state.streams.join()?;
        let compute = state.streams.compute;
        state.streams.write(compute, address, bytes)
    }

    fn read(&self, memory: Handle, offset: u64, bytes: &mut [u8]) -> Result<()> {
        let mut state = self.enter()?;
        let (address, _) = state.part("cuMemcpyDtoH", memory, offset, bytes.len() as u64)?;
        state.streams.join()?;
        let compute = state.streams.compute;
        // SAFETY: the bytes are there on both sides, and the copy is waited for before this returns.
        guarded("cuMemcpyDtoHAsync", || unsafe {
            result::memcpy_dtoh_async(bytes, address, compute)
        })?;
        // SAFETY: the stream is alive.
        guarded("cuStreamSynchronize", || unsafe {
            result::stream::synchronize(compute)
        })
    }

    fn copy(
        &self,
        from: Handle,
        from_offset: u64,
        to: Handle,
        to_offset: u64,
        bytes: u64,
    ) -> Result<()> {
        let mut state = self.enter()?;
        let from = state.computed_part("cuMemcpyDtoD", from, from_offset, bytes)?;
        let to = state.computed_part("cuMemcpyDtoD", to, to_offset, bytes)?;
        let (compute, count) = (state.streams.compute, bytes as usize);
        // SAFETY: the bytes are there in both allocations, which are not the same.
        guarded("cuMemcpyDtoDAsync", || unsafe {
            result::memcpy_dtod_async(to, from, count, compute)
        })
    }

    fn clear(&self, memory: Handle, offset: u64, bytes: u64) -> Result<()> {
        let mut state = self.enter()?;
        let address = state.computed_part("cuMemsetD8", memory, offset, bytes)?;
        let (compute, count) = (state.streams.compute, bytes as usize);
        // SAFETY: the bytes are there.
        guarded("cuMemsetD8Async", || unsafe {
            result::memset_d8_async(address, 0, count, compute)
        })
    }

    fn launch(&self, launch: &Launch) -> Result<()> {
        let mut state = self.enter()?;
        let function = self.function(&mut state, launch.kernel)?;
        let mut addresses = state.addresses(launch.views)?;
        let mut parameters = launch.parameters.to_vec();
        let mut arguments: Vec<*mut c_void> =
            addresses.iter_mut().map(|a| (&raw mut *a).cast()).collect();
        arguments.push(parameters.as_mut_ptr().cast());
        let [x, y] = launch.grid();
        let (threads, compute) = (launch.kernel.threads, state.streams.compute);
        // SAFETY: as many pointers as the kernel takes, then its structure, which the call copies; every view lies in memory
        // that is freed after what is queued before.
        guarded("cuLaunchKernel", || unsafe {
            result::launch_kernel(
                function,
                (x, y, 1),
                (threads, 1, 1),
                0,
                compute,
                &mut arguments,
            )
        })
    }

    fn gemm(&self, layout: &MatmulLayout, views: &[View; 3]) -> Option<Result<()>> {
        if !blas::fits(layout) {
            return None;
        }
        let mut state = match self.enter() {
            Ok(state) => state,
            Err(error) => return Some(Err(error)),
        };
        state.blas()?;
        Some(state.multiply(layout, views))
    }
}

impl Drop for Cuda {
    fn drop(&mut self) {
        // What fails here has failed before, or the process ends.
        if let Ok(mut state) = self.enter() {
            for allocation in std::mem::take(&mut state.memories).into_values() {
                let _ = self.release_memory(&mut state, allocation.address);
            }
            let _ = self.trim(&state);
            state.blas = Looked::Absent;
            for module in std::mem::take(&mut state.modules) {
                // SAFETY: loaded here, and nothing that is queued runs its kernels.
                let _ = guarded("cuModuleUnload", || unsafe {
                    result::module::unload(module)
                });
            }
            state.streams.release();
        }
        // SAFETY: retained once when the device was opened.
        let _ = guarded("cuDevicePrimaryCtxRelease", || unsafe {
            result::primary_ctx::release(self.device)
        });
    }
}
