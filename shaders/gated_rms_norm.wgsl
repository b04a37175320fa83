// y = rms_norm(y silu(z)) * weight, one norm per group of channels. One group of threads per row and group of channels.
//
// y: [rows, inner], in place; the gates of a row are the first `inner` of its `z_stride` values.
// Twins: gated_rms_norm.cu, src/backend/cpu/rms_norm.rs.

struct Parameters {
    rows: u32,
    inner: u32,
    z_stride: u32,
    norm_groups: u32,
    eps: f32,
}

@group(0) @binding(0) var<storage, read_write> y: array<f32>;
@group(0) @binding(1) var<storage, read> z: array<f32>;
@group(0) @binding(2) var<storage, read> weight: array<f32>;
@group(0) @binding(3) var<uniform> p: Parameters;

var<workgroup> sums: array<f32, 64>;

@compute @workgroup_size(64)
fn gated_rms_norm(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let item = group_index(group, groups);
    let row = item / p.norm_groups;
    if row >= p.rows {
        return;
    }
    let width = p.inner / p.norm_groups;
    let first = item % p.norm_groups * width;
    var sum = 0.0;
    for (var c = lane; c < width; c += 64u) {
        let at = row * p.inner + first + c;
        let value = y[at] * silu(z[row * p.z_stride + first + c]);
        y[at] = value;
        sum += value * value;
    }
    sums[lane] = sum;
    workgroupBarrier();
    sum = 0.0;
    for (var other = 0u; other < 64u; other++) {
        sum += sums[other];
    }
    let scale = 1.0 / sqrt(sum / f32(width) + p.eps);
    for (var c = lane; c < width; c += 64u) {
        let at = row * p.inner + first + c;
        y[at] = y[at] * scale * weight[first + c];
    }
}
