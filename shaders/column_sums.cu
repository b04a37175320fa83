// What columns of rows come to: sums, sums of squares, largest magnitudes.
//
// x: [rows, n], from first_value on, cut into parts of `part` rows. out: [parts, 5, n]: sums in two floats, large and small
// part, sums of squares likewise, each square rounded once, and largest magnitudes, where NaN is passed over. A sum is finite
// where all its values, or their squares in f32, are. One group per part and 32 columns, eight threads per column.
// Twins: column_sums.wgsl, src/backend/cpu/columns.rs.

struct Parameters {
    u32 rows;
    u32 n;
    u32 first_value;
    u32 part;
    // For the twin alone: sums are not reordered here.
    u32 zero;
};

extern "C" __global__ void __launch_bounds__(256) column_sums(
    const float* __restrict__ x,
    float* __restrict__ out,
    Parameters p
) {
    __shared__ float2 sums[256];
    __shared__ float2 squares[256];
    __shared__ float peaks[256];
    const u32 tiles = (p.n + 31u) / 32u;
    const u32 part = group_index() / tiles;
    if (part * p.part >= p.rows) {
        return;
    }
    const u32 lane = threadIdx.x;
    const u32 column = group_index() % tiles * 32u + lane % 32u;
    const u32 end = min((part + 1u) * p.part, p.rows);
    float2 sum = {0.0f, 0.0f};
    float2 square = {0.0f, 0.0f};
    float peak = 0.0f;
    if (column < p.n) {
        for (u32 row = part * p.part + lane / 32u; row < end; row += 8u) {
            const float value = x[p.first_value + row * p.n + column];
            sum = add_exactly(sum, value);
            square = add_exactly(square, value * value);
            peak = fmaxf(peak, fabsf(value));
        }
    }
    sums[lane] = sum;
    squares[lane] = square;
    peaks[lane] = peak;
    __syncthreads();
    if (lane >= 32u || column >= p.n) {
        return;
    }
    for (u32 other = lane + 32u; other < 256u; other += 32u) {
        sum = add_exactly(sum, sums[other].x);
        sum.y += sums[other].y;
        square = add_exactly(square, squares[other].x);
        square.y += squares[other].y;
        peak = fmaxf(peak, peaks[other]);
    }
    float* const at = out + part * 5u * p.n + column;
    at[0u] = sum.x;
    at[p.n] = sum.y;
    at[2u * p.n] = square.x;
    at[3u * p.n] = square.y;
    at[4u * p.n] = peak;
}
