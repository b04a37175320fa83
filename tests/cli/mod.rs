//! The program from outside: files, exit codes, messages.

mod artifacts;
mod eval;
mod hostile;
mod inspect;
mod recipe;
mod validate;
