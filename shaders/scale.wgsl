// values *= factor. One thread per value.
// Twins: scale.cu, src/backend/cpu/mod.rs.

struct Parameters {
    count: u32,
    factor: f32,
}

@group(0) @binding(0) var<storage, read_write> values: array<f32>;
@group(0) @binding(1) var<uniform> p: Parameters;

@compute @workgroup_size(256)
fn scale(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let i = group_index(group, groups) * 256u + lane;
    if i < p.count {
        values[i] *= p.factor;
    }
}
