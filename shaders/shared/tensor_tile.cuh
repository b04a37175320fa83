// Tiles of products on tensor cores: who holds what of 16 rows and 8 columns, and who stores it.
//
// A group computes 128 x 128 outputs, each of its 8 warps 64 x 32 of them. Both operands are rows of words in shared memory,
// 8 words for each step of a tensor core: 16 halves or 32 bytes. Places of words among lanes: PTX ISA, "Matrix Fragments
// for mma.m16n8k16" and "m16n8k32", which are the same.

#define TILE 128u
#define WARP_ROWS 64u
#define WARP_COLUMNS 32u
// Tiles of a tensor core in those of a warp.
#define DOWN 4u
#define ACROSS 4u

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
#define TENSOR_CORES
#endif

// First row and column of the warp in the tile, and the lane's own: a row of either operand, a word of four.
static __device__ inline u32 warp_row() { return threadIdx.x / 128u * WARP_ROWS; }
static __device__ inline u32 warp_column() { return threadIdx.x / 32u % 4u * WARP_COLUMNS; }
static __device__ inline u32 lane_row() { return threadIdx.x % 32u / 4u; }
static __device__ inline u32 lane_word() { return threadIdx.x % 4u; }

// 16 rows, from the lane's own word of the first on.
static __device__ inline void load_left(u32 (&words)[4], const u32* from, u32 pitch) {
    words[0] = from[0];
    words[1] = from[8u * pitch];
    words[2] = from[4];
    words[3] = from[8u * pitch + 4u];
}

// 8 columns.
static __device__ inline void load_right(u32 (&words)[2], const u32* from) {
    words[0] = from[0];
    words[1] = from[4];
}

#ifndef TENSOR_CORES
// The two rows and the two columns whose products a lane holds, from the lanes that have them.
static __device__ inline void gather(u32 (&rows)[2][8], u32 (&columns)[2][8], const u32 (&left)[4], const u32 (&right)[2]) {
    typedef unsigned long long u64;
    const u32 lane = threadIdx.x % 32u;
    const u64 column = right[0] | (u64)right[1] << 32;
    for (u32 word = 0u; word < 4u; word++) {
        for (u32 part = 0u; part < 2u; part++) {
            const u64 row = left[2u * part] | (u64)left[2u * part + 1u] << 32;
            const u64 words = __shfl_sync(~0u, row, (int)(lane / 4u * 4u + word));
            rows[0][4u * part + word] = (u32)words;
            rows[1][4u * part + word] = (u32)(words >> 32);
        }
        for (u32 c = 0u; c < 2u; c++) {
            const u64 words = __shfl_sync(~0u, column, (int)((lane % 4u * 2u + c) * 4u + word));
            columns[c][word] = (u32)words;
            columns[c][4u + word] = (u32)(words >> 32);
        }
    }
}
#endif

// What a warp computed, `totals[down][across]` of 16 rows and 8 columns each, to rows of `out_row` values.
static __device__ inline void store(
    float* out,
    u32 out_row,
    const float (&totals)[DOWN][ACROSS][4],
    u32 rows_left,
    u32 columns_left
) {
    #pragma unroll
    for (u32 down = 0u; down < DOWN; down++) {
        #pragma unroll
        for (u32 across = 0u; across < ACROSS; across++) {
            #pragma unroll
            for (u32 part = 0u; part < 4u; part++) {
                const u32 row = warp_row() + 16u * down + lane_row() + part / 2u * 8u;
                const u32 column = warp_column() + 8u * across + 2u * lane_word() + part % 2u;
                if (row < rows_left && column < columns_left) {
                    out[row * out_row + column] = totals[down][across][part];
                }
            }
        }
    }
}
