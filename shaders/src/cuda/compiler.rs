//! NVRTC: CUDA C++ to machine code of one architecture, or to PTX alone.
//!
//! Enters: a text. Leaves: a CUBIN, and what the assembler says of registers and spills; or PTX. Needs neither a device nor
//! its driver.

use std::ffi::{CStr, CString, OsString, c_char, c_int, c_void};
use std::ptr;
use std::sync::OnceLock;

use libloading::Library;

use super::library::candidates;
use crate::error::{DeviceError, Result};

/// Machine code of a kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Compiled {
    /// What the driver loads.
    pub cubin: Vec<u8>,
    /// Registers of a thread.
    pub registers: u32,
    /// Bytes stored because registers did not suffice.
    pub spill_stores: u32,
    /// Bytes loaded again.
    pub spill_loads: u32,
    /// Shared memory of a group.
    pub shared_bytes: u32,
    /// All that the compiler said.
    pub log: String,
}

/// What every kernel is compiled with, beside its architecture. Sums and products are fused where the text says so, and
/// nowhere else; shared pieces have functions that a kernel may leave alone.
pub const OPTIONS: [&str; 4] = [
    "--std=c++17",
    "--fmad=false",
    "--diag-suppress=177",
    "--ptxas-options=-v",
];

/// Compiles a kernel.
///
/// `name` is for messages; `architecture` as in `sm_90`.
///
/// # Errors
/// NVRTC was not found, or refuses the text or the architecture: then with its log.
pub fn compile(text: &str, name: &'static str, architecture: &str) -> Result<Compiled> {
    let refused = |log: String| DeviceError::Compile { kernel: name, log };
    let (program, log) = compiled(text, name, architecture)?;
    Ok(Compiled {
        cubin: program.cubin().map_err(refused)?,
        registers: number_before(&log, " registers"),
        spill_stores: number_before(&log, " bytes spill stores"),
        spill_loads: number_before(&log, " bytes spill loads"),
        shared_bytes: number_before(&log, " bytes smem"),
        log,
    })
}

/// PTX of a kernel, without the assembler: what drivers compile for devices that are newer than the compiler.
///
/// `name` is for messages; `architecture` as in `compute_90`.
///
/// # Errors
/// NVRTC was not found, or refuses the text or the architecture: then with its log.
pub fn compile_to_ptx(text: &str, name: &'static str, architecture: &str) -> Result<String> {
    let (program, _) = compiled(text, name, architecture)?;
    let ptx = program.ptx();
    ptx.map_err(|log| DeviceError::Compile { kernel: name, log })
}

/// The program, and what the compiler said of it.
fn compiled(text: &str, name: &'static str, architecture: &str) -> Result<(Program, String)> {
    let refused = |log: String| DeviceError::Compile { kernel: name, log };
    let program = Program::new(nvrtc()?, text, name).map_err(refused)?;
    let result = program.compile(architecture);
    let log = program.log();
    result.map_err(|reason| refused(if log.is_empty() { reason } else { log.clone() }))?;
    Ok((program, log))
}

/// Major and minor version of NVRTC.
///
/// # Errors
/// It was not found.
pub fn version() -> Result<(u32, u32)> {
    let nvrtc = nvrtc()?;
    let (mut major, mut minor) = (0, 0);
    // SAFETY: both numbers outlive the call.
    unsafe { (nvrtc.version)(&raw mut major, &raw mut minor) };
    Ok((major.unsigned_abs(), minor.unsigned_abs()))
}

/// Architectures that NVRTC compiles for: 90 for `sm_90`.
///
/// # Errors
/// It was not found.
pub fn architectures() -> Result<Vec<u32>> {
    let nvrtc = nvrtc()?;
    let mut count = 0;
    // SAFETY: the number outlives the call.
    unsafe { (nvrtc.architecture_count)(&raw mut count) };
    let mut all = vec![0; usize::try_from(count).unwrap_or(0)];
    // SAFETY: as many numbers as the library has just asked for.
    unsafe { (nvrtc.architectures)(all.as_mut_ptr()) };
    Ok(all.into_iter().map(c_int::unsigned_abs).collect())
}

