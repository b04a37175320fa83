//! The program from outside: files, exit codes, messages.

mod artifacts;
mod calibrate;
mod eval;
mod hostile;
mod inspect;
mod validate;
