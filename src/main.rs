//! Parse, run, print the error, choose the exit code.

mod cli;

use std::process::ExitCode;

/// Blocks of a network come and go by the megabyte: glibc gives each back to the system and asks for it again, which took a
/// fifth of a calibrated conversion.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    cli::main()
}
