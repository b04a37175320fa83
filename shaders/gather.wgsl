// out[i, c] = input[rows[i], c], counted from first_input and first_out. One thread per value.
// Twins: gather.cu, src/backend/cpu/mod.rs.

struct Parameters {
    count: u32,
    width: u32,
    first_input: u32,
    first_out: u32,
}

@group(0) @binding(0) var<storage, read> input: array<f32>;
@group(0) @binding(1) var<storage, read> rows: array<u32>;
@group(0) @binding(2) var<storage, read_write> out: array<f32>;
@group(0) @binding(3) var<uniform> p: Parameters;

@compute @workgroup_size(256)
fn gather(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let i = group_index(group, groups) * 256u + lane;
    if i < p.count {
        out[p.first_out + i] = input[p.first_input + rows[i / p.width] * p.width + i % p.width];
    }
}
