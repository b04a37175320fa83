//! The program from outside: files, exit codes, messages.

mod artifacts;
mod calibrate;
mod calibration;
mod eval;
mod hostile;
mod inspect;
mod recipe;
mod safetensors;
mod validate;
