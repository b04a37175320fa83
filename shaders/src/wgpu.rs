//! Vulkan devices through wgpu.
//!
//! Enters: launches. Leaves: bytes. Commands are recorded and submitted in batches; uploads are recorded with them, so that
//! everything happens in the order of the calls. Validation and memory errors of wgpu are caught in scopes: none panics.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use crate::driver::{Description, Driver, Family, Handle, Launch, Limits, View};
use crate::error::{DeviceError, Result};
use crate::kernels::Kernel;

/// Launches that are recorded before they are submitted.
const BATCH: usize = 128;
/// Uploaded bytes that are held until they are submitted.
const STAGED_BYTES: u64 = 64 << 20;
/// A launch's parameters, at the widest alignment that adapters ask for.
const PARAMETERS_BYTES: u64 = 256;
/// What every kernel can be bound with: the smallest limit that WebGPU allows.
const LEAST_VIEW_BYTES: u64 = 128 << 20;
/// Storage buffers of the kernel that has most.
const STORAGE_BUFFERS: u32 = 7;

/// A Vulkan device.
pub struct Wgpu {
    description: Description,
    device: wgpu::Device,
    queue: wgpu::Queue,
    state: Mutex<State>,
    lost: Arc<OnceLock<String>>,
}

struct State {
    buffers: HashMap<Handle, wgpu::Buffer>,
    next: u64,
    pipelines: HashMap<&'static str, wgpu::ComputePipeline>,
    parameters: wgpu::Buffer,
    encoder: Option<wgpu::CommandEncoder>,
    recorded: usize,
    staged_bytes: u64,
}

fn instance() -> wgpu::Instance {
    let mut descriptor = wgpu::InstanceDescriptor::new_without_display_handle();
    descriptor.backends = wgpu::Backends::VULKAN;
    wgpu::Instance::new(descriptor)
}

/// Adapters, hardware before software, in the loader's order.
fn adapters() -> Result<Vec<wgpu::Adapter>> {
    // SAFETY: the loader's initializers run whichever way it is opened, as wgpu will do.
    let loader = unsafe { libloading::Library::new("libvulkan.so.1") };
    if cfg!(target_os = "linux") && loader.is_err() {
        return Err(DeviceError::NoDriver {
            family: Family::Wgpu.name(),
            library: "libvulkan.so.1",
        });
    }
    let mut adapters = pollster::block_on(instance().enumerate_adapters(wgpu::Backends::VULKAN));
    adapters.sort_by_key(|adapter| is_software(&adapter.get_info()));
    Ok(adapters)
}

fn is_software(info: &wgpu::AdapterInfo) -> bool {
    info.device_type == wgpu::DeviceType::Cpu
}

fn describe(adapter: &wgpu::Adapter) -> Description {
    let (info, limits) = (adapter.get_info(), adapter.limits());
    Description {
        family: Family::Wgpu,
        is_software: is_software(&info),
        splits_floats: false,
        detail: format!("{} {} ({:?})", info.driver, info.driver_info, info.backend),
        name: info.name,
        limits: Limits {
            view_bytes: limits.max_storage_buffer_binding_size,
            view_alignment: u64::from(limits.min_storage_buffer_offset_alignment),
            allocation_bytes: limits.max_buffer_size,
            memory_bytes: None,
            group_threads: limits.max_compute_invocations_per_workgroup,
        },
    }
}

/// What is there.
///
/// # Errors
/// No Vulkan loader.
pub fn list() -> Result<Vec<Description>> {
    Ok(adapters()?.iter().map(describe).collect())
}

/// Opens the adapter with this index in [`list`].
///
/// # Errors
/// No Vulkan loader, no such adapter, limits too small, or the driver refuses.
pub fn open(index: usize) -> Result<Box<dyn Driver>> {
    let mut adapters = adapters()?;
    if index >= adapters.len() {
        let family = Family::Wgpu.name();
        return Err(DeviceError::NoDevice { family, index });
    }
    let adapter = adapters.swap_remove(index);
    let description = describe(&adapter);
    check_limits(&description, &adapter.limits())?;
    Ok(Box::new(Wgpu::open(&adapter, description)?))
}

fn check_limits(description: &Description, limits: &wgpu::Limits) -> Result<()> {
    let needs = [
        (
            "buffer bindings",
            limits.max_storage_buffer_binding_size,
            LEAST_VIEW_BYTES,
        ),
        (
            "storage buffers",
            u64::from(limits.max_storage_buffers_per_shader_stage),
            u64::from(STORAGE_BUFFERS),
        ),
        (
            "threads of a group",
            u64::from(limits.max_compute_invocations_per_workgroup),
            256,
        ),
    ];
    match needs.into_iter().find(|(_, found, needed)| found < needed) {
        None => Ok(()),
        Some((what, found, needed)) => Err(DeviceError::LimitTooSmall {
            device: description.name.clone(),
            what,
            found,
            needed,
        }),
    }
}

