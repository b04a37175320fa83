//! The emulator, once per order of threads, or behind the CUDA driver.

use nemoconv_cuda_emu::{Emulator, Order};
use nemoconv_device::{Device, cuda};

use crate::through_driver::is_child;

/// In place of the devices of this machine.
pub fn all() -> Vec<(String, Device)> {
    if is_child() {
        let driver = cuda::open(0).unwrap_or_else(|error| panic!("{error}"));
        return vec![(
            "emulator behind the driver".to_owned(),
            Device::new(driver, None),
        )];
    }
    let named = |order| {
        let device = Device::new(Box::new(Emulator::new(order)), None);
        (format!("emulator, {order:?}"), device)
    };
    Order::ALL.map(named).into()
}
