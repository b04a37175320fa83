//! A `libcuda`, a `libnvrtc` and a `libcublas` for tests: the functions that `nemoconv-device` calls, on the emulator.
//!
//! Enters: calls of the driver API. Leaves: what a device would have done, as late as the streams allow: what was not
//! ordered by events happens in the wrong order. Environment variables choose the device, see [`world::Settings`].
#![allow(non_snake_case, reason = "names of the driver API")]
#![allow(clippy::missing_safety_doc, reason = "as cuda.h documents them")]
#![allow(missing_docs, reason = "as cuda.h documents them")]
#![allow(
    unused_unsafe,
    reason = "some calls need it, and one macro writes them all"
)]

mod cublas;
mod nvrtc;
mod world;

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};

use nemoconv_cuda_emu::EntryPoint;
use world::{Op, World, world};

const SUCCESS: c_int = 0;
const INVALID_VALUE: c_int = 1;
const OUT_OF_MEMORY: c_int = 2;
const NO_DEVICE: c_int = 100;
const NOT_FOUND: c_int = 500;
const ILLEGAL_ADDRESS: c_int = 700;
const LAUNCH_TIMEOUT: c_int = 702;
const LAUNCH_FAILED: c_int = 719;

/// Writes an answer where the caller wants it.
///
/// # Safety
/// The place is valid for writes.
unsafe fn answer<T>(place: *mut T, value: T) -> c_int {
    // SAFETY: see above.
    unsafe { place.write(value) };
    SUCCESS
}

macro_rules! calls {
    ($($name:ident($world:ident $(, $argument:ident: $ty:ty)*) $body:block)*) => {
        $(
            #[unsafe(no_mangle)]
            pub unsafe extern "C" fn $name($($argument: $ty),*) -> c_int {
                let mut guard = world();
                let $world: &mut World = &mut guard;
                if $world.error != SUCCESS {
                    return $world.error;
                }
                // SAFETY: callers keep to cuda.h.
                let code = unsafe { $body };
                if $world.error != SUCCESS { $world.error } else { code }
            }
        )*
    };
}

pub(crate) use calls;

