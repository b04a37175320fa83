//! Which device: what users write, what is there, what is opened.

use std::fmt;
use std::str::FromStr;

use crate::driver::{Description, Driver, Family};
use crate::error::{DeviceError, Result};

/// A device as users name it: `wgpu`, `cuda`, `wgpu:1`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceName {
    /// Which driver.
    pub family: Family,
    /// Which of its devices.
    pub index: usize,
}

impl FromStr for DeviceName {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let (family, index) = text.split_once(':').unwrap_or((text, "0"));
        let family = match family {
            "wgpu" => Family::Wgpu,
            "cuda" => Family::Cuda,
            _ => {
                return Err(format!(
                    "`{text}` is no device: expected `wgpu`, `cuda` or `wgpu:1`"
                ));
            }
        };
        let index = index
            .parse()
            .map_err(|_| format!("`{index}` is no index of a device"))?;
        Ok(Self { family, index })
    }
}

impl fmt::Display for DeviceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.family.name(), self.index)
    }
}

/// What a driver finds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Which driver.
    pub family: Family,
    /// Its devices, or why there are none.
    pub devices: Result<Vec<Description>>,
}

/// What every driver finds, CUDA first.
pub fn devices() -> [Found; 2] {
    [Family::Cuda, Family::Wgpu].map(|family| Found {
        family,
        devices: list(family),
    })
}

fn list(family: Family) -> Result<Vec<Description>> {
    match family {
        #[cfg(feature = "wgpu")]
        Family::Wgpu => crate::wgpu::list(),
        #[cfg(feature = "cuda")]
        Family::Cuda => crate::cuda::list(),
        #[allow(unreachable_patterns, reason = "builds with both drivers")]
        family => Err(DeviceError::NotBuilt {
            family: family.name(),
        }),
    }
}

/// Opens a device.
///
/// # Errors
/// No support in this build, no driver, no such device, or one that cannot run the kernels.
pub fn open(name: DeviceName) -> Result<Box<dyn Driver>> {
    match name.family {
        #[cfg(feature = "wgpu")]
        Family::Wgpu => crate::wgpu::open(name.index),
        #[cfg(feature = "cuda")]
        Family::Cuda => crate::cuda::open(name.index),
        #[allow(unreachable_patterns, reason = "builds with both drivers")]
        family => Err(DeviceError::NotBuilt {
            family: family.name(),
        }),
    }
}
