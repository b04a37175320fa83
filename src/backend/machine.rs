//! The machine that was chosen: the CPU or a device. One type, so that whatever runs networks is compiled once.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use super::activation::Activation;
use super::cpu::{Cpu, CpuWeight, Residence};
#[cfg(feature = "device")]
use super::device::{DeviceWeight, OnDevice, OpenDevice};
use super::magnitudes::Magnitudes;
use super::tally::Tally;
use super::{
    AttentionShape, Backend, ColumnSums, ExpertRows, Exponentials, KeyValues, KlDivergence,
    LogitRows, ProductSums, RouteShape, ScanShape, ScanWeights, Segment, SoftmaxSums,
};
use crate::artifact::{StoredModel, StoredTensor};
use crate::error::Result;
use crate::model::config::NemotronHConfig;
use crate::parallel;
use crate::quantize::feedback::RowProducts;
use crate::rewrite::Mixer;

/// Parts of the work that go side by side on the CPU: what one of them leaves idle the other takes.
pub const SIDE_BY_SIDE: usize = 2;

/// Where networks are run.
#[derive(Clone, Default)]
pub enum Machines {
    /// On this computer's processor.
    #[default]
    Cpu,
    /// On one device or several, at least one.
    #[cfg(feature = "device")]
    Devices(Arc<[Arc<OpenDevice>]>),
}

impl Machines {
    /// A machine for the weights of `model`: of several the first.
    pub fn machine(&self, model: Arc<StoredModel>, residence: Residence) -> Machine {
        self.nth(0, model, residence)
    }

    /// Machine `index`, counted around where there are fewer.
    #[cfg_attr(
        not(feature = "device"),
        allow(unused_variables, reason = "there is one processor")
    )]
    pub fn nth(&self, index: usize, model: Arc<StoredModel>, residence: Residence) -> Machine {
        let cpu = Cpu::new(model, residence);
        match self {
            Self::Cpu => Machine::Cpu(cpu),
            #[cfg(feature = "device")]
            Self::Devices(open) => {
                let open = Arc::clone(&open[index % open.len()]);
                Machine::Device(OnDevice::new(open, cpu))
            }
        }
    }

    /// All machines, each for the weights of `model`.
    pub fn all(&self, model: &Arc<StoredModel>, residence: Residence) -> Vec<Machine> {
        let all = 0..self.count();
        all.map(|index| self.nth(index, Arc::clone(model), residence))
            .collect()
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        match self {
            Self::Cpu => 1,
            #[cfg(feature = "device")]
            Self::Devices(open) => open.len(),
        }
    }

    /// Machine `index`, counted around, for operations without weights, of the network that `config` describes.
    pub fn without_weights(&self, index: usize, config: &NemotronHConfig) -> Machine {
        let path = Path::new("no weights");
        let nothing = StoredModel::in_memory(path, config.clone(), Vec::new());
        let nothing = Arc::new(nothing.expect("nothing cannot be malformed"));
        self.nth(index, nothing, Residence::Mapped)
    }

    /// Who mixes rows and columns of weights, if not the CPU: of several devices the first.
    pub fn mixer(&self) -> Option<Arc<dyn Mixer>> {
        match self {
            Self::Cpu => None,
            #[cfg(feature = "device")]
            Self::Devices(open) => Some(Arc::clone(&open[0]) as _),
        }
    }

    /// Does something for each of a few parts of the work: on the CPU side by side, on devices, which do that by themselves,
    /// in turn.
    ///
    /// # Errors
    /// Whatever `run` returns.
    pub fn each<T: Send>(
        &self,
        parts: Range<usize>,
        run: impl Fn(usize) -> Result<T> + Send + Sync,
    ) -> Result<Vec<T>> {
        match self {
            Self::Cpu => parallel::try_map(parts, run),
            #[cfg(feature = "device")]
            Self::Devices(_) => parts.map(run).collect(),
        }
    }

    /// What kinds of machines they are: results of different kinds differ in last bits.
    pub fn name(&self) -> String {
        match self {
            Self::Cpu => "cpu".to_owned(),
            #[cfg(feature = "device")]
            Self::Devices(open) => {
                let names = open.iter();
                let mut names: Vec<&str> = names
                    .map(|open| open.device().description().family.name())
                    .collect();
                names.dedup();
                names.join("+")
            }
        }
    }

    /// Parts of the work that go side by side in [`Self::each`].
    pub fn abreast(&self) -> usize {
        match self {
            Self::Cpu => SIDE_BY_SIDE,
            #[cfg(feature = "device")]
            Self::Devices(_) => 1,
        }
    }

    /// Which operations ran where, by device; nothing to tell of the CPU.
    pub fn tallies(&self) -> Vec<&Tally> {
        match self {
            Self::Cpu => Vec::new(),
            #[cfg(feature = "device")]
            Self::Devices(open) => open.iter().map(|open| open.tally()).collect(),
        }
    }
}

