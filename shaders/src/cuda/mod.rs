//! CUDA: kernels compiled at run time by NVRTC, launched through the driver API. Both libraries are opened when first used:
//! builds need no toolkit.
//!
//! Enters: texts of kernels, launches. Leaves: machine code and its statistics ([`compile`], which needs no device), or
//! results ([`open`]). Machine code is kept in the user's cache folder. Large products go to cuBLAS where it is present.

mod blas;
mod cache;
mod call;
mod compiler;
mod driver;
mod lane;
mod library;
mod transfer;

use std::ffi::c_int;

use cudarc::driver::{result, sys};

use crate::driver::{Description, Driver, Family, Limits};
use crate::error::{DeviceError, Result};

use call::guarded;
pub use compiler::{Compiled, architectures, compile, compile_to_ptx, version};

/// Of the oldest devices that the kernels are tested for.
const OLDEST_ARCHITECTURE: u32 = 80;

/// Devices whose peak for BF16 is some 15 times that for F32 and more: A100 (312 and 19.5 TFLOP/s), H100 (990 and 67), B200
/// and B300 (2250 and 80). Those for graphics and workstations have two to four times (RTX 4090: 165 and 82).
const SPLITS_FLOATS: [u32; 4] = [80, 90, 100, 103];

/// Kernels count bytes of a view in 32 bits.
const VIEW_BYTES: u64 = (1 << 32) - VIEW_ALIGNMENT;
/// What every allocation is aligned to.
const VIEW_ALIGNMENT: u64 = 256;
/// Threads of a block, of every generation.
const GROUP_THREADS: u32 = 1024;

/// The device with this index, ready for launches.
///
/// # Errors
/// Driver, device or compiler are not there, or the device is too old or too new for them.
pub fn open(index: usize) -> Result<Box<dyn Driver>> {
    let device = Found::at(index)?;
    let known = compiler::architectures()?;
    let architecture = architecture_of(device.capability, &known);
    let architecture = architecture.ok_or_else(|| DeviceError::UnsupportedArchitecture {
        device: device.name.clone(),
        architecture: format!("sm_{}", device.capability),
    })?;
    let driver = driver::Cuda::new(&device, format!("sm_{architecture}"))?;
    Ok(Box::new(driver))
}

/// Every device that the driver knows.
///
/// # Errors
/// There is no driver, or no device.
pub fn list() -> Result<Vec<Description>> {
    let all = 0..count()?;
    all.map(|index| Ok(Found::at(index)?.description()))
        .collect()
}

/// Machine code runs on later devices of its generation: the latest that the compiler knows, up to the device's own.
fn architecture_of(capability: u32, known: &[u32]) -> Option<u32> {
    let fits = |known: &u32| {
        known / 10 == capability / 10 && (OLDEST_ARCHITECTURE..=capability).contains(known)
    };
    known.iter().copied().filter(fits).max()
}

/// Devices that the driver has.
fn count() -> Result<usize> {
    let none = |index| DeviceError::NoDevice {
        family: "cuda",
        index,
    };
    // SAFETY: opens a library of the driver, whose initializers are trusted as its functions are.
    if !unsafe { sys::is_culib_present() } {
        return Err(DeviceError::NoDriver {
            family: "cuda",
            library: if cfg!(windows) {
                "nvcuda.dll"
            } else {
                "libcuda.so.1"
            },
        });
    }
    // Asked for by hand: the answers for machines without a device are no errors of the call.
    let initialized = guarded("cuInit", || Ok(result::init()))?;
    match initialized.map_err(|error| error.0) {
        Ok(()) => {}
        Err(sys::CUresult::CUDA_ERROR_NO_DEVICE | sys::CUresult::CUDA_ERROR_STUB_LIBRARY) => {
            return Err(none(0));
        }
        Err(code) => guarded("cuInit", || code.result())?,
    }
    match guarded("cuDeviceGetCount", result::device::get_count)? {
        0 => Err(none(0)),
        count => Ok(usize::try_from(count).unwrap_or(0)),
    }
}

/// A device before it is opened.
#[derive(Debug)]
struct Found {
    device: sys::CUdevice,
    name: String,
    /// Ten times the major number, and the minor one.
    capability: u32,
    memory_bytes: u64,
    driver_version: c_int,
    has_pools: bool,
}

impl Found {
    fn at(index: usize) -> Result<Self> {
        let none = DeviceError::NoDevice {
            family: "cuda",
            index,
        };
        if index >= count()? {
            return Err(none);
        }
        let ordinal = c_int::try_from(index).map_err(|_| none)?;
        let device = guarded("cuDeviceGet", || result::device::get(ordinal))?;
        let attribute = |attribute| {
            // SAFETY: the device is one of the driver's.
            guarded("cuDeviceGetAttribute", || unsafe {
                result::device::get_attribute(device, attribute)
            })
        };
        use sys::CUdevice_attribute as A;
        let major = attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        let mut driver_version = 0;
        guarded("cuDriverGetVersion", || {
            // SAFETY: the number outlives the call.
            let code = unsafe { sys::cuDriverGetVersion(&raw mut driver_version) };
            code.result()
        })?;
        Ok(Self {
            device,
            name: guarded("cuDeviceGetName", || result::device::get_name(device))?,
            capability: u32::try_from(10 * major + minor).unwrap_or(0),
            // SAFETY: the device is one of the driver's.
            memory_bytes: guarded("cuDeviceTotalMem", || unsafe {
                result::device::total_mem(device)
            })? as u64,
            driver_version,
            has_pools: attribute(A::CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED)? != 0,
        })
    }

    fn description(&self) -> Description {
        let (major, minor) = (self.driver_version / 1000, self.driver_version % 1000 / 10);
        let compiler = match compiler::version() {
            Ok((major, minor)) => format!("NVRTC {major}.{minor}"),
            Err(_) => "NVRTC not found".to_owned(),
        };
        Description {
            family: Family::Cuda,
            name: self.name.clone(),
            detail: format!(
                "sm_{}, driver for CUDA {major}.{minor}, {compiler}",
                self.capability
            ),
            is_software: false,
            splits_floats: SPLITS_FLOATS.contains(&self.capability),
            limits: Limits {
                view_bytes: VIEW_BYTES,
                view_alignment: VIEW_ALIGNMENT,
                allocation_bytes: self.memory_bytes,
                memory_bytes: Some(self.memory_bytes),
                group_threads: GROUP_THREADS,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machine_code_is_of_the_devices_generation() {
        let known = [75, 80, 86, 89, 90, 100, 120];
        assert_eq!(architecture_of(90, &known), Some(90));
        assert_eq!(architecture_of(87, &known), Some(86));
        assert_eq!(architecture_of(121, &known), Some(120));
        assert_eq!(architecture_of(75, &known), None);
        assert_eq!(architecture_of(61, &known), None);
        assert_eq!(architecture_of(130, &known), None);
    }

    /// Without a driver an error and no panic; with one whatever is there.
    #[test]
    fn a_machine_without_a_driver_says_so() {
        // SAFETY: opens a library of the driver.
        if unsafe { sys::is_culib_present() } {
            return;
        }
        assert!(matches!(list(), Err(DeviceError::NoDriver { .. })));
        assert!(matches!(open(0).err(), Some(DeviceError::NoDriver { .. })));
    }
}
