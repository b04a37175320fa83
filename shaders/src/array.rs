//! Memory of a device as arrays: allocated from a pool, given back when they are dropped. Of what lies idle, the longest idle is
//! used first: a device is most likely done with it.

use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::driver::{Description, Driver, Family, Handle, Launch, View};
use crate::error::{DeviceError, Result};
use crate::kernels::Kernel;
use crate::ops::{MatmulLayout, Splitting};
use crate::spare::{Spare, Spares};

/// A device with its memory. Clones share it.
#[derive(Clone)]
pub struct Device {
    inner: Arc<Inner>,
    matmul: MatmulKernel,
    library_from: u64,
    splitting: Splitting,
}

/// Products with so many multiplications go to the device's library. An assumption, not a measurement: 512 x 512 x 512 keep
/// an H100 busy for 4 µs at its peak, about what a launch takes.
const LIBRARY_FROM: u64 = 1 << 27;

/// Which of two kernels multiplies matrices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MatmulKernel {
    /// Blocks of both operands in shared memory: for GPUs.
    Tiled,
    /// Registers alone: for processors that stand in for a GPU, whose barriers are slow.
    Direct,
}

struct Inner {
    driver: Box<dyn Driver>,
    pool: Mutex<Pool>,
    spares: Spares,
    sent: AtomicU64,
    fetched: AtomicU64,
}

/// What went over the border so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Bytes to the device.
    pub sent: u64,
    /// Bytes back.
    pub fetched: u64,
    /// Values that gave way to others, see [`Device::spare`].
    pub given_up: u64,
}

/// What was allocated, and what of it lies idle.
struct Pool {
    /// Bytes that may be allocated.
    budget: u64,
    allocated: u64,
    /// By size, what was given back first in front.
    idle: HashMap<u64, VecDeque<Handle>>,
}

/// Bytes on a device.
pub struct Bytes {
    inner: Arc<Inner>,
    handle: Handle,
    capacity: u64,
    len: u64,
}

/// f32 values on a device.
pub struct Array {
    bytes: Bytes,
    len: usize,
}

/// f64 values on a device that computes with them, see [`Device::has_f64`].
pub struct Doubles {
    bytes: Bytes,
    len: usize,
}

/// Smallest allocation.
const LEAST_BYTES: u64 = 256;
/// From here on allocations are whole multiples of it.
const LARGE_BYTES: u64 = 1 << 20;

/// Sizes that memory is allocated in, so that it can be used again.
fn size_class(bytes: u64) -> u64 {
    match bytes {
        0..LEAST_BYTES => LEAST_BYTES,
        LEAST_BYTES..LARGE_BYTES => bytes.next_power_of_two(),
        _ => bytes.next_multiple_of(LARGE_BYTES),
    }
}

impl Inner {
    fn pool(&self) -> MutexGuard<'_, Pool> {
        // The counts are right whatever another thread did.
        self.pool.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Memory, for which spare values give way.
    fn allocate(&self, bytes: u64) -> Result<(Handle, u64)> {
        loop {
            match self.try_allocate(bytes) {
                Err(DeviceError::OutOfMemory { .. }) if self.spares.give_up_one() => {}
                done => return done,
            }
        }
    }

    fn try_allocate(&self, bytes: u64) -> Result<(Handle, u64)> {
        let class = size_class(bytes);
        let mut pool = self.pool();
        if let Some(handle) = pool.idle.get_mut(&class).and_then(VecDeque::pop_front) {
            return Ok((handle, class));
        }
        if pool.allocated + class > pool.budget {
            self.release(&mut pool);
        }
        if pool.allocated + class > pool.budget {
            return Err(DeviceError::OutOfMemory { bytes: class });
        }
        let handle = self.driver.allocate(class).or_else(|error| match error {
            DeviceError::OutOfMemory { .. } => {
                self.release(&mut pool);
                self.driver.allocate(class)
            }
            other => Err(other),
        })?;
        pool.allocated += class;
        Ok((handle, class))
    }

