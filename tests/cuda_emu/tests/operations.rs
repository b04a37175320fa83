//! The table of operations of `nemoconv-device`, on the emulator: what computes launch grids and packs parameters is the
//! same for every device.

mod drivers;
mod through_driver;
#[allow(dead_code, reason = "it comes with the devices of this machine")]
#[path = "../../../shaders/tests/operations/main.rs"]
mod operations;

use operations::{TOLERANCE, check, numbers};
