// out[row, c] = silu(bias[c] + sum over taps of weight[c, tap] input[row - taps + 1 + tap, c]) for the rows of one sequence.
//
// Input: rows of `stride` values, channels from `first` on; the sequence begins at row first_row. Rows before it are in the
// state: [taps - 1, channels]. out: [all rows, channels]. One thread per value.
// Twins: conv1d_silu.wgsl, src/backend/cpu/conv1d.rs.

struct Parameters {
    u32 rows;
    u32 first_row;
    u32 stride;
    u32 first;
    u32 channels;
    u32 taps;
};

extern "C" __global__ void __launch_bounds__(256) conv1d_silu(
    const float* __restrict__ input,
    const float* __restrict__ state,
    const float* __restrict__ weight,
    const float* __restrict__ bias,
    float* __restrict__ out,
    Parameters p
) {
    const u32 i = group_index() * 256u + threadIdx.x;
    if (i >= p.rows * p.channels) {
        return;
    }
    const u32 row = i / p.channels;
    const u32 c = i % p.channels;
    float sum = bias[c];
    for (u32 tap = 0u; tap < p.taps; tap++) {
        // Rows since the first that the state holds.
        const u32 since = row + tap;
        const float x = since < p.taps - 1u
            ? state[since * p.channels + c]
            : input[(p.first_row + since + 1u - p.taps) * p.stride + p.first + c];
        sum += weight[c * p.taps + tap] * x;
    }
    out[(p.first_row + row) * p.channels + c] = silu(sum);
}