    fn write(&self, memory: Handle, offset: u64, bytes: &[u8]) -> Result<()> {
        self.sent.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        self.driver.write(memory, offset, bytes)
    }

    fn read(&self, memory: Handle, offset: u64, bytes: &mut [u8]) -> Result<()> {
        let count = bytes.len() as u64;
        self.fetched.fetch_add(count, Ordering::Relaxed);
        self.driver.read(memory, offset, bytes)
    }

    /// Gives idle memory back.
    fn release(&self, pool: &mut Pool) {
        for (class, handles) in pool.idle.drain() {
            pool.allocated -= class * handles.len() as u64;
            handles
                .into_iter()
                .for_each(|handle| self.driver.free(handle));
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let pool = self.pool.get_mut().unwrap_or_else(PoisonError::into_inner);
        let idle = std::mem::take(&mut pool.idle);
        idle.into_values()
            .flatten()
            .for_each(|handle| self.driver.free(handle));
    }
}

impl Drop for Bytes {
    fn drop(&mut self) {
        let mut pool = self.inner.pool();
        pool.idle
            .entry(self.capacity)
            .or_default()
            .push_back(self.handle);
    }
}

impl Bytes {
    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// All of it.
    pub(crate) fn view(&self) -> View {
        View {
            memory: self.handle,
            offset: 0,
            bytes: self.len.next_multiple_of(4).max(4),
        }
    }

    /// A part, from a place on that may be no multiple of the alignment: the view, and where the part begins in it.
    pub(crate) fn part(&self, bytes: Range<u64>) -> (View, u64) {
        let alignment = self.inner.driver.description().limits.view_alignment;
        let offset = bytes.start / alignment * alignment;
        let view = View {
            memory: self.handle,
            offset,
            bytes: (bytes.end - offset).next_multiple_of(4).max(4),
        };
        (view, bytes.start - offset)
    }
}

impl Array {
    /// Values.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub(crate) fn view(&self) -> View {
        self.bytes.view()
    }

    /// Some values: the view, and the index of the first one in it.
    pub(crate) fn part(&self, values: Range<usize>) -> (View, u32) {
        let (view, first) = self
            .bytes
            .part(values.start as u64 * 4..values.end as u64 * 4);
        (view, (first / 4) as u32)
    }
}

impl Doubles {
    /// Values.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub(crate) fn view(&self) -> View {
        self.bytes.view()
    }
}

impl Device {
    /// A device that takes at most `budget` bytes for itself.
    pub fn new(driver: Box<dyn Driver>, budget: Option<u64>) -> Self {
        let pool = Pool {
            budget: budget.unwrap_or(u64::MAX),
            allocated: 0,
            idle: HashMap::new(),
        };
        let inner = Inner {
            driver,
            pool: Mutex::new(pool),
            spares: Spares::default(),
            sent: AtomicU64::new(0),
            fetched: AtomicU64::new(0),
        };
        let matmul = match inner.driver.description().is_software {
            true => MatmulKernel::Direct,
            false => MatmulKernel::Tiled,
        };
        let splitting = match inner.driver.description().splits_floats {
            true => Splitting::WherePays,
            false => Splitting::Never,
        };
        Self {
            inner: Arc::new(inner),
            matmul,
            library_from: LIBRARY_FROM,
            splitting,
        }
    }

    /// The same with this kernel, whatever the device.
    pub fn with_matmul(self, matmul: MatmulKernel) -> Self {
        Self { matmul, ..self }
    }

    /// The same with products of so many multiplications and more given to a library, where the device has one.
    pub fn with_library_from(self, library_from: u64) -> Self {
        Self {
            library_from,
            ..self
        }
    }

    /// The same with these products computed of parts, whatever the device.
    pub fn with_splitting(self, splitting: Splitting) -> Self {
        Self { splitting, ..self }
    }

    pub(crate) fn splitting(&self) -> Splitting {
        self.splitting
    }

