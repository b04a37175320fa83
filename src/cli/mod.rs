//! The command line: the only room that prints, reads flags and chooses exit codes.

mod allocation_job;
mod also_job;
mod args;
mod calibrate_args;
mod calibrate_job;
mod calibration_job;
mod device;
mod effort;
mod eval_job;
mod eval_model;
mod eval_progress;
mod eval_report;
mod gguf_job;
mod inputs;
mod inspect;
mod memory;
mod output;
mod outputs;
mod packed_folder;
mod packed_receipt;
mod progress;
mod receipt;
mod recipe_job;
mod safetensors_args;
mod safetensors_job;
mod validate_job;
mod workers;

use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};

use clap::Parser;
use clap::error::ErrorKind;

use args::{Cli, Command};
use device::on_device;
use nemoconv::error::Error;
use output::Talk;
use workers::on_workers;

/// Raised by SIGINT and SIGTERM; workers look at it between tiles.
static STOP: AtomicBool = AtomicBool::new(false);

/// The exit codes; printed in `--help` and never changed.
mod exit {
    pub const DONE: u8 = 0;
    pub const FAILED: u8 = 1;
    pub const USAGE: u8 = 64;
    pub const INTERRUPTED: u8 = 130;
}

/// Runs the program.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    // Without a handler a signal still ends the program; only temporary files would stay behind.
    let _ = ctrlc::set_handler(|| STOP.store(true, Ordering::Relaxed));
    let talk = Talk::new(cli.quiet, cli.verbose);
    let result = match &cli.command {
        Command::ToGguf(args) => on_device(&args.device, &talk, |machines| {
            gguf_job::to_gguf(args, machines, &talk, &STOP)
        })
        .map(done),
        Command::ToSafetensors(args) => on_device(&args.device, &talk, |machines| {
            safetensors_job::to_safetensors(args, machines, &talk, &STOP)
        })
        .map(done),
        Command::Plan(args) => on_device(&args.device, &talk, |machines| {
            gguf_job::plan(args, machines, &talk, &STOP)
        })
        .map(done),
        Command::Inspect(args) => inspect::inspect(args).map(done),
        Command::Calibrate(args) => on_device(&args.device, &talk, |machines| {
            calibrate_job::calibrate(args, machines, &talk, &STOP)
        })
        .map(done),
        Command::Devices(args) => device::list(args).map(done),
        Command::Eval(args) => on_device(&args.run.device, &talk, |machines| {
            on_workers(args.run.threads, || {
                eval_job::eval(args, machines, &talk, &STOP)
            })
        })
        .map(done),
        Command::Validate(args) => on_device(&args.device, &talk, |machines| {
            on_workers(args.threads, || {
                validate_job::validate(args, machines, &talk, &STOP)
            })
        }),
    };
    match result {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            output::print_error(&error);
            ExitCode::from(match error {
                Error::Interrupted => exit::INTERRUPTED,
                Error::Usage(_) => exit::USAGE,
                error => device::exit_code(&error).unwrap_or(exit::FAILED),
            })
        }
    }
}

/// What ends without a verdict ends well.
fn done((): ()) -> u8 {
    exit::DONE
}

/// Help and version are answers, everything else is wrong usage.
fn usage(error: &clap::Error) -> ExitCode {
    // A closed pipe is nobody to tell.
    let _ = error.print();
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => ExitCode::SUCCESS,
        _ => ExitCode::from(exit::USAGE),
    }
}
