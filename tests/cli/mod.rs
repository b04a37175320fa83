//! The program from outside: files, exit codes, messages.

mod artifacts;
mod hostile;
mod inspect;
