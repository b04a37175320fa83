// values = max(values, 0)^2; a NaN stays one. One thread per value.
// Twins: relu_squared.wgsl, src/backend/cpu/elementwise.rs.

struct Parameters {
    u32 count;
};

extern "C" __global__ void __launch_bounds__(256) relu_squared(
    float* __restrict__ values,
    Parameters p
) {
    const u32 i = group_index() * 256u + threadIdx.x;
    if (i < p.count) {
        const float x = values[i];
        values[i] = x <= 0.0f ? 0.0f : x * x;
    }
}