/// What stands before the zero at the end of a text of C.
fn text_of(bytes: &[u8]) -> String {
    let text = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
    String::from_utf8_lossy(text).trim().to_owned()
}

/// The digits right before the first place of some words.
fn number_before(log: &str, words: &str) -> u32 {
    let before = log.split_once(words).map_or("", |(before, _)| before);
    let digits = before.rsplit(|c: char| !c.is_ascii_digit()).next();
    digits.unwrap_or_default().parse().unwrap_or(0)
}

type Handle = *mut c_void;

/// The functions of the library, as nvrtc.h declares them: all return 0 for success.
struct Nvrtc {
    version: unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int,
    architecture_count: unsafe extern "C" fn(*mut c_int) -> c_int,
    architectures: unsafe extern "C" fn(*mut c_int) -> c_int,
    create: unsafe extern "C" fn(
        *mut Handle,
        *const c_char,
        *const c_char,
        c_int,
        *const *const c_char,
        *const *const c_char,
    ) -> c_int,
    compile: unsafe extern "C" fn(Handle, c_int, *const *const c_char) -> c_int,
    destroy: unsafe extern "C" fn(*mut Handle) -> c_int,
    cubin_bytes: unsafe extern "C" fn(Handle, *mut usize) -> c_int,
    cubin: unsafe extern "C" fn(Handle, *mut c_char) -> c_int,
    ptx_bytes: unsafe extern "C" fn(Handle, *mut usize) -> c_int,
    ptx: unsafe extern "C" fn(Handle, *mut c_char) -> c_int,
    log_bytes: unsafe extern "C" fn(Handle, *mut usize) -> c_int,
    log: unsafe extern "C" fn(Handle, *mut c_char) -> c_int,
    error: unsafe extern "C" fn(c_int) -> *const c_char,
    /// Kept open as long as its functions are.
    _library: Library,
}

fn nvrtc() -> Result<&'static Nvrtc> {
    static NVRTC: OnceLock<Option<Nvrtc>> = OnceLock::new();
    let found = NVRTC.get_or_init(|| candidates(names()).into_iter().find_map(Nvrtc::open));
    found.as_ref().ok_or(DeviceError::NoCompiler)
}

fn names() -> &'static [&'static str] {
    match cfg!(windows) {
        true => &["nvrtc64_130_0.dll", "nvrtc64_120_0.dll"],
        false => &["libnvrtc.so", "libnvrtc.so.13", "libnvrtc.so.12"],
    }
}

impl Nvrtc {
    fn open(name: OsString) -> Option<Self> {
        // SAFETY: opens NVIDIA's compiler; the types of its functions are those of nvrtc.h since CUDA 11.2.
        unsafe {
            let library = Library::new(name).ok()?;
            Some(Self {
                version: *library.get(b"nvrtcVersion\0").ok()?,
                architecture_count: *library.get(b"nvrtcGetNumSupportedArchs\0").ok()?,
                architectures: *library.get(b"nvrtcGetSupportedArchs\0").ok()?,
                create: *library.get(b"nvrtcCreateProgram\0").ok()?,
                compile: *library.get(b"nvrtcCompileProgram\0").ok()?,
                destroy: *library.get(b"nvrtcDestroyProgram\0").ok()?,
                cubin_bytes: *library.get(b"nvrtcGetCUBINSize\0").ok()?,
                cubin: *library.get(b"nvrtcGetCUBIN\0").ok()?,
                ptx_bytes: *library.get(b"nvrtcGetPTXSize\0").ok()?,
                ptx: *library.get(b"nvrtcGetPTX\0").ok()?,
                log_bytes: *library.get(b"nvrtcGetProgramLogSize\0").ok()?,
                log: *library.get(b"nvrtcGetProgramLog\0").ok()?,
                error: *library.get(b"nvrtcGetErrorString\0").ok()?,
                _library: library,
            })
        }
    }

