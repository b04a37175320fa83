//! Calls of the driver: each ends in a value or in an error of this package, none in a panic.

use std::panic::{AssertUnwindSafe, catch_unwind};

use cudarc::driver::DriverError;
use cudarc::driver::sys::CUresult;

use crate::error::{DeviceError, Result};

/// Makes a call.
pub fn guarded<T>(
    call: &'static str,
    body: impl FnOnce() -> std::result::Result<T, DriverError>,
) -> Result<T> {
    // The bindings panic where the library lacks a function.
    match catch_unwind(AssertUnwindSafe(body)) {
        Ok(result) => result.map_err(|error| error_of(call, error)),
        Err(_) => Err(DeviceError::Call {
            call,
            reason: "the driver has no such function; a later one has".to_owned(),
        }),
    }
}

fn error_of(call: &'static str, error: DriverError) -> DeviceError {
    let reason = catch_unwind(|| error.to_string()).unwrap_or_else(|_| format!("{:?}", error.0));
    match is_lost(error.0) {
        true => DeviceError::Lost { reason },
        false => DeviceError::Call { call, reason },
    }
}

/// After these every call in this process fails.
fn is_lost(code: CUresult) -> bool {
    use CUresult as C;
    matches!(
        code,
        C::CUDA_ERROR_ILLEGAL_ADDRESS
            | C::CUDA_ERROR_LAUNCH_FAILED
            | C::CUDA_ERROR_LAUNCH_TIMEOUT
            | C::CUDA_ERROR_ILLEGAL_INSTRUCTION
            | C::CUDA_ERROR_MISALIGNED_ADDRESS
            | C::CUDA_ERROR_INVALID_ADDRESS_SPACE
            | C::CUDA_ERROR_INVALID_PC
            | C::CUDA_ERROR_HARDWARE_STACK_ERROR
            | C::CUDA_ERROR_ASSERT
            | C::CUDA_ERROR_ECC_UNCORRECTABLE
            | C::CUDA_ERROR_NVLINK_UNCORRECTABLE
            | C::CUDA_ERROR_CONTEXT_IS_DESTROYED
            | C::CUDA_ERROR_DEVICE_UNAVAILABLE
            | C::CUDA_ERROR_DEINITIALIZED
    )
}

/// Whether memory of the device is used up.
pub fn is_out_of_memory(error: &DriverError) -> bool {
    error.0 == CUresult::CUDA_ERROR_OUT_OF_MEMORY
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_function_that_is_missing_is_an_error() {
        let result: Result<()> = guarded("cuMissing", || panic!("no symbol"));
        assert!(matches!(
            result,
            Err(DeviceError::Call {
                call: "cuMissing",
                ..
            })
        ));
    }
}
