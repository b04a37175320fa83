// values = max(values, 0)^2; a NaN stays one. One thread per value.
// Twins: relu_squared.cu, src/backend/cpu/elementwise.rs.

struct Parameters {
    count: u32,
}

@group(0) @binding(0) var<storage, read_write> values: array<f32>;
@group(0) @binding(1) var<uniform> p: Parameters;

@compute @workgroup_size(256)
fn relu_squared(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let i = group_index(group, groups) * 256u + lane;
    if i < p.count {
        let x = values[i];
        values[i] = select(x * x, 0.0, x <= 0.0);
    }
}
