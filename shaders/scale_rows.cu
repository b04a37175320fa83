// rows[r, c] *= factors[r]. One thread per value.
// Twins: scale_rows.wgsl, src/backend/cpu/gram.rs.

struct Parameters {
    u32 count;
    u32 width;
};

extern "C" __global__ void __launch_bounds__(256) scale_rows(
    float* __restrict__ rows,
    const float* __restrict__ factors,
    Parameters p
) {
    const u32 i = group_index() * 256u + threadIdx.x;
    if (i < p.count) {
        rows[i] *= factors[i / p.width];
    }
}
