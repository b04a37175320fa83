// rows[r, c] += bias[c]. One thread per value.
// Twins: add_bias.cu, src/backend/cpu/mod.rs.

struct Parameters {
    count: u32,
    width: u32,
}

@group(0) @binding(0) var<storage, read_write> rows: array<f32>;
@group(0) @binding(1) var<storage, read> bias: array<f32>;
@group(0) @binding(2) var<uniform> p: Parameters;

@compute @workgroup_size(256)
fn add_bias(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let i = group_index(group, groups) * 256u + lane;
    if i < p.count {
        rows[i] += bias[i % p.width];
    }
}
