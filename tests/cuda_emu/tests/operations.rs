//! The tables of `nemoconv-device`, of operations and of decoders, on the emulator: what computes launch grids and packs
//! parameters is the same for every device.
#![allow(
    clippy::duplicate_mod,
    reason = "both tables list the devices of this machine"
)]

#[allow(dead_code, reason = "it comes with the devices of this machine")]
#[path = "../../../shaders/tests/decoders/main.rs"]
mod decoders;
mod drivers;
#[allow(dead_code, reason = "it comes with the devices of this machine")]
#[path = "../../../shaders/tests/operations/main.rs"]
mod operations;
mod through_driver;

use operations::{TOLERANCE, check, numbers};
