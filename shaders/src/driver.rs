//! The border to hardware: memory, copies, launches in order.
//!
//! Both families share one launch ABI. A kernel takes views of memory, then a structure of 32-bit words. CUDA kernels
//! get a pointer per view and the structure by value; WGSL kernels get storage buffers `@binding(0..)` of group 0 and the
//! structure as uniform buffer behind them.

use crate::error::Result;
use crate::kernels::Kernel;
use crate::ops::MatmulLayout;

/// The language a driver speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// WGSL through wgpu.
    Wgpu,
    /// CUDA C++ through NVRTC.
    Cuda,
}

impl Family {
    /// As flags and messages have it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Wgpu => "wgpu",
            Self::Cuda => "cuda",
        }
    }
}

/// What a device allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bytes that one view may span.
    pub view_bytes: u64,
    /// Where views may begin: multiples of this.
    pub view_alignment: u64,
    /// Bytes of one allocation.
    pub allocation_bytes: u64,
    /// Bytes of memory, where the driver says.
    pub memory_bytes: Option<u64>,
    /// Threads of a group.
    pub group_threads: u32,
}

/// What a device is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Description {
    /// The language of its kernels.
    pub family: Family,
    /// The vendor's name for it.
    pub name: String,
    /// Architecture and driver, for people.
    pub detail: String,
    /// Whether it is a processor that stands in for a GPU.
    pub is_software: bool,
    /// Whether six products of BF16 on its tensor cores, with sums in F32, take less time than one of F32.
    pub splits_floats: bool,
    /// What it allows.
    pub limits: Limits,
}

/// Memory of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Handle(pub u64);

/// Bytes of an allocation that a kernel sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct View {
    /// The allocation.
    pub memory: Handle,
    /// First byte: a multiple of [`Limits::view_alignment`].
    pub offset: u64,
    /// Length in bytes, a multiple of 4, not 0.
    pub bytes: u64,
}

/// One run of a kernel.
#[derive(Debug, Clone, Copy)]
pub struct Launch<'a> {
    /// What runs.
    pub kernel: &'static Kernel,
    /// Groups of [`Kernel::threads`] threads, not 0. Drivers spread them over two dimensions of at most 65535
    /// groups each, the first one full: kernels meet groups beyond the last and must leave them alone.
    pub groups: u32,
    /// In the order of the kernel's parameters. No memory is named twice, unless neither view is written.
    pub views: &'a [View],
    /// The kernel's structure, word by word.
    pub parameters: &'a [u32],
}

/// Most groups along one dimension.
pub const MAX_GROUPS: u32 = 65_535;

impl Launch<'_> {
    /// Groups along both dimensions.
    pub fn grid(&self) -> [u32; 2] {
        let x = self.groups.min(MAX_GROUPS);
        [x, self.groups.div_ceil(x)]
    }
}

/// A device that runs kernels. What names the same memory happens in the order of the calls, whichever thread makes them.
pub trait Driver: Send + Sync {
    /// What the device is.
    fn description(&self) -> &Description;

    /// Memory of undefined content; `bytes` is a multiple of 4, not 0.
    ///
    /// # Errors
    /// Out of memory, device lost.
    fn allocate(&self, bytes: u64) -> Result<Handle>;

    /// Gives memory back, once what was launched before is done with it.
    fn free(&self, memory: Handle);

    /// Copies to the device; offset and length are multiples of 4.
    ///
    /// # Errors
    /// Device lost.
    fn write(&self, memory: Handle, offset: u64, bytes: &[u8]) -> Result<()>;

    /// Copies from the device, after what was launched before with this memory. Others may queue what they like meanwhile, but
    /// nothing that writes or frees it.
    ///
    /// # Errors
    /// Device lost, or such a launch failed.
    fn read(&self, memory: Handle, offset: u64, bytes: &mut [u8]) -> Result<()>;

    /// Copies on the device, between different allocations; offsets and length are multiples of 4.
    ///
    /// # Errors
    /// Device lost.
    fn copy(
        &self,
        from: Handle,
        from_offset: u64,
        to: Handle,
        to_offset: u64,
        bytes: u64,
    ) -> Result<()>;

    /// Fills with zero bytes.
    ///
    /// # Errors
    /// Device lost.
    fn clear(&self, memory: Handle, offset: u64, bytes: u64) -> Result<()>;

    /// Queues a kernel.
    ///
    /// # Errors
    /// The kernel does not compile, device lost.
    fn launch(&self, launch: &Launch) -> Result<()>;

    /// Queues a matrix product in F32 of a library that comes with the device. Views: A, B, the result; first values of the
    /// layout are counted in them. `None`: there is no library, or it does not know the layout.
    fn gemm(&self, layout: &MatmulLayout, views: &[View; 3]) -> Option<Result<()>> {
        let _ = (layout, views);
        None
    }
}
