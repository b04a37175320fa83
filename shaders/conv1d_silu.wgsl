// out[row, c] = silu(bias[c] + sum over taps of weight[c, tap] input[row - taps + 1 + tap, c]) for the rows of one sequence.
//
// Input: rows of `stride` values, channels from `first` on; the sequence begins at row first_row. Rows before it are in the
// state: [taps - 1, channels]. out: [all rows, channels]. One thread per value.
// Twins: conv1d_silu.cu, src/backend/cpu/conv1d.rs.

struct Parameters {
    rows: u32,
    first_row: u32,
    stride: u32,
    first: u32,
    channels: u32,
    taps: u32,
}

@group(0) @binding(0) var<storage, read> input: array<f32>;
@group(0) @binding(1) var<storage, read> state: array<f32>;
@group(0) @binding(2) var<storage, read> weight: array<f32>;
@group(0) @binding(3) var<storage, read> bias: array<f32>;
@group(0) @binding(4) var<storage, read_write> out: array<f32>;
@group(0) @binding(5) var<uniform> p: Parameters;

@compute @workgroup_size(256)
fn conv1d_silu(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let i = group_index(group, groups) * 256u + lane;
    if i >= p.rows * p.channels {
        return;
    }
    let row = i / p.channels;
    let c = i % p.channels;
    var sum = bias[c];
    for (var tap = 0u; tap < p.taps; tap++) {
        // Rows since the first that the state holds.
        let since = row + tap;
        var x: f32;
        if since < p.taps - 1u {
            x = state[since * p.channels + c];
        } else {
            x = input[(p.first_row + since + 1u - p.taps) * p.stride + p.first + c];
        }
        sum += weight[c * p.taps + tap] * x;
    }
    out[(p.first_row + row) * p.channels + c] = silu(sum);
}
