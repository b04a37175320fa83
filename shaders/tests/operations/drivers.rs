//! The devices of this machine.
#![allow(clippy::print_stderr, reason = "tests say why they are skipped")]

use nemoconv_device::{Device, DeviceName, Driver, Found, devices, open};

/// Every device that can be opened, with its name.
pub fn all() -> Vec<(String, Device)> {
    let device = |(name, driver)| (name, Device::new(driver, None));
    drivers().into_iter().map(device).collect()
}

/// The drivers of them; a line for what cannot be opened.
pub fn drivers() -> Vec<(String, Box<dyn Driver>)> {
    let mut opened = Vec::new();
    for Found { family, devices } in devices() {
        match devices {
            Err(error) => eprintln!("skipped {}: {error}", family.name()),
            Ok(found) => {
                for index in 0..found.len() {
                    let name = DeviceName { family, index };
                    match open(name) {
                        Ok(driver) => opened.push((name.to_string(), driver)),
                        Err(error) => eprintln!("skipped {name}: {error}"),
                    }
                }
            }
        }
    }
    let is_required = std::env::var_os("NEMOCONV_REQUIRE_GPU").is_some();
    assert!(
        !is_required || !opened.is_empty(),
        "no device can be opened"
    );
    opened
}
