// y = rms_norm(y silu(z)) * weight, one norm per group of channels. One group of threads per row and group of channels.
//
// y: [rows, inner], in place; the gates of a row are the first `inner` of its `z_stride` values.
// Twins: gated_rms_norm.wgsl, src/backend/cpu/rms_norm.rs.

struct Parameters {
    u32 rows;
    u32 inner;
    u32 z_stride;
    u32 norm_groups;
    float eps;
};

extern "C" __global__ void __launch_bounds__(64) gated_rms_norm(
    float* __restrict__ y,
    const float* __restrict__ z,
    const float* __restrict__ weight,
    Parameters p
) {
    __shared__ float sums[64];
    const u32 item = group_index();
    const u32 row = item / p.norm_groups;
    if (row >= p.rows) {
        return;
    }
    const u32 lane = threadIdx.x;
    const u32 width = p.inner / p.norm_groups;
    const u32 first = item % p.norm_groups * width;
    float sum = 0.0f;
    for (u32 c = lane; c < width; c += 64u) {
        const u32 at = row * p.inner + first + c;
        const float value = y[at] * silu(z[row * p.z_stride + first + c]);
        y[at] = value;
        sum = fmaf(value, value, sum);
    }
    sums[lane] = sum;
    __syncthreads();
    sum = 0.0f;
    for (u32 other = 0u; other < 64u; other++) {
        sum += sums[other];
    }
    const float scale = 1.0f / sqrtf(sum / (float)width + p.eps);
    for (u32 c = lane; c < width; c += 64u) {
        const u32 at = row * p.inner + first + c;
        y[at] = y[at] * scale * weight[first + c];
    }
}