    fn check(&self, code: c_int) -> std::result::Result<(), String> {
        if code == 0 {
            return Ok(());
        }
        // SAFETY: the library answers every code with a text of its own.
        let text = unsafe { CStr::from_ptr((self.error)(code)) };
        Err(text.to_string_lossy().into_owned())
    }
}

/// A text on its way to machine code.
struct Program {
    nvrtc: &'static Nvrtc,
    handle: Handle,
}

impl Program {
    fn new(nvrtc: &'static Nvrtc, text: &str, name: &str) -> std::result::Result<Self, String> {
        let text = CString::new(text).map_err(|error| error.to_string())?;
        let name = CString::new(format!("{name}.cu")).map_err(|error| error.to_string())?;
        let mut handle = ptr::null_mut();
        // SAFETY: both texts end in a zero and outlive the call, which copies them; there are no headers.
        let code = unsafe {
            (nvrtc.create)(
                &raw mut handle,
                text.as_ptr(),
                name.as_ptr(),
                0,
                ptr::null(),
                ptr::null(),
            )
        };
        nvrtc.check(code)?;
        Ok(Self { nvrtc, handle })
    }

    fn compile(&self, architecture: &str) -> std::result::Result<(), String> {
        let own = format!("--gpu-architecture={architecture}");
        let all = OPTIONS.iter().copied().chain([own.as_str()]);
        let all: std::result::Result<Vec<CString>, _> = all.map(CString::new).collect();
        let all = all.map_err(|error| error.to_string())?;
        let pointers: Vec<*const c_char> = all.iter().map(|option| option.as_ptr()).collect();
        let count = c_int::try_from(pointers.len()).map_err(|error| error.to_string())?;
        // SAFETY: the program is alive; so many options, which outlive the call.
        let code = unsafe { (self.nvrtc.compile)(self.handle, count, pointers.as_ptr()) };
        self.nvrtc.check(code)
    }

    fn log(&self) -> String {
        let bytes = self
            .bytes(self.nvrtc.log_bytes, self.nvrtc.log)
            .unwrap_or_default();
        text_of(&bytes)
    }

    fn ptx(&self) -> std::result::Result<String, String> {
        let bytes = self.bytes(self.nvrtc.ptx_bytes, self.nvrtc.ptx)?;
        Ok(text_of(&bytes))
    }

    fn cubin(&self) -> std::result::Result<Vec<u8>, String> {
        self.bytes(self.nvrtc.cubin_bytes, self.nvrtc.cubin)
    }

    fn bytes(
        &self,
        length: unsafe extern "C" fn(Handle, *mut usize) -> c_int,
        content: unsafe extern "C" fn(Handle, *mut c_char) -> c_int,
    ) -> std::result::Result<Vec<u8>, String> {
        let mut count = 0;
        // SAFETY: the program is alive, and the number outlives the call.
        let code = unsafe { length(self.handle, &raw mut count) };
        self.nvrtc.check(code)?;
        let mut bytes = vec![0u8; count];
        // SAFETY: as many bytes as the library has just asked for.
        let code = unsafe { content(self.handle, bytes.as_mut_ptr().cast()) };
        self.nvrtc.check(code)?;
        Ok(bytes)
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: created by the same library, destroyed once.
        unsafe { (self.nvrtc.destroy)(&raw mut self.handle) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statistics_are_read_from_the_log() {
        let log = "ptxas info    : 0 bytes gmem\n    8 bytes stack frame, 16 bytes spill stores, 24 bytes spill loads\n\
                   ptxas info    : Used 121 registers, used 1 barriers, 8704 bytes smem, 420 bytes cmem[0]";
        assert_eq!(number_before(log, " registers"), 121);
        assert_eq!(number_before(log, " bytes spill stores"), 16);
        assert_eq!(number_before(log, " bytes spill loads"), 24);
        assert_eq!(number_before(log, " bytes smem"), 8704);
        assert_eq!(number_before("nothing", " registers"), 0);
    }
}
