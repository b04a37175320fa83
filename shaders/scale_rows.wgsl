// rows[r, c] *= factors[r]. One thread per value.
// Twins: scale_rows.cu, src/backend/cpu/gram.rs.

struct Parameters {
    count: u32,
    width: u32,
}

@group(0) @binding(0) var<storage, read_write> rows: array<f32>;
@group(0) @binding(1) var<storage, read> factors: array<f32>;
@group(0) @binding(2) var<uniform> p: Parameters;

@compute @workgroup_size(256)
fn scale_rows(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let i = group_index(group, groups) * 256u + lane;
    if i < p.count {
        rows[i] *= factors[i / p.width];
    }
}
