// out = x / sqrt(mean(x^2) + eps) * weight, per row of `width` values. One group per row.
// Twins: rms_norm.wgsl, src/backend/cpu/rms_norm.rs.

struct Parameters {
    u32 rows;
    u32 width;
    float eps;
};

extern "C" __global__ void __launch_bounds__(64) rms_norm(
    const float* __restrict__ x,
    const float* __restrict__ weight,
    float* __restrict__ out,
    Parameters p
) {
    __shared__ float sums[64];
    const u32 row = group_index();
    if (row >= p.rows) {
        return;
    }
    const u32 lane = threadIdx.x;
    const u32 first = row * p.width;
    float sum = 0.0f;
    for (u32 c = lane; c < p.width; c += 64u) {
        sum = fmaf(x[first + c], x[first + c], sum);
    }
    sums[lane] = sum;
    __syncthreads();
    // Every thread adds all partial sums, in order: one barrier instead of six.
    sum = 0.0f;
    for (u32 other = 0u; other < 64u; other++) {
        sum += sums[other];
    }
    const float scale = 1.0f / sqrtf(sum / (float)p.width + p.eps);
    for (u32 c = lane; c < p.width; c += 64u) {
        out[first + c] = x[first + c] * scale * weight[c];
    }
}