/// The CPU or a device, with a model's weights.
pub enum Machine {
    /// This computer's processor.
    Cpu(Cpu),
    /// A device.
    #[cfg(feature = "device")]
    Device(OnDevice),
}

/// An array of either.
pub enum MachineBuffer {
    /// In the computer's memory.
    Host(Vec<f32>),
    /// On the device.
    #[cfg(feature = "device")]
    Device(nemoconv_device::Array),
}

/// A weight of either.
pub enum MachineWeight {
    /// For the CPU.
    Host(CpuWeight),
    /// For the device.
    #[cfg(feature = "device")]
    Device(DeviceWeight),
}

impl Default for MachineBuffer {
    fn default() -> Self {
        Self::Host(Vec::new())
    }
}

/// Why a buffer is never another machine's.
#[cfg(feature = "device")]
const OWN: &str = "buffers stay on the machine that made them";

macro_rules! sides {
    ($of:ident, $host:ty, $device:ty) => {
        impl $of {
            fn host(&self) -> &$host {
                match self {
                    Self::Host(host) => host,
                    #[cfg(feature = "device")]
                    Self::Device(_) => panic!("{OWN}"),
                }
            }

            #[cfg(feature = "device")]
            fn device(&self) -> &$device {
                match self {
                    Self::Device(device) => device,
                    Self::Host(_) => panic!("{OWN}"),
                }
            }
        }
    };
}

sides!(MachineBuffer, Vec<f32>, nemoconv_device::Array);
sides!(MachineWeight, CpuWeight, DeviceWeight);

impl MachineBuffer {
    fn host_mut(&mut self) -> &mut Vec<f32> {
        match self {
            Self::Host(host) => host,
            #[cfg(feature = "device")]
            Self::Device(_) => panic!("{OWN}"),
        }
    }

    fn into_host(self) -> Vec<f32> {
        match self {
            Self::Host(host) => host,
            #[cfg(feature = "device")]
            Self::Device(_) => panic!("{OWN}"),
        }
    }

    #[cfg(feature = "device")]
    fn device_mut(&mut self) -> &mut nemoconv_device::Array {
        match self {
            Self::Device(device) => device,
            Self::Host(_) => panic!("{OWN}"),
        }
    }

    #[cfg(feature = "device")]
    fn into_device(self) -> nemoconv_device::Array {
        match self {
            Self::Device(device) => device,
            Self::Host(_) => panic!("{OWN}"),
        }
    }
}

macro_rules! either {
    ($machine:expr, $cpu:ident => $on_cpu:expr, $device:ident => $on_device:expr) => {
        match $machine {
            Machine::Cpu($cpu) => $on_cpu,
            #[cfg(feature = "device")]
            Machine::Device($device) => $on_device,
        }
    };
}

