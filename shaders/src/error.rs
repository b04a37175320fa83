//! What can go wrong with a device, one variant per cause: each has its own message and way out.

/// The result of a device operation.
pub type Result<T> = std::result::Result<T, DeviceError>;

/// A device that cannot be used, or no longer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// This build has no driver of that family.
    #[error("this build has no support for {family}")]
    NotBuilt {
        /// `wgpu` or `cuda`.
        family: &'static str,
    },
    /// The system library that talks to the hardware is not there.
    #[error("no {family} driver: {library} was not found")]
    NoDriver {
        /// `wgpu` or `cuda`.
        family: &'static str,
        /// What was looked for.
        library: &'static str,
    },
    /// The driver is there, but no device that it would run on.
    #[error("the {family} driver finds no usable device{}", at(*index))]
    NoDevice {
        /// `wgpu` or `cuda`.
        family: &'static str,
        /// The device that was asked for.
        index: usize,
    },
    /// CUDA kernels are compiled at run time, and the compiler is not there.
    #[error("NVRTC, the CUDA run-time compiler, was not found")]
    NoCompiler,
    /// The compiler does not know the device, or the device is too old for the kernels.
    #[error("{device} has architecture {architecture}, which is not supported")]
    UnsupportedArchitecture {
        /// The device's name.
        device: String,
        /// Such as `sm_61`.
        architecture: String,
    },
    /// An adapter cannot bind what the smallest kernel needs.
    #[error("{device} allows {what} of {found}, {needed} are needed")]
    LimitTooSmall {
        /// The device's name.
        device: String,
        /// Which limit.
        what: &'static str,
        /// Its value.
        found: u64,
        /// What is needed.
        needed: u64,
    },
    /// Memory of the device is used up.
    #[error("out of device memory: {bytes} bytes could not be allocated")]
    OutOfMemory {
        /// What was asked for.
        bytes: u64,
    },
    /// A kernel was refused by its compiler.
    #[error("kernel `{kernel}` does not compile: {log}")]
    Compile {
        /// Its name.
        kernel: &'static str,
        /// What the compiler said.
        log: String,
    },
    /// The device no longer answers.
    #[error("the device was lost: {reason}")]
    Lost {
        /// What its driver said.
        reason: String,
    },
    /// A call that the driver refused.
    #[error("{call} failed: {reason}")]
    Call {
        /// What was called.
        call: &'static str,
        /// What its driver said.
        reason: String,
    },
}

fn at(index: usize) -> String {
    match index {
        0 => String::new(),
        index => format!(" with index {index}"),
    }
}

impl DeviceError {
    /// What to do about it.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::NotBuilt { .. } => "build with default features, or use `--device cpu`",
            Self::NoDriver { family: "cuda", .. } => {
                "install the NVIDIA driver, or use `--device wgpu` or `--device cpu`"
            }
            Self::NoDriver { .. } => {
                "install a Vulkan loader (libvulkan1) and a driver, or use `--device cpu`"
            }
            Self::NoDevice { .. } => "`nemoconv devices` lists what is there",
            Self::NoCompiler => {
                "install the CUDA toolkit, or the PyPI package `nvidia-cuda-nvrtc-cu12` with its lib folder in \
                 LD_LIBRARY_PATH"
            }
            Self::UnsupportedArchitecture { .. } => {
                "devices from sm_80 on are supported; `--device wgpu` may run on older ones"
            }
            Self::LimitTooSmall { .. } => "choose another adapter; `nemoconv devices` lists limits",
            Self::OutOfMemory { .. } => "lower `--device-mem`, so that layers are tiled",
            Self::Compile { .. } => "this is a defect: please report it with the message",
            Self::Lost { .. } | Self::Call { .. } => {
                "the driver's log may say more; `--device cpu` needs none"
            }
        }
    }
}
