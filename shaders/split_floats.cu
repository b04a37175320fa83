// Rows of floats in three parts of BF16 each: x = x0 + x1 + x2, every part the nearest BF16 to what is left.
//
// x [rows, inner], with any steps from row to row and from column to column. out: for each row its first parts, its second,
// its third, two in a word, each filled up with zeros to `part_words` words. Nothing is lost of values from 2^-110 on, of
// smaller ones what is below 2^-134; the first part is cut off where rounding makes it infinite. An infinity or a NaN has
// one part. A group splits 32 rows of 64 values, by way of shared memory: neighbouring threads load and store what is
// neighbouring. Groups: tiles of columns, then of rows.
// Twins: split_floats.wgsl, `parts` in tests/cuda_emu/tests/split.rs.

struct Parameters {
    u32 rows;
    u32 inner;
    // First value, and steps to the next row and column.
    u32 first;
    u32 row;
    u32 column;
    u32 part_words;
};

#define PARTS 3u
#define ROWS 32u
#define COLUMNS 64u

// The nearest BF16, or the next towards zero; x is what is left.
static __device__ inline u32 take_part(float& x) {
    float part = round_to_bf16(x);
    if (fabsf(part) == __uint_as_float(NOT_FINITE)) {
        part = __uint_as_float(__float_as_uint(x) & 0xffff0000u);
    }
    x -= part;
    return __float_as_uint(part) >> 16;
}

static __device__ inline void split(float x, u32 (&parts)[PARTS]) {
    const u32 bits = __float_as_uint(x);
    if ((bits & 0x7fffffffu) >= NOT_FINITE) {
        // A NaN stays one, whatever bits it had.
        parts[0] = x != x ? bits >> 16 | 0x40u : bits >> 16;
        parts[1] = 0u;
        parts[2] = 0u;
        return;
    }
    #pragma unroll
    for (u32 part = 0u; part < PARTS; part++) {
        parts[part] = take_part(x);
    }
}

extern "C" __global__ void __launch_bounds__(256) split_floats(
    const float* __restrict__ x,
    u32* __restrict__ out,
    Parameters p
) {
    __shared__ float tile[ROWS][COLUMNS + 1u];
    const u32 across = (p.part_words * 2u + COLUMNS - 1u) / COLUMNS;
    const u32 first_row = group_index() / across * ROWS;
    const u32 first_column = group_index() % across * COLUMNS;
    if (first_row >= p.rows) {
        return;
    }
    const bool is_along_rows = p.column == 1u;
    #pragma unroll
    for (u32 item = threadIdx.x; item < ROWS * COLUMNS; item += 256u) {
        const u32 r = is_along_rows ? item / COLUMNS : item % ROWS;
        const u32 c = is_along_rows ? item % COLUMNS : item / ROWS;
        const u32 i = first_row + r;
        const u32 k = first_column + c;
        tile[r][c] = i < p.rows && k < p.inner ? x[p.first + i * p.row + k * p.column] : 0.0f;
    }
    __syncthreads();
    #pragma unroll
    for (u32 item = threadIdx.x; item < ROWS * COLUMNS / 2u; item += 256u) {
        const u32 r = item / (COLUMNS / 2u);
        const u32 c = item % (COLUMNS / 2u);
        const u32 i = first_row + r;
        const u32 word = first_column / 2u + c;
        if (i < p.rows && word < p.part_words) {
            u32 low[PARTS];
            u32 high[PARTS];
            split(tile[r][2u * c], low);
            split(tile[r][2u * c + 1u], high);
            #pragma unroll
            for (u32 part = 0u; part < PARTS; part++) {
                out[(i * PARTS + part) * p.part_words + word] = low[part] | high[part] << 16;
            }
        }
    }
}