/// The same for what gives a buffer.
macro_rules! buffer {
    ($machine:expr, $cpu:ident => $on_cpu:expr, $device:ident => $on_device:expr) => {
        match $machine {
            Machine::Cpu($cpu) => $on_cpu.map(MachineBuffer::Host),
            #[cfg(feature = "device")]
            Machine::Device($device) => $on_device.map(MachineBuffer::Device),
        }
    };
}

/// Segments whose states are arrays of one side.
fn segments_of<'s, T>(
    segments: &'s mut [Segment<'_, MachineBuffer>],
    side: fn(&'s mut MachineBuffer) -> &'s mut T,
) -> Vec<Segment<'s, T>> {
    let segments = segments.iter_mut();
    segments
        .map(|segment| Segment {
            rows: segment.rows.clone(),
            position: segment.position,
            state: side(segment.state),
        })
        .collect()
}

impl<'a> LogitRows<'a, MachineBuffer> {
    /// The same of one side.
    fn on<T>(&self, side: fn(&'a MachineBuffer) -> &'a T) -> LogitRows<'a, T> {
        LogitRows {
            logits: side(self.logits),
            stride: self.stride,
        }
    }
}

/// Runs with caches of one side, which are put back whatever comes.
fn with_caches<T>(
    segments: &mut [Segment<'_, KeyValues<MachineBuffer>>],
    out_of: fn(MachineBuffer) -> T,
    into: fn(T) -> MachineBuffer,
    run: impl FnOnce(&mut [Segment<'_, KeyValues<T>>]) -> Result<T>,
) -> Result<MachineBuffer> {
    let take = |cache: &mut KeyValues<MachineBuffer>| {
        let KeyValues { keys, values } = std::mem::take(cache);
        KeyValues {
            keys: out_of(keys),
            values: out_of(values),
        }
    };
    let mut caches: Vec<KeyValues<T>> = segments.iter_mut().map(|s| take(s.state)).collect();
    let mut sided: Vec<_> = segments
        .iter()
        .zip(&mut caches)
        .map(|(segment, state)| Segment {
            rows: segment.rows.clone(),
            position: segment.position,
            state,
        })
        .collect();
    let out = run(&mut sided);
    for (segment, KeyValues { keys, values }) in segments.iter_mut().zip(caches) {
        *segment.state = KeyValues {
            keys: into(keys),
            values: into(values),
        };
    }
    out.map(into)
}

type MachineSums<'a> = Box<dyn ProductSums<MachineBuffer> + 'a>;

/// Sums of one side that take buffers of either.
struct SidedSums<'a, T> {
    sums: Box<dyn ProductSums<T> + 'a>,
    side: fn(&MachineBuffer) -> &T,
}

fn sums_of<'a, T: 'a>(
    sums: Box<dyn ProductSums<T> + 'a>,
    side: fn(&MachineBuffer) -> &T,
) -> MachineSums<'a> {
    Box::new(SidedSums { sums, side })
}

impl<T> ProductSums<MachineBuffer> for SidedSums<'_, T> {
    fn add(&mut self, v: &MachineBuffer, u: &MachineBuffer) -> Result<()> {
        self.sums.add((self.side)(v), (self.side)(u))
    }

    fn finish(&self, sums: &mut [f64]) -> Result<()> {
        self.sums.finish(sums)
    }
}

impl Backend for Machine {
    type Buffer = MachineBuffer;
    type Weight = MachineWeight;

    fn host(&self) -> &Cpu {
        either!(self, cpu => cpu, device => device.host())
    }

