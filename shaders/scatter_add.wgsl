// sum[rows[i], c] += weights[i] values[i, c], counted from first_sum and first_value; no row is named twice. One thread per
// value.
// Twins: scatter_add.cu, src/backend/cpu/mod.rs.

struct Parameters {
    count: u32,
    width: u32,
    first_sum: u32,
    first_value: u32,
}

@group(0) @binding(0) var<storage, read_write> sum: array<f32>;
@group(0) @binding(1) var<storage, read> values: array<f32>;
@group(0) @binding(2) var<storage, read> rows: array<u32>;
@group(0) @binding(3) var<storage, read> weights: array<f32>;
@group(0) @binding(4) var<uniform> p: Parameters;

@compute @workgroup_size(256)
fn scatter_add(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let i = group_index(group, groups) * 256u + lane;
    if i < p.count {
        let row = i / p.width;
        sum[p.first_sum + rows[row] * p.width + i % p.width] += weights[row] * values[p.first_value + i];
    }
}
