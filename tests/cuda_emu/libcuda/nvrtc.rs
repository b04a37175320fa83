//! A compiler that gives every text the same machine code.

use std::ffi::{c_char, c_int, c_void};

use crate::{SUCCESS, answer};

/// The machine code.
pub const CODE: &[u8] = b"\x7fELF, emulated";
/// What it is as the compiler writes it, with a zero for `cuModuleLoadData`.
const CUBIN: &[u8] = b"\x7fELF, emulated\0";
const ARCHITECTURES: [c_int; 3] = [75, 80, 90];

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvrtcVersion(major: *mut c_int, minor: *mut c_int) -> c_int {
    // SAFETY: callers keep to nvrtc.h.
    unsafe { answer(major, 12) | answer(minor, 8) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvrtcGetNumSupportedArchs(count: *mut c_int) -> c_int {
    // SAFETY: callers keep to nvrtc.h.
    unsafe { answer(count, ARCHITECTURES.len() as c_int) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvrtcGetSupportedArchs(all: *mut c_int) -> c_int {
    // SAFETY: callers keep to nvrtc.h.
    unsafe { all.copy_from_nonoverlapping(ARCHITECTURES.as_ptr(), ARCHITECTURES.len()) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvrtcCreateProgram(
    program: *mut *mut c_void,
    _text: *const c_char,
    _name: *const c_char,
    _headers: c_int,
    _contents: *const *const c_char,
    _names: *const *const c_char,
) -> c_int {
    // SAFETY: callers keep to nvrtc.h.
    unsafe { answer(program, std::ptr::without_provenance_mut(1)) }
}

#[unsafe(no_mangle)]
pub extern "C" fn nvrtcCompileProgram(
    _program: *mut c_void,
    _count: c_int,
    _options: *const *const c_char,
) -> c_int {
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn nvrtcDestroyProgram(_program: *mut *mut c_void) -> c_int {
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvrtcGetCUBINSize(_program: *mut c_void, bytes: *mut usize) -> c_int {
    // SAFETY: callers keep to nvrtc.h.
    unsafe { answer(bytes, CUBIN.len()) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvrtcGetCUBIN(_program: *mut c_void, cubin: *mut c_char) -> c_int {
    // SAFETY: callers keep to nvrtc.h.
    unsafe {
        cubin
            .cast::<u8>()
            .copy_from_nonoverlapping(CUBIN.as_ptr(), CUBIN.len())
    };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvrtcGetPTXSize(_program: *mut c_void, bytes: *mut usize) -> c_int {
    // SAFETY: callers keep to nvrtc.h.
    unsafe { answer(bytes, 1) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvrtcGetPTX(_program: *mut c_void, ptx: *mut c_char) -> c_int {
    // SAFETY: callers keep to nvrtc.h.
    unsafe { answer(ptx, 0) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvrtcGetProgramLogSize(_program: *mut c_void, bytes: *mut usize) -> c_int {
    // SAFETY: callers keep to nvrtc.h.
    unsafe { answer(bytes, 1) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvrtcGetProgramLog(_program: *mut c_void, log: *mut c_char) -> c_int {
    // SAFETY: callers keep to nvrtc.h.
    unsafe { answer(log, 0) }
}

#[unsafe(no_mangle)]
pub extern "C" fn nvrtcGetErrorString(_code: c_int) -> *const c_char {
    c"an emulated error".as_ptr()
}