    fn host_weight<'a>(&self, weight: &'a MachineWeight) -> &'a CpuWeight {
        either!(self, _cpu => weight.host(), device => device.host_weight(weight.device()))
    }

    fn shares_buffers(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Cpu(cpu), Self::Cpu(other)) => cpu.shares_buffers(other),
            #[cfg(feature = "device")]
            (Self::Device(device), Self::Device(other)) => device.shares_buffers(other),
            #[cfg(feature = "device")]
            _ => false,
        }
    }

    fn on_host(&self, operation: &'static str) {
        either!(self, cpu => cpu.on_host(operation), device => device.on_host(operation));
    }

    fn weight(&self, tensor: &StoredTensor) -> Result<MachineWeight> {
        match self {
            Self::Cpu(cpu) => cpu.weight(tensor).map(MachineWeight::Host),
            #[cfg(feature = "device")]
            Self::Device(device) => device.weight(tensor).map(MachineWeight::Device),
        }
    }

    fn upload(&self, values: Vec<f32>) -> Result<MachineBuffer> {
        buffer!(self, cpu => cpu.upload(values), device => device.upload(values))
    }

    fn len(&self, buffer: &MachineBuffer) -> usize {
        either!(self, cpu => cpu.len(buffer.host()), device => device.len(buffer.device()))
    }

    fn download(&self, buffer: &MachineBuffer, part: Range<usize>) -> Result<Vec<f32>> {
        either!(self, cpu => cpu.download(buffer.host(), part), device => device.download(buffer.device(), part))
    }

    fn download_all(&self, buffer: MachineBuffer) -> Result<Vec<f32>> {
        either!(self, cpu => cpu.download_all(buffer.into_host()), device => device.download_all(buffer.into_device()))
    }

    fn zeros(&self, len: usize) -> Result<MachineBuffer> {
        buffer!(self, cpu => cpu.zeros(len), device => device.zeros(len))
    }

    fn kept_zeros(&self, lengths: &[usize]) -> Result<Option<Vec<MachineBuffer>>> {
        either!(
            self,
            cpu => Ok(cpu.kept_zeros(lengths)?.map(|all| all.into_iter().map(MachineBuffer::Host).collect())),
            device => Ok(device.kept_zeros(lengths)?.map(|all| all.into_iter().map(MachineBuffer::Device).collect()))
        )
    }

    fn kept_copy(&self, buffer: &MachineBuffer) -> Result<Option<MachineBuffer>> {
        either!(
            self,
            cpu => Ok(cpu.kept_copy(buffer.host())?.map(MachineBuffer::Host)),
            device => Ok(device.kept_copy(buffer.device())?.map(MachineBuffer::Device))
        )
    }

    fn duplicate(&self, buffer: &MachineBuffer) -> Result<MachineBuffer> {
        buffer!(self, cpu => cpu.duplicate(buffer.host()), device => device.duplicate(buffer.device()))
    }

    fn embed(&self, embedding: &MachineWeight, tokens: &[u32]) -> Result<MachineBuffer> {
        buffer!(self, cpu => cpu.embed(embedding.host(), tokens), device => device.embed(embedding.device(), tokens))
    }

    fn matmul(
        &self,
        weight: &MachineWeight,
        matrix: usize,
        input: &MachineBuffer,
        rows: usize,
        activation: Activation,
    ) -> Result<MachineBuffer> {
        buffer!(
            self,
            cpu => cpu.matmul(weight.host(), matrix, input.host(), rows, activation),
            device => device.matmul(weight.device(), matrix, input.device(), rows, activation)
        )
    }

    fn rms_norm(
        &self,
        input: &MachineBuffer,
        weight: &MachineBuffer,
        eps: f32,
    ) -> Result<MachineBuffer> {
        buffer!(
            self,
            cpu => cpu.rms_norm(input.host(), weight.host(), eps),
            device => device.rms_norm(input.device(), weight.device(), eps)
        )
    }

    fn gated_rms_norm(
        &self,
        y: MachineBuffer,
        z: &MachineBuffer,
        z_stride: usize,
        weight: &MachineBuffer,
        groups: usize,
        eps: f32,
    ) -> Result<MachineBuffer> {
        buffer!(
            self,
            cpu => cpu.gated_rms_norm(y.into_host(), z.host(), z_stride, weight.host(), groups, eps),
            device => device.gated_rms_norm(y.into_device(), z.device(), z_stride, weight.device(), groups, eps)
        )
    }

    fn conv1d_silu(
        &self,
        input: &MachineBuffer,
        stride: usize,
        first: usize,
        weight: &MachineBuffer,
        bias: &MachineBuffer,
        segments: &mut [Segment<'_, MachineBuffer>],
    ) -> Result<MachineBuffer> {
        buffer!(
            self,
            cpu => cpu.conv1d_silu(input.host(), stride, first, weight.host(), bias.host(), &mut segments_of(segments, MachineBuffer::host_mut)),
            device => device.conv1d_silu(input.device(), stride, first, weight.device(), bias.device(), &mut segments_of(segments, MachineBuffer::device_mut))
        )
    }

    fn selective_scan(
        &self,
        xbc: &MachineBuffer,
        dt: &MachineBuffer,
        dt_stride: usize,
        weights: ScanWeights<'_, MachineBuffer>,
        shape: ScanShape,
        segments: &mut [Segment<'_, MachineBuffer>],
    ) -> Result<MachineBuffer> {
        let ScanWeights { a, d, dt_bias } = weights;
        match self {
            Self::Cpu(cpu) => {
                let weights = ScanWeights {
                    a: a.host(),
                    d: d.host(),
                    dt_bias: dt_bias.host(),
                };
                let segments = &mut segments_of(segments, MachineBuffer::host_mut);
                cpu.selective_scan(xbc.host(), dt.host(), dt_stride, weights, shape, segments)
                    .map(MachineBuffer::Host)
            }
            #[cfg(feature = "device")]
            Self::Device(device) => {
                let weights = ScanWeights {
                    a: a.device(),
                    d: d.device(),
                    dt_bias: dt_bias.device(),
                };
                let segments = &mut segments_of(segments, MachineBuffer::device_mut);
                device
                    .selective_scan(
                        xbc.device(),
                        dt.device(),
                        dt_stride,
                        weights,
                        shape,
                        segments,
                    )
                    .map(MachineBuffer::Device)
            }
        }
    }

    fn attention(
        &self,
        query: &MachineBuffer,
        keys: &MachineBuffer,
        values: &MachineBuffer,
        shape: AttentionShape,
        segments: &mut [Segment<'_, KeyValues<MachineBuffer>>],
    ) -> Result<MachineBuffer> {
        either!(
            self,
            cpu => with_caches(segments, MachineBuffer::into_host, MachineBuffer::Host, |segments| {
                cpu.attention(query.host(), keys.host(), values.host(), shape, segments)
            }),
            device => with_caches(segments, MachineBuffer::into_device, MachineBuffer::Device, |segments| {
                device.attention(query.device(), keys.device(), values.device(), shape, segments)
            })
        )
    }

    fn relu_squared(&self, values: &mut MachineBuffer) -> Result<()> {
        either!(self, cpu => cpu.relu_squared(values.host_mut()), device => device.relu_squared(values.device_mut()))
    }

    fn scale(&self, values: &mut MachineBuffer, factor: f32) -> Result<()> {
        either!(self, cpu => cpu.scale(values.host_mut(), factor), device => device.scale(values.device_mut(), factor))
    }

    fn add_bias(&self, rows: &mut MachineBuffer, bias: &MachineBuffer) -> Result<()> {
        either!(self, cpu => cpu.add_bias(rows.host_mut(), bias.host()), device => device.add_bias(rows.device_mut(), bias.device()))
    }

    fn is_finite(&self, values: &MachineBuffer) -> Result<bool> {
        either!(self, cpu => cpu.is_finite(values.host()), device => device.is_finite(values.device()))
    }

    fn add(&self, sum: &mut MachineBuffer, values: &MachineBuffer) -> Result<()> {
        either!(self, cpu => cpu.add(sum.host_mut(), values.host()), device => device.add(sum.device_mut(), values.device()))
    }

    fn route(
        &self,
        logits: &MachineBuffer,
        bias: &MachineBuffer,
        shape: RouteShape,
    ) -> Result<Vec<ExpertRows>> {
        either!(self, cpu => cpu.route(logits.host(), bias.host(), shape), device => device.route(logits.device(), bias.device(), shape))
    }

    fn gather(&self, input: &MachineBuffer, width: usize, rows: &[u32]) -> Result<MachineBuffer> {
        buffer!(self, cpu => cpu.gather(input.host(), width, rows), device => device.gather(input.device(), width, rows))
    }

    fn scatter_add(
        &self,
        sum: &mut MachineBuffer,
        width: usize,
        values: &MachineBuffer,
        rows: &ExpertRows,
    ) -> Result<()> {
        either!(
            self,
            cpu => cpu.scatter_add(sum.host_mut(), width, values.host(), rows),
            device => device.scatter_add(sum.device_mut(), width, values.device(), rows)
        )
    }

    fn softmax_sums(&self, logits: &MachineBuffer, width: usize) -> Result<Vec<SoftmaxSums>> {
        either!(self, cpu => cpu.softmax_sums(logits.host(), width), device => device.softmax_sums(logits.device(), width))
    }

    fn kl_divergence(
        &self,
        reference: LogitRows<'_, MachineBuffer>,
        other: LogitRows<'_, MachineBuffer>,
        width: usize,
        exponentials: Exponentials,
    ) -> Result<Vec<KlDivergence>> {
        either!(
            self,
            cpu => cpu.kl_divergence(reference.on(MachineBuffer::host), other.on(MachineBuffer::host), width, exponentials),
            device => device.kl_divergence(reference.on(MachineBuffer::device), other.on(MachineBuffer::device), width, exponentials)
        )
    }

    fn scale_rows(
        &self,
        rows: &MachineBuffer,
        width: usize,
        factors: &[f32],
    ) -> Result<MachineBuffer> {
        buffer!(self, cpu => cpu.scale_rows(rows.host(), width, factors), device => device.scale_rows(rows.device(), width, factors))
    }

    fn column_sums(&self, rows: &MachineBuffer, n: usize) -> Result<ColumnSums> {
        either!(self, cpu => cpu.column_sums(rows.host(), n), device => device.column_sums(rows.device(), n))
    }

    fn magnitudes(&self, values: &MachineBuffer) -> Result<Magnitudes> {
        either!(self, cpu => cpu.magnitudes(values.host()), device => device.magnitudes(values.device()))
    }

    fn gram(&self, rows: &MachineBuffer, n: usize, sums: &mut [f64]) -> Result<()> {
        either!(self, cpu => cpu.gram(rows.host(), n, sums), device => device.gram(rows.device(), n, sums))
    }

    fn cross_gram(
        &self,
        (v, width): (&MachineBuffer, usize),
        (u, n): (&MachineBuffer, usize),
        sums: &mut [f64],
    ) -> Result<()> {
        either!(
            self,
            cpu => cpu.cross_gram((v.host(), width), (u.host(), n), sums),
            device => device.cross_gram((v.device(), width), (u.device(), n), sums)
        )
    }

    fn gram_sums(&self, n: usize) -> Result<Option<MachineSums<'_>>> {
        either!(
            self,
            cpu => Ok(cpu.gram_sums(n)?.map(|sums| sums_of(sums, MachineBuffer::host))),
            device => Ok(device.gram_sums(n)?.map(|sums| sums_of(sums, MachineBuffer::device)))
        )
    }

    fn cross_gram_sums(&self, width: usize, n: usize) -> Result<Option<MachineSums<'_>>> {
        either!(
            self,
            cpu => Ok(cpu.cross_gram_sums(width, n)?.map(|sums| sums_of(sums, MachineBuffer::host))),
            device => Ok(device.cross_gram_sums(width, n)?.map(|sums| sums_of(sums, MachineBuffer::device)))
        )
    }

    fn row_products(&self) -> Option<&dyn RowProducts> {
        either!(self, cpu => cpu.row_products(), device => device.row_products())
    }
}
