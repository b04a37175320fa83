//! The emulator, once per order of threads.

use nemoconv_cuda_emu::{Emulator, Order};
use nemoconv_device::Device;

/// In place of the devices of this machine.
pub fn all() -> Vec<(String, Device)> {
    let named = |order| {
        let device = Device::new(Box::new(Emulator::new(order)), None);
        (format!("emulator, {order:?}"), device)
    };
    Order::ALL.map(named).into()
}
