//! The emulator, once per order of threads, or behind the CUDA driver.

use nemoconv_cuda_emu::{Emulator, Order};
use nemoconv_device::{Device, Driver, cuda};

use crate::through_driver::is_child;

/// In place of the devices of this machine.
pub fn all() -> Vec<(String, Device)> {
    let device = |(name, driver)| (name, Device::new(driver, None));
    drivers().into_iter().map(device).collect()
}

/// The drivers of them.
pub fn drivers() -> Vec<(String, Box<dyn Driver>)> {
    if is_child() {
        let driver = cuda::open(0).unwrap_or_else(|error| panic!("{error}"));
        return vec![("emulator behind the driver".to_owned(), driver)];
    }
    let named = |order| -> (String, Box<dyn Driver>) {
        (
            format!("emulator, {order:?}"),
            Box::new(Emulator::new(order)),
        )
    };
    Order::ALL.map(named).into()
}
