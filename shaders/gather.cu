// out[i, c] = input[rows[i], c], counted from first_input and first_out. One thread per value.
// Twins: gather.wgsl, src/backend/cpu/mod.rs.

struct Parameters {
    u32 count;
    u32 width;
    u32 first_input;
    u32 first_out;
};

extern "C" __global__ void __launch_bounds__(256) gather(
    const float* __restrict__ input,
    const u32* __restrict__ rows,
    float* __restrict__ out,
    Parameters p
) {
    const u32 i = group_index() * 256u + threadIdx.x;
    if (i < p.count) {
        out[p.first_out + i] = input[p.first_input + rows[i / p.width] * p.width + i % p.width];
    }
}