impl Wgpu {
    fn open(adapter: &wgpu::Adapter, description: Description) -> Result<Self> {
        let wanted = wgpu::DeviceDescriptor {
            label: Some("nemoconv"),
            required_limits: adapter.limits(),
            ..Default::default()
        };
        let opened = pollster::block_on(adapter.request_device(&wanted));
        let (device, queue) = opened.map_err(|error| DeviceError::Call {
            call: "request_device",
            reason: error.to_string(),
        })?;
        let lost = Arc::new(OnceLock::new());
        let note = Arc::clone(&lost);
        device.set_device_lost_callback(move |_, reason| {
            // The first reason is the cause.
            let _ = note.set(reason);
        });
        let note = Arc::clone(&lost);
        device.on_uncaptured_error(Arc::new(move |error: wgpu::Error| {
            let _ = note.set(error.to_string());
        }));
        let parameters = device.create_buffer(&wgpu::BufferDescriptor {
            label: Some("parameters"),
            size: PARAMETERS_BYTES * BATCH as u64,
            usage: wgpu::BufferUsages::UNIFORM | wgpu::BufferUsages::COPY_DST,
            mapped_at_creation: false,
        });
        let state = State {
            buffers: HashMap::new(),
            next: 0,
            pipelines: HashMap::new(),
            parameters,
            encoder: None,
            recorded: 0,
            staged_bytes: 0,
        };
        Ok(Self {
            description,
            device,
            queue,
            state: Mutex::new(state),
            lost,
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn check_lost(&self) -> Result<()> {
        match self.lost.get() {
            None => Ok(()),
            Some(reason) => Err(DeviceError::Lost {
                reason: reason.clone(),
            }),
        }
    }

    /// Runs what may fail, and gives wgpu's error instead of its panic.
    fn guarded<T>(&self, run: impl FnOnce() -> T) -> std::result::Result<T, wgpu::Error> {
        let memory = self.device.push_error_scope(wgpu::ErrorFilter::OutOfMemory);
        let validation = self.device.push_error_scope(wgpu::ErrorFilter::Validation);
        let done = run();
        let validation = pollster::block_on(validation.pop());
        let memory = pollster::block_on(memory.pop());
        match memory.or(validation) {
            None => Ok(done),
            Some(error) => Err(error),
        }
    }

    fn create_buffer(&self, bytes: u64, usage: wgpu::BufferUsages) -> Result<wgpu::Buffer> {
        self.create(&wgpu::BufferDescriptor {
            label: None,
            size: bytes,
            usage,
            mapped_at_creation: false,
        })
    }

    /// A buffer with these bytes, to copy from. `wgpu::util` has one that panics where there is no memory for it.
    fn staged(&self, contents: &[u8]) -> Result<wgpu::Buffer> {
        let buffer = self.create(&wgpu::BufferDescriptor {
            label: Some("upload"),
            size: contents.len() as u64,
            usage: wgpu::BufferUsages::COPY_SRC,
            mapped_at_creation: true,
        })?;
        let mapped = buffer.get_mapped_range_mut(..);
        let mut mapped = mapped.map_err(|error| call("get_mapped_range_mut", &error))?;
        mapped.slice(..).copy_from_slice(contents);
        drop(mapped);
        buffer.unmap();
        Ok(buffer)
    }

    fn create(&self, descriptor: &wgpu::BufferDescriptor<'_>) -> Result<wgpu::Buffer> {
        let bytes = descriptor.size;
        self.guarded(|| self.device.create_buffer(descriptor))
            .map_err(|error| match error {
                wgpu::Error::OutOfMemory { .. } => DeviceError::OutOfMemory { bytes },
                other => call("create_buffer", &other),
            })
    }

    fn pipeline(&self, state: &mut State, kernel: &'static Kernel) -> Result<()> {
        if state.pipelines.contains_key(kernel.name) {
            return Ok(());
        }
        // Processors that stand in for a GPU multiply and add.
        let text = kernel.wgsl_text(!self.description.is_software);
        let compile = || {
            let module = self
                .device
                .create_shader_module(wgpu::ShaderModuleDescriptor {
                    label: Some(kernel.name),
                    source: wgpu::ShaderSource::Wgsl(text.into()),
                });
            self.device
                .create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
                    label: Some(kernel.name),
                    layout: None,
                    module: &module,
                    entry_point: Some(kernel.name),
                    compilation_options: wgpu::PipelineCompilationOptions::default(),
                    cache: None,
                })
        };
        let pipeline = self
            .guarded(compile)
            .map_err(|error| DeviceError::Compile {
                kernel: kernel.name,
                log: error.to_string(),
            })?;
        state.pipelines.insert(kernel.name, pipeline);
        Ok(())
    }

    fn record(&self, state: &mut State, launch: &Launch) {
        let slot = state.recorded as u64 * PARAMETERS_BYTES;
        let words: &[u8] = bytemuck::cast_slice(launch.parameters);
        self.queue.write_buffer(&state.parameters, slot, words);
        let pipeline = &state.pipelines[launch.kernel.name];
        let mut entries: Vec<_> = launch
            .views
            .iter()
            .enumerate()
            .map(|(binding, view)| entry(binding, state, view))
            .collect();
        entries.push(wgpu::BindGroupEntry {
            binding: launch.views.len() as u32,
            resource: wgpu::BindingResource::Buffer(wgpu::BufferBinding {
                buffer: &state.parameters,
                offset: slot,
                size: std::num::NonZeroU64::new(PARAMETERS_BYTES),
            }),
        });
        let group = self.device.create_bind_group(&wgpu::BindGroupDescriptor {
            label: Some(launch.kernel.name),
            layout: &pipeline.get_bind_group_layout(0),
            entries: &entries,
        });
        let encoder = encoder(&self.device, &mut state.encoder);
        let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
        pass.set_pipeline(pipeline);
        pass.set_bind_group(0, &group, &[]);
        let [x, y] = launch.grid();
        pass.dispatch_workgroups(x, y, 1);
    }

    fn submit(&self, state: &mut State) -> Result<()> {
        (state.recorded, state.staged_bytes) = (0, 0);
        if let Some(encoder) = state.encoder.take() {
            self.guarded(|| self.queue.submit([encoder.finish()]))
                .map_err(|error| call("submit", &error))?;
        }
        self.check_lost()
    }

    fn wait(&self) -> Result<()> {
        let polled = self.device.poll(wgpu::PollType::wait_indefinitely());
        polled.map_err(|error| DeviceError::Lost {
            reason: error.to_string(),
        })?;
        self.check_lost()
    }
}

fn call(call: &'static str, error: &dyn std::fmt::Display) -> DeviceError {
    DeviceError::Call {
        call,
        reason: error.to_string(),
    }
}

fn entry<'a>(binding: usize, state: &'a State, view: &View) -> wgpu::BindGroupEntry<'a> {
    wgpu::BindGroupEntry {
        binding: binding as u32,
        resource: wgpu::BindingResource::Buffer(wgpu::BufferBinding {
            buffer: &state.buffers[&view.memory],
            offset: view.offset,
            size: std::num::NonZeroU64::new(view.bytes),
        }),
    }
}

