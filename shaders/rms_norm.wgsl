// out = x / sqrt(mean(x^2) + eps) * weight, per row of `width` values. One group per row.
// Twins: rms_norm.cu, src/backend/cpu/rms_norm.rs.

struct Parameters {
    rows: u32,
    width: u32,
    eps: f32,
}

@group(0) @binding(0) var<storage, read> x: array<f32>;
@group(0) @binding(1) var<storage, read> weight: array<f32>;
@group(0) @binding(2) var<storage, read_write> out: array<f32>;
@group(0) @binding(3) var<uniform> p: Parameters;

var<workgroup> sums: array<f32, 64>;

@compute @workgroup_size(64)
fn rms_norm(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let row = group_index(group, groups);
    if row >= p.rows {
        return;
    }
    let first = row * p.width;
    var sum = 0.0;
    for (var c = lane; c < p.width; c += 64u) {
        let value = x[first + c];
        sum += value * value;
    }
    sums[lane] = sum;
    workgroupBarrier();
    // Every thread adds all partial sums, in order: one barrier instead of six.
    sum = 0.0;
    for (var other = 0u; other < 64u; other++) {
        sum += sums[other];
    }
    let scale = 1.0 / sqrt(sum / f32(p.width) + p.eps);
    for (var c = lane; c < p.width; c += 64u) {
        out[first + c] = x[first + c] * scale * weight[c];
    }
}
