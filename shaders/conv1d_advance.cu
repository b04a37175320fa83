// The last `keep` raw rows of a sequence: after = rows of before, then of the input, the last ones.
//
// Operands as in conv1d_silu, keep = taps - 1. One thread per value of the state.
// Twins: conv1d_advance.wgsl, src/backend/cpu/conv1d.rs.

struct Parameters {
    u32 rows;
    u32 first_row;
    u32 stride;
    u32 first;
    u32 channels;
    u32 keep;
};

extern "C" __global__ void __launch_bounds__(256) conv1d_advance(
    const float* __restrict__ input,
    const float* __restrict__ before,
    float* __restrict__ after,
    Parameters p
) {
    const u32 i = group_index() * 256u + threadIdx.x;
    if (i >= p.keep * p.channels) {
        return;
    }
    const u32 c = i % p.channels;
    const u32 since = i / p.channels + p.rows;
    after[i] = since < p.keep
        ? before[since * p.channels + c]
        : input[(p.first_row + since - p.keep) * p.stride + p.first + c];
}
