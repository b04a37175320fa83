//! The program from outside: files, exit codes, messages.

mod artifacts;
mod calibrate;
mod calibration;
#[cfg(feature = "device")]
mod device;
#[cfg(feature = "device")]
mod emulated_cuda;
mod eval;
mod hostile;
mod inspect;
mod packed;
mod recipe;
mod resumed;
mod safetensors;
mod validate;
