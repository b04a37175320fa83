// Mamba-2, token by token: S = exp(dt A) S + dt x B^T, y = S C + D x, dt = clamp(softplus(dt + bias)), for one sequence.
//
// xbc: rows of x [heads, head_dim], B [groups, state_size], C [groups, state_size]; dt: the last `heads` of every dt_stride
// values; state: [head, state, channel of the head], in place; out: [all rows, heads head_dim]. One thread per channel.
// Twins: selective_scan.cu, src/backend/cpu/selective_scan.rs.

struct Parameters {
    rows: u32,
    first_row: u32,
    heads: u32,
    head_dim: u32,
    scan_groups: u32,
    state_size: u32,
    dt_stride: u32,
    dt_min: f32,
    dt_max: f32,
}

@group(0) @binding(0) var<storage, read> xbc: array<f32>;
@group(0) @binding(1) var<storage, read> dt: array<f32>;
@group(0) @binding(2) var<storage, read> a: array<f32>;
@group(0) @binding(3) var<storage, read> d: array<f32>;
@group(0) @binding(4) var<storage, read> dt_bias: array<f32>;
@group(0) @binding(5) var<storage, read_write> state: array<f32>;
@group(0) @binding(6) var<storage, read_write> out: array<f32>;
@group(0) @binding(7) var<uniform> p: Parameters;

// `min` and `max` may drop a NaN; it must come out.
fn time_step(raw: f32) -> f32 {
    let step = softplus(raw);
    return select(min(max(step, p.dt_min), p.dt_max), step, is_nan(step));
}

@compute @workgroup_size(64)
fn selective_scan(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let channel = group_index(group, groups) * 64u + lane;
    let inner = p.heads * p.head_dim;
    if channel >= inner {
        return;
    }
    let head = channel / p.head_dim;
    let own = head * p.state_size * p.head_dim + channel % p.head_dim;
    let shared_group = head / (p.heads / p.scan_groups);
    let b_first = inner + shared_group * p.state_size;
    let c_first = b_first + p.scan_groups * p.state_size;
    let width = inner + 2u * p.scan_groups * p.state_size;
    for (var row = p.first_row; row < p.first_row + p.rows; row++) {
        let step = time_step(dt[(row + 1u) * p.dt_stride - p.heads + head] + dt_bias[head]);
        let decay = exp_of(step * a[head]);
        let x = xbc[row * width + channel];
        let input = step * x;
        var y = 0.0;
        for (var n = 0u; n < p.state_size; n++) {
            let at = own + n * p.head_dim;
            let s = state[at] * decay + input * xbc[row * width + b_first + n];
            state[at] = s;
            y += s * xbc[row * width + c_first + n];
        }
        out[row * inner + channel] = y + d[head] * x;
    }
}
