// What the KL divergence of two rows of logits needs besides their softmax_sums: the sum of e^(x - largest) (x - y) of each
// part of each row.
//
// x, the reference: [rows, x_stride], from first_x on; y: [rows, y_stride], from first_y on; `width` values of a row count,
// cut into parts of `part`. x_sums: softmax_sums of x, of the same parts. out: [rows, parts] of two floats, large and small
// part of the sum. One group per row and part.
// Twins: kl_divergence.wgsl, src/backend/cpu/softmax.rs.

struct Parameters {
    u32 rows;
    u32 width;
    u32 x_stride;
    u32 first_x;
    u32 y_stride;
    u32 first_y;
    u32 part;
    // For the twin alone: sums are not reordered here.
    u32 zero;
};

extern "C" __global__ void __launch_bounds__(64) kl_divergence(
    const float* __restrict__ x,
    const float* __restrict__ y,
    const u32* __restrict__ x_sums,
    float2* __restrict__ out,
    Parameters p
) {
    __shared__ float2 sums[64];
    const u32 item = group_index();
    const u32 parts = (p.width + p.part - 1u) / p.part;
    const u32 row = item / parts;
    if (row >= p.rows) {
        return;
    }
    const u32 lane = threadIdx.x;
    const u32 x_row = p.first_x + row * p.x_stride;
    const u32 y_row = p.first_y + row * p.y_stride;
    const u32 begin = item % parts * p.part;
    const u32 end = min(begin + p.part, p.width);
    const float largest = __uint_as_float(x_sums[4u * item]);
    float2 sum = {0.0f, 0.0f};
    for (u32 c = begin + lane; c < end; c += 64u) {
        const float value = x[x_row + c];
        sum = add_exactly(sum, exp_of(value - largest) * (value - y[y_row + c]));
    }
    sums[lane] = sum;
    __syncthreads();
    if (lane > 0u) {
        return;
    }
    for (u32 other = 1u; other < 64u; other++) {
        sum = add_exactly(sum, sums[other].x);
        sum.y += sums[other].y;
    }
    out[item] = sum;
}
