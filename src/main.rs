//! Parse, run, print the error, choose the exit code.

mod cli;

use std::process::ExitCode;

/// Blocks of a network come and go by the megabyte: glibc gives each back to the system and asks for it again, which took a
/// fifth of a calibrated conversion.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    quiet_drivers();
    quiet_bindings();
    cli::main()
}

/// Mesa's drivers look for a compositor there, and complain on stderr where the variable is unset. In the place that it is
/// set to there is none.
fn quiet_drivers() {
    const RUNTIME: &str = "XDG_RUNTIME_DIR";
    if cfg!(target_os = "linux") && std::env::var_os(RUNTIME).is_none() {
        // SAFETY: no other thread has been started, so none reads the environment.
        unsafe { std::env::set_var(RUNTIME, "/dev/null") };
    }
}

/// cudarc panics where a driver lacks a function, which becomes an error with a message of its own: one is enough.
fn quiet_bindings() {
    let say = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        let place = info.location().map_or("", |location| location.file());
        if !place.contains("cudarc") {
            say(info);
        }
    }));
}
