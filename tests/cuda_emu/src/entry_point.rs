//! Kernels as the C++ compiler left them.

use std::ffi::c_void;

use crate::Order;

include!(concat!(env!("OUT_DIR"), "/entries.rs"));

/// A kernel that can be run.
#[derive(Debug)]
pub struct EntryPoint {
    name: &'static str,
    run: unsafe extern "C" fn(request: *const Request) -> bool,
    shape: unsafe extern "C" fn() -> Shape,
}

/// `emulator::Shape` of the header.
#[derive(Debug)]
#[repr(C)]
struct Shape {
    views: usize,
    parameter_bytes: usize,
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
    message: *mut u8,
    message_bytes: usize,
}

/// Longest text of an error.
const MESSAGE_BYTES: usize = 512;

impl EntryPoint {
    /// The kernel of that name.
    pub fn find(name: &str) -> Option<&'static Self> {
        ENTRY_POINTS.iter().find(|entry| entry.name == name)
    }

    /// Pointers that it takes.
    pub fn views(&self) -> usize {
        self.shape().views
    }

    /// Bytes of the structure that it takes behind them.
    pub fn parameter_bytes(&self) -> usize {
        self.shape().parameter_bytes
    }

    fn shape(&self) -> Shape {
        // SAFETY: takes nothing and touches nothing.
        unsafe { (self.shape)() }
    }

    /// Runs it.
    ///
    /// # Errors
    /// What is wrong with its barriers.
    ///
    /// # Safety
    /// As many pointers and words as it takes; what it reads and writes behind the pointers is there and not in use.
    pub unsafe fn run(
        &self,
        grid: [u32; 2],
        threads: u32,
        order: Order,
        pointers: &mut [*mut c_void],
        parameters: &[u32],
    ) -> Result<(), String> {
        let mut parameters = parameters.to_vec();
        // As for cuLaunchKernel: a pointer to each argument.
        let mut arguments: Vec<*mut c_void> =
            pointers.iter_mut().map(|p| (&raw mut *p).cast()).collect();
        arguments.push(parameters.as_mut_ptr().cast());
        let mut message = [0; MESSAGE_BYTES];
        let request = Request {
            grid: Dim3 {
                x: grid[0],
                y: grid[1],
                z: 1,
            },
            threads,
            order: order as u32,
            arguments: arguments.as_mut_ptr(),
            message: message.as_mut_ptr(),
            message_bytes: message.len(),
        };
        // SAFETY: the request has the layout of the header; see above for what it points to.
        if unsafe { (self.run)(&raw const request) } {
            return Ok(());
        }
        let text = message.split(|byte| *byte == 0).next().unwrap_or_default();
        Err(String::from_utf8_lossy(text).into_owned())
    }
}
