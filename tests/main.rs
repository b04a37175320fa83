//! Integration tests: one binary.

#![allow(clippy::print_stdout, reason = "tests say what they skip and measure")]

mod cli;
mod parity;
mod pipeline;
mod support;
