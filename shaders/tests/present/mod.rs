//! Devices that tests run on: all that are there. With none tests pass, unless `NEMOCONV_REQUIRE_GPU` is 1.

use nemoconv_device::{Device, DeviceName, devices, open};

/// Calls `check` for every device.
pub fn on_every_device(check: impl Fn(&Device)) {
    let mut found = 0;
    for family in devices() {
        for index in 0..family.devices.map_or(0, |devices| devices.len()) {
            let family = family.family;
            let name = DeviceName { family, index };
            let driver = open(name).unwrap_or_else(|error| panic!("{name}: {error}"));
            eprintln!("on {name}, {}", driver.description().name);
            check(&Device::new(driver, None));
            found += 1;
        }
    }
    if found == 0 {
        eprintln!("skipped: no adapter");
        let is_required = std::env::var("NEMOCONV_REQUIRE_GPU").is_ok_and(|value| value == "1");
        assert!(!is_required, "NEMOCONV_REQUIRE_GPU is 1, and there is no device");
    }
}

/// Expects the same bits, but any NaN for a NaN.
#[track_caller]
pub fn assert_same(what: &str, found: &[f32], expected: &[f32]) {
    assert_eq!(found.len(), expected.len(), "{what}: values");
    for (at, (found, expected)) in found.iter().zip(expected).enumerate() {
        let is_same = found.to_bits() == expected.to_bits() || found.is_nan() && expected.is_nan();
        assert!(
            is_same,
            "{what}: value {at} must be {expected:e} ({:#x}), found {found:e} ({:#x})",
            expected.to_bits(),
            found.to_bits(),
        );
    }
}

/// Random bits (xorshift64).
pub struct Random(u64);

impl Random {
    /// `seed`: not 0.
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }

    /// 32 random bits.
    pub fn bits(&mut self) -> u32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 32) as u32
    }

    /// Random bytes.
    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.bits() as u8).collect()
    }
}
