//! What a machine has no kernel for: its buffers are brought to the host, computed there and brought back.
//!
//! Enters: buffers of any backend. Leaves: the same. Every step is counted as one of the host.

use super::activation::Activation;
use super::magnitudes::Magnitudes;
use super::{
    AttentionShape, Backend, ColumnSums, ExpertRows, Exponentials, KeyValues, KlDivergence,
    LogitRows, RouteShape, ScanShape, ScanWeights, Segment, SoftmaxSums,
};
use crate::error::Result;

fn fetch<B: Backend + ?Sized>(backend: &B, buffer: &B::Buffer) -> Result<Vec<f32>> {
    backend.download(buffer, 0..backend.len(buffer))
}

/// Fetches a buffer, lets the host change it, and puts it back.
fn in_place<B: Backend + ?Sized>(
    backend: &B,
    buffer: &mut B::Buffer,
    change: impl FnOnce(&mut Vec<f32>) -> Result<()>,
) -> Result<()> {
    let mut values = fetch(backend, buffer)?;
    change(&mut values)?;
    *buffer = backend.upload(values)?;
    Ok(())
}

/// Runs what reads and advances states, on copies of them.
fn with_states<B: Backend + ?Sized>(
    backend: &B,
    segments: &mut [Segment<'_, B::Buffer>],
    run: impl FnOnce(&mut [Segment<'_, Vec<f32>>]) -> Result<Vec<f32>>,
) -> Result<B::Buffer> {
    let states = segments.iter().map(|segment| fetch(backend, segment.state));
    let mut states = states.collect::<Result<Vec<_>>>()?;
    let mut on_host: Vec<_> = segments
        .iter()
        .zip(&mut states)
        .map(|(segment, state)| Segment {
            rows: segment.rows.clone(),
            position: segment.position,
            state,
        })
        .collect();
    let out = run(&mut on_host)?;
    for (segment, state) in segments.iter_mut().zip(states) {
        *segment.state = backend.upload(state)?;
    }
    backend.upload(out)
}

pub fn duplicate<B: Backend + ?Sized>(backend: &B, buffer: &B::Buffer) -> Result<B::Buffer> {
    backend.upload(fetch(backend, buffer)?)
}

pub fn embed<B: Backend + ?Sized>(
    backend: &B,
    embedding: &B::Weight,
    tokens: &[u32],
) -> Result<B::Buffer> {
    backend.on_host("embed");
    let embedding = backend.host_weight(embedding);
    backend.upload(backend.host().embed(embedding, tokens)?)
}

pub fn matmul<B: Backend + ?Sized>(
    backend: &B,
    weight: &B::Weight,
    matrix: usize,
    input: &B::Buffer,
    rows: usize,
    activation: Activation,
) -> Result<B::Buffer> {
    backend.on_host("matmul");
    let (host, input) = (backend.host(), fetch(backend, input)?);
    let weight = backend.host_weight(weight);
    backend.upload(host.matmul(weight, matrix, &input, rows, activation)?)
}

pub fn rms_norm<B: Backend + ?Sized>(
    backend: &B,
    input: &B::Buffer,
    weight: &B::Buffer,
    eps: f32,
) -> Result<B::Buffer> {
    backend.on_host("rms_norm");
    let (input, weight) = (fetch(backend, input)?, fetch(backend, weight)?);
    backend.upload(backend.host().rms_norm(&input, &weight, eps)?)
}

pub fn gated_rms_norm<B: Backend + ?Sized>(
    backend: &B,
    y: B::Buffer,
    z: &B::Buffer,
    z_stride: usize,
    weight: &B::Buffer,
    groups: usize,
    eps: f32,
) -> Result<B::Buffer> {
    backend.on_host("gated_rms_norm");
    let (y, z) = (backend.download_all(y)?, fetch(backend, z)?);
    let (host, weight) = (backend.host(), fetch(backend, weight)?);
    backend.upload(host.gated_rms_norm(y, &z, z_stride, &weight, groups, eps)?)
}

pub fn conv1d_silu<B: Backend + ?Sized>(
    backend: &B,
    input: &B::Buffer,
    stride: usize,
    first: usize,
    weight: &B::Buffer,
    bias: &B::Buffer,
    segments: &mut [Segment<'_, B::Buffer>],
) -> Result<B::Buffer> {
    backend.on_host("conv1d_silu");
    let (input, weight) = (fetch(backend, input)?, fetch(backend, weight)?);
    let (host, bias) = (backend.host(), fetch(backend, bias)?);
    with_states(backend, segments, |segments| {
        host.conv1d_silu(&input, stride, first, &weight, &bias, segments)
    })
}

pub fn selective_scan<B: Backend + ?Sized>(
    backend: &B,
    xbc: &B::Buffer,
    dt: &B::Buffer,
    dt_stride: usize,
    weights: ScanWeights<'_, B::Buffer>,
    shape: ScanShape,
    segments: &mut [Segment<'_, B::Buffer>],
) -> Result<B::Buffer> {
    backend.on_host("selective_scan");
    let (xbc, dt) = (fetch(backend, xbc)?, fetch(backend, dt)?);
    let (a, d) = (fetch(backend, weights.a)?, fetch(backend, weights.d)?);
    let (host, dt_bias) = (backend.host(), fetch(backend, weights.dt_bias)?);
    with_states(backend, segments, |segments| {
        let weights = ScanWeights {
            a: &a,
            d: &d,
            dt_bias: &dt_bias,
        };
        host.selective_scan(&xbc, &dt, dt_stride, weights, shape, segments)
    })
}

pub fn attention<B: Backend + ?Sized>(
    backend: &B,
    query: &B::Buffer,
    keys: &B::Buffer,
    values: &B::Buffer,
    shape: AttentionShape,
    segments: &mut [Segment<'_, KeyValues<B::Buffer>>],
) -> Result<B::Buffer> {
    backend.on_host("attention");
    let (host, query) = (backend.host(), fetch(backend, query)?);
    let (keys, values) = (fetch(backend, keys)?, fetch(backend, values)?);
    let mut caches = Vec::with_capacity(segments.len());
    for segment in segments.iter() {
        caches.push(KeyValues {
            keys: fetch(backend, &segment.state.keys)?,
            values: fetch(backend, &segment.state.values)?,
        });
    }
    let mut on_host: Vec<_> = segments
        .iter()
        .zip(&mut caches)
        .map(|(segment, state)| Segment {
            rows: segment.rows.clone(),
            position: segment.position,
            state,
        })
        .collect();
    let out = host.attention(&query, &keys, &values, shape, &mut on_host)?;
    for (segment, cache) in segments.iter_mut().zip(caches) {
        segment.state.keys = backend.upload(cache.keys)?;
        segment.state.values = backend.upload(cache.values)?;
    }
    backend.upload(out)
}

pub fn relu_squared<B: Backend + ?Sized>(backend: &B, values: &mut B::Buffer) -> Result<()> {
    backend.on_host("relu_squared");
    in_place(backend, values, |values| {
        backend.host().relu_squared(values)
    })
}

pub fn scale<B: Backend + ?Sized>(backend: &B, values: &mut B::Buffer, factor: f32) -> Result<()> {
    backend.on_host("scale");
    in_place(backend, values, |values| {
        backend.host().scale(values, factor)
    })
}

pub fn add_bias<B: Backend + ?Sized>(
    backend: &B,
    rows: &mut B::Buffer,
    bias: &B::Buffer,
) -> Result<()> {
    backend.on_host("add_bias");
    let bias = fetch(backend, bias)?;
    in_place(backend, rows, |rows| backend.host().add_bias(rows, &bias))
}

pub fn is_finite<B: Backend + ?Sized>(backend: &B, values: &B::Buffer) -> Result<bool> {
    backend.on_host("is_finite");
    backend.host().is_finite(&fetch(backend, values)?)
}

pub fn add<B: Backend + ?Sized>(
    backend: &B,
    sum: &mut B::Buffer,
    values: &B::Buffer,
) -> Result<()> {
    backend.on_host("add");
    let values = fetch(backend, values)?;
    in_place(backend, sum, |sum| backend.host().add(sum, &values))
}

pub fn route<B: Backend + ?Sized>(
    backend: &B,
    logits: &B::Buffer,
    bias: &B::Buffer,
    shape: RouteShape,
) -> Result<Vec<ExpertRows>> {
    backend.on_host("route");
    let (logits, bias) = (fetch(backend, logits)?, fetch(backend, bias)?);
    backend.host().route(&logits, &bias, shape)
}

pub fn gather<B: Backend + ?Sized>(
    backend: &B,
    input: &B::Buffer,
    width: usize,
    rows: &[u32],
) -> Result<B::Buffer> {
    backend.on_host("gather");
    let input = fetch(backend, input)?;
    backend.upload(backend.host().gather(&input, width, rows)?)
}

pub fn scatter_add<B: Backend + ?Sized>(
    backend: &B,
    sum: &mut B::Buffer,
    width: usize,
    values: &B::Buffer,
    rows: &ExpertRows,
) -> Result<()> {
    backend.on_host("scatter_add");
    let values = fetch(backend, values)?;
    in_place(backend, sum, |sum| {
        backend.host().scatter_add(sum, width, &values, rows)
    })
}

pub fn softmax_sums<B: Backend + ?Sized>(
    backend: &B,
    logits: &B::Buffer,
    width: usize,
) -> Result<Vec<SoftmaxSums>> {
    backend.on_host("softmax_sums");
    backend.host().softmax_sums(&fetch(backend, logits)?, width)
}

pub fn kl_divergence<B: Backend + ?Sized>(
    backend: &B,
    reference: LogitRows<'_, B::Buffer>,
    other: LogitRows<'_, B::Buffer>,
    width: usize,
    exponentials: Exponentials,
) -> Result<Vec<KlDivergence>> {
    backend.on_host("kl_divergence");
    let (x, y) = (
        fetch(backend, reference.logits)?,
        fetch(backend, other.logits)?,
    );
    let [x, y] = [(&x, reference.stride), (&y, other.stride)]
        .map(|(logits, stride)| LogitRows { logits, stride });
    backend.host().kl_divergence(x, y, width, exponentials)
}

pub fn scale_rows<B: Backend + ?Sized>(
    backend: &B,
    rows: &B::Buffer,
    width: usize,
    factors: &[f32],
) -> Result<B::Buffer> {
    backend.on_host("scale_rows");
    let rows = fetch(backend, rows)?;
    backend.upload(backend.host().scale_rows(&rows, width, factors)?)
}

pub fn column_sums<B: Backend + ?Sized>(
    backend: &B,
    rows: &B::Buffer,
    n: usize,
) -> Result<ColumnSums> {
    backend.on_host("column_sums");
    backend.host().column_sums(&fetch(backend, rows)?, n)
}

pub fn magnitudes<B: Backend + ?Sized>(backend: &B, values: &B::Buffer) -> Result<Magnitudes> {
    backend.on_host("magnitudes");
    backend.host().magnitudes(&fetch(backend, values)?)
}

pub fn gram<B: Backend + ?Sized>(
    backend: &B,
    rows: &B::Buffer,
    n: usize,
    sums: &mut [f64],
) -> Result<()> {
    backend.on_host("gram");
    backend.host().gram(&fetch(backend, rows)?, n, sums)
}

pub fn cross_gram<B: Backend + ?Sized>(
    backend: &B,
    (v, width): (&B::Buffer, usize),
    (u, n): (&B::Buffer, usize),
    sums: &mut [f64],
) -> Result<()> {
    backend.on_host("cross_gram");
    let (v, u) = (fetch(backend, v)?, fetch(backend, u)?);
    backend.host().cross_gram((&v, width), (&u, n), sums)
}
