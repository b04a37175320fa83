// The last `keep` raw rows of a sequence: after = rows of before, then of the input, the last ones.
//
// Operands as in conv1d_silu, keep = taps - 1. One thread per value of the state.
// Twins: conv1d_advance.cu, src/backend/cpu/conv1d.rs.

struct Parameters {
    rows: u32,
    first_row: u32,
    stride: u32,
    first: u32,
    channels: u32,
    keep: u32,
}

@group(0) @binding(0) var<storage, read> input: array<f32>;
@group(0) @binding(1) var<storage, read> before: array<f32>;
@group(0) @binding(2) var<storage, read_write> after: array<f32>;
@group(0) @binding(3) var<uniform> p: Parameters;

@compute @workgroup_size(256)
fn conv1d_advance(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let i = group_index(group, groups) * 256u + lane;
    if i >= p.keep * p.channels {
        return;
    }
    let c = i % p.channels;
    let since = i / p.channels + p.rows;
    if since < p.keep {
        after[i] = before[since * p.channels + c];
    } else {
        after[i] = input[(p.first_row + since - p.keep) * p.stride + p.first + c];
    }
}
