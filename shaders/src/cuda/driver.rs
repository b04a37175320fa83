//! An open CUDA device.
//!
//! Enters: launches and copies, from any thread. Leaves: results, for each memory in the order of the calls. One lock orders what
//! is queued; on the device kernels, uploads and downloads overlap: each waits for what was queued before with the memory that it
//! names, and where that is new for the uploads before it.

use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::sync::{Mutex, MutexGuard, PoisonError};

use cudarc::driver::sys::{self, CUcontext, CUdevice, CUdeviceptr, CUfunction, CUmodule, CUstream};
use cudarc::driver::{DriverError, result};

use super::blas::{self, Blas};
use super::cache::Cache;
use super::call::{guarded, is_out_of_memory};
use super::lane::Lane;
use super::transfer::{Downloads, Uploads};
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
    /// Locked before the state, and longer: whoever waits for a download keeps nobody from queueing.
    downloads: Mutex<Downloads>,
}

// SAFETY: the driver's handles may be used from every thread in which their context is current, which each call sees to.
unsafe impl Send for Cuda {}
// SAFETY: everything that changes is behind a lock.
unsafe impl Sync for Cuda {}

#[derive(Debug)]
struct State {
    /// Where kernels run.
    compute: Lane,
    uploads: Uploads,
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
    /// The last operation of the compute lane that named it, or 0.
    computed: u64,
    /// The last operation of the upload lane that did, or 0.
    uploaded: u64,
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
                compute: Lane::new()?,
                uploads: Uploads::new()?,
                memories: HashMap::new(),
                allocated: 0,
                functions: HashMap::new(),
                modules: Vec::new(),
                blas: Looked::NotYet,
            }),
            downloads: Mutex::new(Downloads::new()?),
        })
    }

    /// The state, with the context current in this thread.
    fn enter(&self) -> Result<MutexGuard<'_, State>> {
        make_current(self.context)?;
        Ok(self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The way from the device, with the context current in this thread.
    fn enter_downloads(&self) -> Result<MutexGuard<'_, Downloads>> {
        make_current(self.context)?;
        Ok(self
            .downloads
            .lock()
            .unwrap_or_else(PoisonError::into_inner))
    }

    /// Memory, or `None` where there is not enough: in the order of uploads, which are the first to name most of it.
    fn try_allocate(&self, state: &mut State, bytes: u64) -> Result<Option<Allocation>> {
        let count = usize::try_from(bytes).map_err(|_| DeviceError::OutOfMemory { bytes })?;
        let lane = &mut state.uploads.lane;
        let (uploaded, address) = match self.has_pools {
            true => {
                // SAFETY: the stream is alive and the context current; the memory is freed by `release_memory`.
                let allocate = |stream| unsafe { result::malloc_async(stream, count) };
                let operation = lane.next();
                let address = lane.queue(|stream| allocated(|| allocate(stream)))?;
                (operation, address)
            }
            // SAFETY: as above.
            false => (0, allocated(|| unsafe { result::malloc_sync(count) })?),
        };
        Ok(address.map(|address| Allocation {
            address,
            bytes,
            computed: 0,
            uploaded,
        }))
    }

    fn release_memory(&self, state: &mut State, allocation: &Allocation) -> Result<()> {
        let address = allocation.address;
        if self.has_pools {
            let uploads = &state.uploads.lane;
            state.compute.join(uploads, allocation.uploaded)?;
            return state.compute.queue(|stream| {
                // SAFETY: an address of this device, freed once: it has just been taken from the table.
                guarded("cuMemFreeAsync", || unsafe {
                    result::free_async(address, stream)
                })
            });
        }
        state.synchronize()?;
        // SAFETY: as above, and nothing that is queued uses it.
        guarded("cuMemFree", || unsafe { result::free_sync(address) })
    }

    /// Gives memory that was freed back to the device.
    fn trim(&self, state: &State) -> Result<()> {
        state.synchronize()?;
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

/// An address, or `None` without enough memory.
fn allocated(
    allocate: impl FnOnce() -> std::result::Result<CUdeviceptr, DriverError>,
) -> Result<Option<CUdeviceptr>> {
    guarded("cuMemAlloc", || match allocate() {
        Ok(address) => Ok(Some(address)),
        Err(error) if is_out_of_memory(&error) => Ok(None),
        Err(error) => Err(error),
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
            self.blas = Blas::open(self.compute.stream()).map_or(Looked::Absent, Looked::Found);
        }
        match &self.blas {
            Looked::Found(blas) => Some(blas),
            _ => None,
        }
    }

    /// Queues a product on cuBLAS, which must be there.
    fn multiply(&mut self, layout: &MatmulLayout, views: &[View; 3]) -> Result<()> {
        let firsts = [layout.a[0], layout.b[0], layout.out[0]];
        let addresses = self.compute_on("cublasSgemm", views)?;
        let at = |i: usize| addresses[i] + 4 * firsts[i] as u64;
        let Looked::Found(blas) = &self.blas else {
            return Ok(());
        };
        // SAFETY: views lie in memory that is freed after what is queued before, and layouts in their views.
        let multiply = |_| unsafe { blas.multiply(layout, [at(0), at(1), at(2)]) };
        self.compute.queue(multiply)
    }

    /// The address of a view.
    fn part(&mut self, call: &'static str, view: &View) -> Result<(CUdeviceptr, &mut Allocation)> {
        let allocation = self.memories.get_mut(&view.memory);
        let allocation = allocation.filter(|allocation| {
            let end = view.offset.checked_add(view.bytes);
            end.is_some_and(|end| end <= allocation.bytes)
        });
        let allocation = allocation.ok_or_else(|| DeviceError::Call {
            call,
            reason: "the memory is not there, or ends before".to_owned(),
        })?;
        Ok((allocation.address + view.offset, allocation))
    }

    /// Addresses of views for the next operation of the compute lane, which waits for uploads to their memory.
    fn compute_on(&mut self, call: &'static str, views: &[View]) -> Result<Vec<CUdeviceptr>> {
        let operation = self.compute.next();
        let mut addresses = Vec::with_capacity(views.len());
        for view in views {
            let (address, allocation) = self.part(call, view)?;
            allocation.computed = operation;
            let uploaded = allocation.uploaded;
            self.compute.join(&self.uploads.lane, uploaded)?;
            addresses.push(address);
        }
        Ok(addresses)
    }

    /// The address of a view for the next upload, which waits for what is computed with its memory.
    fn upload_to(&mut self, call: &'static str, view: &View) -> Result<CUdeviceptr> {
        let operation = self.uploads.lane.next();
        let (address, allocation) = self.part(call, view)?;
        allocation.uploaded = operation;
        let computed = allocation.computed;
        self.uploads.lane.join(&self.compute, computed)?;
        Ok(address)
    }

    /// The address of a view for a download, whose stream waits for what is computed with its memory or uploaded to it.
    fn download_from(
        &mut self,
        call: &'static str,
        view: &View,
        stream: CUstream,
    ) -> Result<CUdeviceptr> {
        let (address, allocation) = self.part(call, view)?;
        let (computed, uploaded) = (allocation.computed, allocation.uploaded);
        self.compute.hold(stream, computed)?;
        self.uploads.lane.hold(stream, uploaded)?;
        Ok(address)
    }

    /// Waits until both lanes are done. Whoever downloads waits itself.
    fn synchronize(&self) -> Result<()> {
        self.uploads.lane.synchronize()?;
        self.compute.synchronize()
    }
}

impl Driver for Cuda {
    fn description(&self) -> &Description {
        &self.description
    }

    fn allocate(&self, bytes: u64) -> Result<Handle> {
        let mut state = self.enter()?;
        let mut allocation = self.try_allocate(&mut state, bytes)?;
        if allocation.is_none() {
            self.trim(&state)?;
            allocation = self.try_allocate(&mut state, bytes)?;
        }
        let allocation = allocation.ok_or(DeviceError::OutOfMemory { bytes })?;
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
            let _ = self.release_memory(&mut state, &allocation);
        }
    }

    fn write(&self, memory: Handle, offset: u64, bytes: &[u8]) -> Result<()> {
        let mut state = self.enter()?;
        let view = View {
            memory,
            offset,
            bytes: bytes.len() as u64,
        };
        let address = state.upload_to("cuMemcpyHtoD", &view)?;
        state.uploads.write(address, bytes)
    }

    fn read(&self, memory: Handle, offset: u64, bytes: &mut [u8]) -> Result<()> {
        let mut downloads = self.enter_downloads()?;
        let view = View {
            memory,
            offset,
            bytes: bytes.len() as u64,
        };
        let stream = downloads.stream();
        // The state is free again before anything is waited for: callers see to it that nothing writes or frees the memory.
        let address = self.enter()?.download_from("cuMemcpyDtoH", &view, stream)?;
        downloads.read(address, bytes)
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
        let view = |(memory, offset)| View {
            memory,
            offset,
            bytes,
        };
        let views = [(from, from_offset), (to, to_offset)].map(view);
        let addresses = state.compute_on("cuMemcpyDtoD", &views)?;
        state.compute.queue(|stream| {
            // SAFETY: the bytes are there in both allocations, which are not the same.
            guarded("cuMemcpyDtoDAsync", || unsafe {
                result::memcpy_dtod_async(addresses[1], addresses[0], bytes as usize, stream)
            })
        })
    }

    fn clear(&self, memory: Handle, offset: u64, bytes: u64) -> Result<()> {
        let mut state = self.enter()?;
        let view = View {
            memory,
            offset,
            bytes,
        };
        let addresses = state.compute_on("cuMemsetD8", &[view])?;
        state.compute.queue(|stream| {
            // SAFETY: the bytes are there.
            guarded("cuMemsetD8Async", || unsafe {
                result::memset_d8_async(addresses[0], 0, bytes as usize, stream)
            })
        })
    }

    fn launch(&self, launch: &Launch) -> Result<()> {
        let mut state = self.enter()?;
        let function = self.function(&mut state, launch.kernel)?;
        let mut addresses = state.compute_on("cuLaunchKernel", launch.views)?;
        let mut parameters = launch.parameters.to_vec();
        let mut arguments: Vec<*mut c_void> =
            addresses.iter_mut().map(|a| (&raw mut *a).cast()).collect();
        arguments.push(parameters.as_mut_ptr().cast());
        let [x, y] = launch.grid();
        let threads = launch.kernel.threads;
        state.compute.queue(|stream| {
            // SAFETY: as many pointers as the kernel takes, then its structure, which the call copies; every view lies in memory
            // that is freed after what is queued before.
            guarded("cuLaunchKernel", || unsafe {
                result::launch_kernel(
                    function,
                    (x, y, 1),
                    (threads, 1, 1),
                    0,
                    stream,
                    &mut arguments,
                )
            })
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
        // What fails here has failed before, or the process ends. Downloads are first: they may wait for events of the others.
        if let Ok(mut downloads) = self.enter_downloads() {
            downloads.release();
        }
        if let Ok(mut state) = self.enter() {
            for allocation in std::mem::take(&mut state.memories).into_values() {
                let _ = self.release_memory(&mut state, &allocation);
            }
            let _ = self.trim(&state);
            state.blas = Looked::Absent;
            for module in std::mem::take(&mut state.modules) {
                // SAFETY: loaded here, and nothing that is queued runs its kernels.
                let _ = guarded("cuModuleUnload", || unsafe {
                    result::module::unload(module)
                });
            }
            state.uploads.release();
            state.compute.release();
        }
        // SAFETY: retained once when the device was opened.
        let _ = guarded("cuDevicePrimaryCtxRelease", || unsafe {
            result::primary_ctx::release(self.device)
        });
    }
}
