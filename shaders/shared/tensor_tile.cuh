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

// Words that a lane holds of 16 rows and of 8 columns; without tensor cores all of the two rows and the two columns whose
// products it sums, from the lanes that tensor cores have them of.
#ifdef TENSOR_CORES
#define LEFT_WORDS 4u
#define RIGHT_WORDS 2u
#else
#define LEFT_WORDS 16u
#define RIGHT_WORDS 16u
#endif

// 16 rows, from the lane's own word of the first on.
static __device__ inline void load_left(u32 (&words)[LEFT_WORDS], const u32* from, u32 pitch) {
#ifdef TENSOR_CORES
    words[0] = from[0];
    words[1] = from[8u * pitch];
    words[2] = from[4];
    words[3] = from[8u * pitch + 4u];
#else
    typedef unsigned long long u64;
    const u32 lane = threadIdx.x % 32u;
    for (u32 part = 0u; part < 2u; part++) {
        const u64 own = from[4u * part] | (u64)from[8u * pitch + 4u * part] << 32;
        for (u32 word = 0u; word < 4u; word++) {
            const u64 both = __shfl_sync(~0u, own, (int)(lane / 4u * 4u + word));
            words[4u * part + word] = (u32)both;
            words[8u + 4u * part + word] = (u32)(both >> 32);
        }
    }
#endif
}

// 8 columns.
static __device__ inline void load_right(u32 (&words)[RIGHT_WORDS], const u32* from) {
#ifdef TENSOR_CORES
    words[0] = from[0];
    words[1] = from[4];
#else
    typedef unsigned long long u64;
    const u32 lane = threadIdx.x % 32u;
    const u64 own = from[0] | (u64)from[4] << 32;
    for (u32 column = 0u; column < 2u; column++) {
        for (u32 word = 0u; word < 4u; word++) {
            const u64 both = __shfl_sync(~0u, own, (int)((lane % 4u * 2u + column) * 4u + word));
            words[8u * column + word] = (u32)both;
            words[8u * column + 4u + word] = (u32)(both >> 32);
        }
    }
#endif
}

// sums += left right^T of 16 values of BF16 each: 16 rows, 8 columns.
static __device__ inline void multiply_bf16(float (&sums)[4], const u32 (&left)[LEFT_WORDS], const u32 (&right)[RIGHT_WORDS]) {
#ifdef TENSOR_CORES
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right[0]), "r"(right[1]));
#else
    for (u32 part = 0u; part < 4u; part++) {
        for (u32 word = 0u; word < 8u; word++) {
            const u32 x = left[part / 2u * 8u + word];
            const u32 w = right[part % 2u * 8u + word];
            sums[part] = fmaf(__uint_as_float(x << 16), __uint_as_float(w << 16), sums[part]);
            sums[part] = fmaf(__uint_as_float(x & 0xffff0000u), __uint_as_float(w & 0xffff0000u), sums[part]);
        }
    }
#endif
}

// Eight weights of 16 bits of a row from k on, zeros beyond the last. Rows that are whole multiples of 16 bytes are loaded so.
static __device__ inline uint4 fetch_weights(const u8* row, u32 k, u32 inner, bool is_aligned) {
    if (is_aligned) {
        return k < inner ? *reinterpret_cast<const uint4*>(row + 2u * k) : make_uint4(0u, 0u, 0u, 0u);
    }
    u32 words[4];
    #pragma unroll
    for (u32 word = 0u; word < 4u; word++) {
        const u32 at = k + 2u * word;
        const u32 low = at < inner ? short_at(row, 2u * at) : 0u;
        const u32 high = at + 1u < inner ? short_at(row, 2u * at + 2u) : 0u;
        words[word] = low | high << 16;
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
}

// Gives what a warp computed, `totals[down][across]` of 16 rows and 8 columns each, to `put(row, column, total)`, places in
// the tile.
template <class Put>
static __device__ inline void for_each_total(
    const float (&totals)[DOWN][ACROSS][4],
    u32 rows_left,
    u32 columns_left,
    Put put
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
                    put(row, column, totals[down][across][part]);
                }
            }
            // What `put` loads for these values is not held beside what it loads for others.
            asm volatile("" ::: "memory");
        }
    }
}

// The same to rows of `out_row` values.
static __device__ inline void store(
    float* out,
    u32 out_row,
    const float (&totals)[DOWN][ACROSS][4],
    u32 rows_left,
    u32 columns_left
) {
    for_each_total(totals, rows_left, columns_left, [&](u32 row, u32 column, float total) {
        out[row * out_row + column] = total;
    });
}