calls! {
    cuInit(world, _flags: c_uint) {
        if world.settings.devices == 0 { NO_DEVICE } else { SUCCESS }
    }
    cuDeviceGetCount(world, count: *mut c_int) {
        answer(count, world.settings.devices)
    }
    cuDeviceGet(world, device: *mut c_int, ordinal: c_int) {
        if ordinal < world.settings.devices { answer(device, ordinal) } else { INVALID_VALUE }
    }
    cuDeviceGetAttribute(world, value: *mut c_int, attribute: c_int, _device: c_int) {
        match attribute {
            75 => answer(value, world.settings.capability / 10),
            76 => answer(value, world.settings.capability % 10),
            115 => answer(value, c_int::from(world.settings.has_pools)),
            _ => INVALID_VALUE,
        }
    }
    cuDeviceGetName(_world, name: *mut c_char, bytes: c_int, _device: c_int) {
        let text = c"Emulated device".to_bytes_with_nul();
        assert!(text.len() <= bytes as usize);
        std::ptr::copy_nonoverlapping(text.as_ptr(), name.cast(), text.len());
        SUCCESS
    }
    cuDeviceTotalMem_v2(world, bytes: *mut usize, _device: c_int) {
        answer(bytes, world.settings.memory_bytes as usize)
    }
    cuDriverGetVersion(_world, version: *mut c_int) {
        answer(version, 12080)
    }
    cuDevicePrimaryCtxRetain(world, context: *mut *mut c_void, device: c_int) {
        world.contexts += 1;
        answer(context, (device as usize + 1) as *mut c_void)
    }
    cuDevicePrimaryCtxRelease_v2(world, _device: c_int) {
        world.release_context();
        SUCCESS
    }
    cuCtxSetCurrent(_world, context: *mut c_void) {
        if context.is_null() { INVALID_VALUE } else { SUCCESS }
    }
    cuDeviceGetMemPool(_world, pool: *mut *mut c_void, _device: c_int) {
        answer(pool, std::ptr::dangling_mut())
    }
    cuMemPoolSetAttribute(_world, _pool: *mut c_void, _attribute: c_int, _value: *mut c_void) {
        SUCCESS
    }
    cuMemPoolTrimTo(world, _pool: *mut c_void, _bytes: usize) {
        world.trim();
        SUCCESS
    }
    cuStreamCreate(world, stream: *mut usize, _flags: c_uint) {
        answer(stream, world.create_stream())
    }
    cuStreamDestroy_v2(world, stream: usize) {
        world.destroy_stream(stream);
        SUCCESS
    }
    cuStreamSynchronize(world, stream: usize) {
        world.synchronize(stream);
        SUCCESS
    }
    cuStreamWaitEvent(world, stream: usize, event: usize, _flags: c_uint) {
        world.wait(stream, event);
        SUCCESS
    }
    cuEventCreate(world, event: *mut usize, _flags: c_uint) {
        answer(event, world.create_event())
    }
    cuEventDestroy_v2(world, event: usize) {
        world.destroy_event(event);
        SUCCESS
    }
    cuEventRecord(world, event: usize, stream: usize) {
        world.record(event, stream);
        SUCCESS
    }
    cuMemHostAlloc(world, memory: *mut *mut c_void, bytes: usize, _flags: c_uint) {
        match world.pin(bytes) {
            Some(pinned) => answer(memory, pinned.cast()),
            None => OUT_OF_MEMORY,
        }
    }
    cuMemFreeHost(world, memory: *mut c_void) {
        world.unpin(memory.cast());
        SUCCESS
    }
    cuMemAllocAsync(world, address: *mut u64, bytes: usize, stream: usize) {
        match world.allocate(bytes as u64, Some(stream)) {
            Some(allocated) => answer(address, allocated),
            None => OUT_OF_MEMORY,
        }
    }
    cuMemAlloc_v2(world, address: *mut u64, bytes: usize) {
        match world.allocate(bytes as u64, None) {
            Some(allocated) => answer(address, allocated),
            None => OUT_OF_MEMORY,
        }
    }
    cuMemFreeAsync(world, address: u64, stream: usize) {
        world.queue(stream, Op::Free(address));
        SUCCESS
    }
    cuMemFree_v2(world, address: u64) {
        world.free(address);
        SUCCESS
    }
    cuMemcpyHtoDAsync_v2(world, to: u64, from: *const c_void, bytes: usize, stream: usize) {
        world.queue(stream, Op::Upload { to, from: from as u64, bytes });
        SUCCESS
    }
    cuMemcpyDtoHAsync_v2(world, to: *mut c_void, from: u64, bytes: usize, stream: usize) {
        world.queue(stream, Op::Download { to: to as u64, from, bytes });
        SUCCESS
    }
    cuMemcpyDtoDAsync_v2(world, to: u64, from: u64, bytes: usize, stream: usize) {
        world.queue(stream, Op::Copy { to, from, bytes });
        SUCCESS
    }
    cuMemsetD8Async(world, to: u64, value: u8, bytes: usize, stream: usize) {
        world.queue(stream, Op::Fill { to, value, bytes });
        SUCCESS
    }
    cuModuleLoadData(world, module: *mut usize, image: *const c_char) {
        if !CStr::from_ptr(image).to_bytes().starts_with(nvrtc::CODE) {
            return INVALID_VALUE;
        }
        world.modules += 1;
        answer(module, 1)
    }
    cuModuleUnload(world, _module: usize) {
        world.modules -= 1;
        SUCCESS
    }
    cuModuleGetFunction(_world, function: *mut *const EntryPoint, _module: usize, name: *const c_char) {
        match EntryPoint::find(&CStr::from_ptr(name).to_string_lossy()) {
            Some(entry) => answer(function, &raw const *entry),
            None => NOT_FOUND,
        }
    }
    cuLaunchKernel(
        world, function: *const EntryPoint, x: c_uint, y: c_uint, _z: c_uint, threads: c_uint, _threads_y: c_uint,
        _threads_z: c_uint, _shared: c_uint, stream: usize, arguments: *mut *mut c_void, _extra: *mut c_void
    ) {
        if world.settings.fails_to_launch {
            return LAUNCH_FAILED;
        }
        // Arguments are copied when a kernel is queued.
        let entry: &'static EntryPoint = &*function;
        let views = (0..entry.views()).map(|i| (*arguments.add(i)).cast::<u64>().read()).collect();
        let words = (*arguments.add(entry.views())).cast::<u32>();
        let parameters = std::slice::from_raw_parts(words, entry.parameter_bytes() / 4).to_vec();
        world.launch(stream, Op::Kernel { entry, grid: [x, y], threads, views, parameters });
        SUCCESS
    }
}

#[unsafe(no_mangle)]
pub extern "C" fn cuEventSynchronize(event: usize) -> c_int {
    world::wait_for(event)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGetErrorString(_code: c_int, text: *mut *const c_char) -> c_int {
    // SAFETY: callers keep to cuda.h.
    unsafe { answer(text, c"an emulated error".as_ptr()) }
}
