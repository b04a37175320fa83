// sums[i, j] += sum over rows of x[row, first_i + i] x[row, j], for j >= first_i + i and those of its tile.
//
// x: [rows, n], from first_value on. sums: [count_i, n], each in two floats, large and small part. A group computes 32 x 32
// sums, a thread 4 x 4; 16 rows at a time are in shared memory. The rows of a call are summed in f32, in order, then added
// without loss: callers give at most 512. Groups: tiles of columns, then of rows; those below the diagonal do nothing.
// Twins: gram.wgsl, src/backend/cpu/gram.rs.

struct Parameters {
    u32 rows;
    u32 n;
    u32 first_i;
    u32 count_i;
    u32 first_value;
    // For the twin alone: sums are not reordered here.
    u32 zero;
};

#define TILE 32u
#define DEPTH 16u

// DEPTH rows of TILE columns; zeros from column `end` on and beyond the last row.
static __device__ inline void load_block(
    float (*block)[TILE],
    const float* x,
    const Parameters& p,
    u32 row,
    u32 column,
    u32 end
) {
    #pragma unroll
    for (u32 item = threadIdx.x; item < DEPTH * TILE; item += 64u) {
        const u32 r = row + item / TILE;
        const u32 c = column + item % TILE;
        block[item / TILE][item % TILE] = r < p.rows && c < end ? x[p.first_value + r * p.n + c] : 0.0f;
    }
}

static __device__ inline void load_four(float (&values)[4], const float* from) {
    const float4 four = *reinterpret_cast<const float4*>(from);
    values[0] = four.x;
    values[1] = four.y;
    values[2] = four.z;
    values[3] = four.w;
}

extern "C" __global__ void __launch_bounds__(64) gram(
    const float* __restrict__ x,
    float2* __restrict__ sums,
    Parameters p
) {
    __shared__ __align__(16) float left[DEPTH][TILE];
    __shared__ __align__(16) float right[DEPTH][TILE];
    const u32 tile = group_index();
    const u32 across = (p.n + TILE - 1u) / TILE;
    const u32 tile_i = tile / across;
    const u32 tile_j = tile % across;
    const bool is_below = p.first_i + tile_i * TILE >= (tile_j + 1u) * TILE;
    if (is_below || tile_i * TILE >= p.count_i) {
        return;
    }
    const u32 thread_i = threadIdx.x / 8u * 4u;
    const u32 thread_j = threadIdx.x % 8u * 4u;
    float all[4][4] = {};
    for (u32 row = 0u; row < p.rows; row += DEPTH) {
        load_block(left, x, p, row, p.first_i + tile_i * TILE, p.first_i + p.count_i);
        load_block(right, x, p, row, tile_j * TILE, p.n);
        __syncthreads();
        #pragma unroll
        for (u32 depth = 0u; depth < DEPTH; depth++) {
            float y[4];
            float z[4];
            load_four(y, &left[depth][thread_i]);
            load_four(z, &right[depth][thread_j]);
            #pragma unroll
            for (u32 r = 0u; r < 4u; r++) {
                #pragma unroll
                for (u32 c = 0u; c < 4u; c++) {
                    all[r][c] = fmaf(y[r], z[c], all[r][c]);
                }
            }
        }
        __syncthreads();
    }
    const u32 i = tile_i * TILE + thread_i;
    const u32 j = tile_j * TILE + thread_j;
    #pragma unroll
    for (u32 r = 0u; r < 4u; r++) {
        #pragma unroll
        for (u32 c = 0u; c < 4u; c++) {
            if (i + r < p.count_i && j + c < p.n) {
                const u32 at = (i + r) * p.n + j + c;
                sums[at] = add_exactly(sums[at], all[r][c]);
            }
        }
    }
}