    /// The product of a library; `None` where the own kernel has to compute it.
    pub(crate) fn library_product(
        &self,
        layout: &MatmulLayout,
        views: &[View; 3],
    ) -> Option<Result<()>> {
        let outputs = layout.rows as u64 * layout.columns as u64;
        if outputs.saturating_mul(layout.inner as u64) < self.library_from {
            return None;
        }
        self.inner.driver.gemm(layout, views)
    }

    pub(crate) fn matmul_kernel(&self) -> MatmulKernel {
        self.matmul
    }

    /// What it is.
    pub fn description(&self) -> &Description {
        self.inner.driver.description()
    }

    /// Bytes that may be allocated at all: the budget, or what the driver says of its memory, or, where it says nothing,
    /// twice its largest allocation.
    pub fn total_bytes(&self) -> u64 {
        let limits = &self.description().limits;
        let memory = limits.memory_bytes;
        let guessed = limits.allocation_bytes.saturating_mul(2);
        self.inner.pool().budget.min(memory.unwrap_or(guessed))
    }

    /// Bytes of them that are not in use.
    pub fn free_bytes(&self) -> u64 {
        let total = self.total_bytes();
        let pool = self.inner.pool();
        let idle: u64 = pool
            .idle
            .iter()
            .map(|(class, handles)| class * handles.len() as u64)
            .sum();
        total.saturating_sub(pool.allocated - idle)
    }

    /// What so many bytes take of [`Self::free_bytes`].
    pub fn taken_bytes(&self, bytes: u64) -> u64 {
        size_class(bytes)
    }

