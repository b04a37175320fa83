// What softmax needs of each part of each row of logits: the largest, where it stands first, the sum of e^(x - largest).
//
// x: [rows, stride], from first_value on; `width` values of a row count, cut into parts of `part`. out: [rows, parts] of
// four words: the largest value, its index in the row, the sum in two floats, large and small part. NaN is passed over
// where the largest is sought; where one is, or +infinity, the sum is NaN. One group per row and part.
// Twins: softmax_sums.wgsl, src/backend/cpu/softmax.rs.

struct Parameters {
    u32 rows;
    u32 width;
    u32 stride;
    u32 first_value;
    u32 part;
    // For the twin alone: sums are not reordered here.
    u32 zero;
};

extern "C" __global__ void __launch_bounds__(64) softmax_sums(
    const float* __restrict__ x,
    u32* __restrict__ out,
    Parameters p
) {
    // Of each thread's values: the largest, its index, whether one is NaN or +infinity.
    __shared__ float peaks[64];
    __shared__ u32 places[64];
    __shared__ u32 oddities[64];
    __shared__ float2 sums[64];
    const u32 item = group_index();
    const u32 parts = (p.width + p.part - 1u) / p.part;
    const u32 row = item / parts;
    if (row >= p.rows) {
        return;
    }
    const u32 lane = threadIdx.x;
    const u32 first = p.first_value + row * p.stride;
    const u32 begin = item % parts * p.part;
    const u32 end = min(begin + p.part, p.width);
    float largest = -3.4028234e38f;
    u32 place = begin;
    u32 is_odd = 0u;
    for (u32 c = begin + lane; c < end; c += 64u) {
        const float value = x[first + c];
        const u32 bits = __float_as_uint(value);
        is_odd |= (bits & 0x7fffffffu) > NOT_FINITE || bits == NOT_FINITE ? 1u : 0u;
        if (value > largest) {
            largest = value;
            place = c;
        }
    }
    peaks[lane] = largest;
    places[lane] = place;
    oddities[lane] = is_odd;
    __syncthreads();
    // Every thread looks at those of all: one barrier instead of six.
    for (u32 other = 0u; other < 64u; other++) {
        const float peak = peaks[other];
        if (peak > largest || (peak == largest && places[other] < place)) {
            largest = peak;
            place = places[other];
        }
        is_odd |= oddities[other];
    }
    float2 sum = {0.0f, 0.0f};
    for (u32 c = begin + lane; c < end; c += 64u) {
        sum = add_exactly(sum, exp_of(x[first + c] - largest));
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
    out[4u * item] = __float_as_uint(largest);
    out[4u * item + 1u] = place;
    out[4u * item + 2u] = is_odd != 0u ? 0x7fc00000u : __float_as_uint(sum.x);
    out[4u * item + 3u] = __float_as_uint(sum.y);
}