fn encoder<'a>(
    device: &wgpu::Device,
    encoder: &'a mut Option<wgpu::CommandEncoder>,
) -> &'a mut wgpu::CommandEncoder {
    encoder.get_or_insert_with(|| device.create_command_encoder(&Default::default()))
}

impl Driver for Wgpu {
    fn description(&self) -> &Description {
        &self.description
    }

    fn allocate(&self, bytes: u64) -> Result<Handle> {
        if bytes > self.description.limits.allocation_bytes {
            return Err(DeviceError::OutOfMemory { bytes });
        }
        let usage = wgpu::BufferUsages::STORAGE
            | wgpu::BufferUsages::COPY_DST
            | wgpu::BufferUsages::COPY_SRC;
        let buffer = self.create_buffer(bytes, usage)?;
        let mut state = self.state();
        let handle = Handle(state.next);
        state.next += 1;
        state.buffers.insert(handle, buffer);
        Ok(handle)
    }

    fn free(&self, memory: Handle) {
        // Recorded commands keep what they use.
        self.state().buffers.remove(&memory);
    }

    fn write(&self, memory: Handle, offset: u64, bytes: &[u8]) -> Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        let staged = self.staged(bytes)?;
        let mut state = self.state();
        let to = state.buffers[&memory].clone();
        let encoder = encoder(&self.device, &mut state.encoder);
        encoder.copy_buffer_to_buffer(&staged, 0, &to, offset, bytes.len() as u64);
        state.staged_bytes += bytes.len() as u64;
        if state.staged_bytes > STAGED_BYTES {
            self.submit(&mut state)?;
        }
        Ok(())
    }

    fn read(&self, memory: Handle, offset: u64, bytes: &mut [u8]) -> Result<()> {
        let len = bytes.len() as u64;
        let usage = wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST;
        let mapped = self.create_buffer(len, usage)?;
        {
            let mut state = self.state();
            let from = state.buffers[&memory].clone();
            let encoder = encoder(&self.device, &mut state.encoder);
            encoder.copy_buffer_to_buffer(&from, offset, &mapped, 0, len);
            self.submit(&mut state)?;
        }
        let slice = mapped.slice(..);
        let (send, receive) = std::sync::mpsc::channel();
        slice.map_async(wgpu::MapMode::Read, move |result| {
            // Nobody waits where waiting failed.
            let _ = send.send(result);
        });
        self.wait()?;
        let lost = |reason: String| DeviceError::Lost { reason };
        let result = receive.recv().map_err(|error| lost(error.to_string()))?;
        result.map_err(|error| lost(error.to_string()))?;
        let view = slice
            .get_mapped_range()
            .map_err(|error| lost(error.to_string()))?;
        bytes.copy_from_slice(&view);
        Ok(())
    }

    fn copy(
        &self,
        from: Handle,
        from_offset: u64,
        to: Handle,
        to_offset: u64,
        bytes: u64,
    ) -> Result<()> {
        let mut state = self.state();
        let (from, to) = (state.buffers[&from].clone(), state.buffers[&to].clone());
        let encoder = encoder(&self.device, &mut state.encoder);
        encoder.copy_buffer_to_buffer(&from, from_offset, &to, to_offset, bytes);
        Ok(())
    }

    fn clear(&self, memory: Handle, offset: u64, bytes: u64) -> Result<()> {
        let mut state = self.state();
        let buffer = state.buffers[&memory].clone();
        let encoder = encoder(&self.device, &mut state.encoder);
        encoder.clear_buffer(&buffer, offset, Some(bytes));
        Ok(())
    }

    fn launch(&self, launch: &Launch) -> Result<()> {
        let mut state = self.state();
        self.pipeline(&mut state, launch.kernel)?;
        self.guarded(|| self.record(&mut state, launch))
            .map_err(|error| call("dispatch", &error))?;
        state.recorded += 1;
        if state.recorded == BATCH {
            self.submit(&mut state)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels;

    /// The first adapter, where there is one.
    fn opened() -> Option<Wgpu> {
        let adapter = adapters().ok()?.into_iter().next()?;
        Some(Wgpu::open(&adapter, describe(&adapter)).unwrap())
    }

    #[test]
    fn adapters_that_allow_too_little_are_refused() {
        let Some(driver) = opened() else {
            return;
        };
        let check = |limits: wgpu::Limits, expected: Option<&str>| {
            let refused = match check_limits(&driver.description, &limits) {
                Err(DeviceError::LimitTooSmall { what, .. }) => Some(what),
                other => other.err().map(|_| "another error"),
            };
            assert_eq!(refused, expected);
        };
        let least = wgpu::Limits {
            max_storage_buffers_per_shader_stage: STORAGE_BUFFERS,
            ..wgpu::Limits::default()
        };
        check(least.clone(), None);
        let bindings = wgpu::Limits {
            max_storage_buffer_binding_size: LEAST_VIEW_BYTES - 1,
            ..least.clone()
        };
        check(bindings, Some("buffer bindings"));
        let buffers = wgpu::Limits {
            max_storage_buffers_per_shader_stage: STORAGE_BUFFERS - 1,
            ..least.clone()
        };
        check(buffers, Some("storage buffers"));
        let threads = wgpu::Limits {
            max_compute_invocations_per_workgroup: 255,
            ..least
        };
        check(threads, Some("threads of a group"));
    }

    /// Whatever is asked of it: an error and no panic, and sooner or later the one that says so.
    #[test]
    fn a_device_that_is_lost_says_so() {
        let Some(driver) = opened() else {
            return;
        };
        let memory = driver.allocate(1024).unwrap();
        driver.write(memory, 0, &[1; 1024]).unwrap();
        driver.device.destroy();
        let view = View {
            memory,
            offset: 0,
            bytes: 1024,
        };
        let launch = Launch {
            kernel: &kernels::RELU_SQUARED,
            groups: 1,
            views: &[view],
            parameters: &[256],
        };
        let launched = driver.launch(&launch);
        let written = driver.write(memory, 0, &[2; 1024]);
        let cleared = driver.clear(memory, 0, 1024);
        let read = driver.read(memory, 0, &mut [0; 1024]);
        let all = [launched, written, cleared, read];
        let last = all.last().unwrap();
        assert!(matches!(last, Err(DeviceError::Lost { .. })), "{all:?}");
    }
}
