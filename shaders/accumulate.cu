// sums += values, each sum in two floats, large and small part. One thread per value.
// Twin: accumulate.wgsl; the CPU sums in f64.

struct Parameters {
    u32 count;
    // For the twin alone: sums are not reordered here.
    u32 zero;
};

extern "C" __global__ void __launch_bounds__(256) accumulate(
    float2* __restrict__ sums,
    const float* __restrict__ values,
    Parameters p
) {
    const u32 i = group_index() * 256u + threadIdx.x;
    if (i < p.count) {
        sums[i] = add_exactly(sums[i], values[i]);
    }
}