    /// A value that gives way where there is no memory for something else.
    pub fn spare<T: Send + Sync + 'static>(&self, value: T) -> Spare<T> {
        self.inner.spares.keep(value)
    }

    /// What went to the device and back so far.
    pub fn traffic(&self) -> Traffic {
        Traffic {
            sent: self.inner.sent.load(Ordering::Relaxed),
            fetched: self.inner.fetched.load(Ordering::Relaxed),
            given_up: self.inner.spares.given_up(),
        }
    }

    fn allocate(&self, len: u64) -> Result<Bytes> {
        let (handle, capacity) = self.inner.allocate(len)?;
        Ok(Bytes {
            inner: Arc::clone(&self.inner),
            handle,
            capacity,
            len,
        })
    }

    /// Values of undefined content, to be written by a kernel.
    ///
    /// # Errors
    /// Out of memory.
    pub fn uninitialized(&self, len: usize) -> Result<Array> {
        let bytes = self.allocate(len as u64 * 4)?;
        Ok(Array { bytes, len })
    }

    /// An array of zeros.
    ///
    /// # Errors
    /// Out of memory, device lost.
    pub fn zeros(&self, len: usize) -> Result<Array> {
        let array = self.uninitialized(len)?;
        if len > 0 {
            let bytes = len as u64 * 4;
            self.inner.driver.clear(array.bytes.handle, 0, bytes)?;
        }
        Ok(array)
    }

    /// Copies values to the device.
    ///
    /// # Errors
    /// Out of memory, device lost.
    pub fn upload(&self, values: &[f32]) -> Result<Array> {
        let bytes = self.upload_bytes(bytemuck::cast_slice(values))?;
        let len = values.len();
        Ok(Array { bytes, len })
    }

    /// Whether it computes in f64 as this computer does; WGSL has no such type.
    pub fn has_f64(&self) -> bool {
        self.description().family == Family::Cuda
    }

    /// f64 values of undefined content, to be written by a kernel.
    ///
    /// # Errors
    /// Out of memory.
    ///
    /// # Panics
    /// The device has no f64.
    pub fn uninitialized_doubles(&self, len: usize) -> Result<Doubles> {
        assert!(self.has_f64(), "f64 on a device without it");
        let bytes = self.allocate(len as u64 * 8)?;
        Ok(Doubles { bytes, len })
    }

    /// Copies f64 values to the device.
    ///
    /// # Errors
    /// Out of memory, device lost.
    ///
    /// # Panics
    /// The device has no f64.
    pub fn upload_doubles(&self, values: &[f64]) -> Result<Doubles> {
        assert!(self.has_f64(), "f64 on a device without it");
        let bytes = self.upload_bytes(bytemuck::cast_slice(values))?;
        let len = values.len();
        Ok(Doubles { bytes, len })
    }

    /// Copies all f64 values back.
    ///
    /// # Errors
    /// Device lost, or a kernel before failed.
    pub fn download_doubles(&self, doubles: &Doubles) -> Result<Vec<f64>> {
        let mut out = vec![0.0; doubles.len];
        if !out.is_empty() {
            let bytes = bytemuck::cast_slice_mut(&mut out);
            self.inner.read(doubles.bytes.handle, 0, bytes)?;
        }
        Ok(out)
    }

    /// Copies bytes to the device.
    ///
    /// # Errors
    /// Out of memory, device lost.
    pub fn upload_bytes(&self, values: &[u8]) -> Result<Bytes> {
        let mut bytes = self.allocate(values.len() as u64)?;
        self.write_bytes(&mut bytes, 0, values)?;
        Ok(bytes)
    }

    /// Bytes of undefined content.
    ///
    /// # Errors
    /// Out of memory.
    pub fn reserve_bytes(&self, len: u64) -> Result<Bytes> {
        self.allocate(len)
    }

    /// Overwrites bytes from `at`, a multiple of 4, on.
    ///
    /// # Errors
    /// Device lost.
    ///
    /// # Panics
    /// `values` end beyond `bytes`, or `at` is no multiple of 4.
    pub fn write_bytes(&self, bytes: &mut Bytes, at: u64, values: &[u8]) -> Result<()> {
        assert!(at.is_multiple_of(4) && at + values.len() as u64 <= bytes.len);
        let (whole, rest) = values.split_at(values.len() / 4 * 4);
        if !whole.is_empty() {
            self.inner.write(bytes.handle, at, whole)?;
        }
        if rest.is_empty() {
            return Ok(());
        }
        let mut last = [0; 4];
        last[..rest.len()].copy_from_slice(rest);
        let at = at + whole.len() as u64;
        self.inner.write(bytes.handle, at, &last)
    }

    /// Overwrites values from `at` on.
    ///
    /// # Errors
    /// Device lost.
    ///
    /// # Panics
    /// `values` end beyond the array.
    pub fn write(&self, array: &mut Array, at: usize, values: &[f32]) -> Result<()> {
        assert!(at + values.len() <= array.len);
        if values.is_empty() {
            return Ok(());
        }
        let bytes = bytemuck::cast_slice(values);
        let handle = array.bytes.handle;
        self.inner.write(handle, at as u64 * 4, bytes)
    }

    /// Copies values back.
    ///
    /// # Errors
    /// Device lost, or a kernel before failed.
    ///
    /// # Panics
    /// The range ends beyond the array.
    pub fn download(&self, array: &Array, values: Range<usize>) -> Result<Vec<f32>> {
        assert!(values.end <= array.len, "{values:?} of {}", array.len);
        let mut out = vec![0.0; values.len()];
        if !out.is_empty() {
            let offset = values.start as u64 * 4;
            let bytes = bytemuck::cast_slice_mut(&mut out);
            self.inner.read(array.bytes.handle, offset, bytes)?;
        }
        Ok(out)
    }

    /// All values.
    ///
    /// # Errors
    /// As [`Self::download`].
    pub fn download_all(&self, array: &Array) -> Result<Vec<f32>> {
        self.download(array, 0..array.len)
    }

    /// A copy.
    ///
    /// # Errors
    /// Out of memory, device lost.
    pub fn duplicate(&self, array: &Array) -> Result<Array> {
        let copy = self.uninitialized(array.len)?;
        self.copy(array, 0..array.len, &copy, 0)?;
        Ok(copy)
    }

    /// Appends values of another array; memory grows by doubling.
    ///
    /// # Errors
    /// Out of memory, device lost.
    pub fn append(&self, array: &mut Array, from: &Array, values: Range<usize>) -> Result<()> {
        let len = array.len + values.len();
        if len as u64 * 4 > array.bytes.capacity {
            let grown = self.uninitialized(len.next_power_of_two())?;
            self.copy(array, 0..array.len, &grown, 0)?;
            array.bytes = grown.bytes;
        }
        self.copy(from, values, array, array.len)?;
        array.len = len;
        array.bytes.len = len as u64 * 4;
        Ok(())
    }

    fn copy(&self, from: &Array, values: Range<usize>, to: &Array, at: usize) -> Result<()> {
        if values.is_empty() {
            return Ok(());
        }
        self.inner.driver.copy(
            from.bytes.handle,
            values.start as u64 * 4,
            to.bytes.handle,
            at as u64 * 4,
            values.len() as u64 * 4,
        )
    }

    /// Runs a kernel on views that fit the device's limits.
    pub(crate) fn launch(
        &self,
        kernel: &'static Kernel,
        groups: u32,
        views: &[View],
        parameters: &[u32],
    ) -> Result<()> {
        assert_eq!(views.len(), kernel.views, "views of `{}`", kernel.name);
        if groups == 0 {
            return Ok(());
        }
        let limit = self.description().limits.view_bytes;
        if let Some(view) = views.iter().find(|view| view.bytes > limit) {
            return Err(DeviceError::LimitTooSmall {
                device: self.description().name.clone(),
                what: "buffer bindings",
                found: limit,
                needed: view.bytes,
            });
        }
        self.inner.driver.launch(&Launch {
            kernel,
            groups,
            views,
            parameters,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::driver::Limits;

    /// A device that is described, and tells what it is to run.
    struct Described {
        description: Description,
        launched: Arc<Mutex<Vec<&'static str>>>,
    }

    impl Driver for Described {
        fn description(&self) -> &Description {
            &self.description
        }

        fn allocate(&self, _: u64) -> Result<Handle> {
            Ok(Handle(0))
        }

        fn free(&self, _: Handle) {}

        fn write(&self, _: Handle, _: u64, _: &[u8]) -> Result<()> {
            Ok(())
        }

        fn read(&self, _: Handle, _: u64, _: &mut [u8]) -> Result<()> {
            Ok(())
        }

        fn copy(&self, _: Handle, _: u64, _: Handle, _: u64, _: u64) -> Result<()> {
            Ok(())
        }

        fn clear(&self, _: Handle, _: u64, _: u64) -> Result<()> {
            Ok(())
        }

        fn launch(&self, launch: &Launch) -> Result<()> {
            self.launched.lock().unwrap().push(launch.kernel.name);
            Ok(())
        }
    }

    /// What a product of matrices of this size runs.
    #[track_caller]
    fn check(is_software: bool, splits_floats: bool, size: usize, expected: &[&str]) {
        let launched = Arc::default();
        let description = Description {
            family: Family::Wgpu,
            name: String::new(),
            detail: String::new(),
            is_software,
            splits_floats,
            limits: Limits {
                view_bytes: 1 << 30,
                view_alignment: 256,
                allocation_bytes: 1 << 30,
                memory_bytes: None,
                group_threads: 256,
            },
        };
        let driver = Described {
            description,
            launched: Arc::clone(&launched),
        };
        let device = Device::new(Box::new(driver), None);
        let [a, b, mut out] = [(); 3].map(|()| device.uninitialized(size * size).unwrap());
        let layout = MatmulLayout::linear(size, size, size, 0, size);
        device.matmul(&layout, &a, &b, &mut out).unwrap();
        assert_eq!(*launched.lock().unwrap(), expected);
    }

    #[test]
    fn products_are_computed_as_the_device_is_described() {
        check(true, false, 1024, &["matmul_direct"]);
        check(false, false, 1024, &["matmul_tiled"]);
        let in_parts = ["split_floats", "split_floats", "matmul_split"];
        check(false, true, 1024, &in_parts);
        check(false, true, 128, &["matmul_tiled"]);
    }
}
