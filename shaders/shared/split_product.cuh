// Tiles of F32 products on tensor cores: operands in parts of BF16, as split_floats leaves them, sums in F32.
//
// x = x0 + x1 + x2 and y = y0 + y1 + y2, parts of 8 bits, each at most 2^-9 of the one before but for values near the largest
// float. Of nine products of parts three are left out, together at most 2^-25 of x y; six are summed, those of the same
// size together, the smallest first. Operands that are stored in BF16 have one part, and nothing is left out.
//
// Tensor cores multiply without loss and, it is assumed, cut each sum of 16 products and what was there off at 2^-23 of its
// largest addend; what they sum is therefore 16 values of k of all products of parts, and these sums are added in F32,
// rounded, in order of k. Where a device takes subnormal numbers for zero, parts below 2^-126 are lost. An infinity times
// a finite number may be NaN; results within 2^-8 of the largest float may be infinite.
//
// 16 values of k of all parts are in shared memory, and the next 16 on their way to registers. After CHUNK of them sums are
// added to the result: errors of longer ones would grow beyond those of matmul_tiled.
// Twins: split_product.wgsl, halves_product.cuh.

#define PARTS 3u
// Values of k, their words, and words from row to row of shared memory: multiples of 16 bytes spread over banks.
#define DEPTH 16u
#define WORDS 8u
#define PITCH 12u
#define CHUNK 4096u

// Words of a part of a row.
static __device__ inline u32 part_words(u32 inner) { return (inner + 31u) / 32u * 16u; }

// totals += products of 16 values of k, of parts of the same size together, the smallest first.
template <u32 RIGHT_PARTS>
static __device__ inline void add_products(
    float (&totals)[4],
    const u32 (&left)[PARTS][LEFT_WORDS],
    const u32 (&right)[RIGHT_PARTS][RIGHT_WORDS]
) {
    float sums[4] = {};
    #pragma unroll
    for (u32 size = PARTS; size-- > 0u;) {
        #pragma unroll
        for (u32 part = 0u; part <= min(size, RIGHT_PARTS - 1u); part++) {
            multiply_bf16(sums, left[size - part], right[part]);
        }
    }
    #pragma unroll
    for (u32 part = 0u; part < 4u; part++) {
        totals[part] += sums[part];
    }
}

// `totals` of the warp, of values from `first_k` on: rows of `left`, of PARTS parts, times rows of `right`, of PARTS parts or
// as they are stored. Both begin with the tile and have at least one row; beyond the last it is repeated: computed and not
// stored.
template <u32 RIGHT_PARTS>
static __device__ inline void multiply_parts(
    float (&totals)[DOWN][ACROSS][4],
    const u32* left,
    u32 left_rows,
    const u8* right,
    u32 right_rows,
    u32 inner,
    u32 first_k,
    bool is_aligned
) {
    __shared__ __align__(16) u32 lefts[PARTS][TILE][PITCH];
    __shared__ __align__(16) u32 rights[RIGHT_PARTS][TILE][PITCH];
    // A thread loads 16 bytes of one row of every part.
    const u32 place = threadIdx.x / 2u;
    const u32 half = threadIdx.x % 2u;
    const u32 words = part_words(inner);
    const u32* from_left = left + min(place, left_rows - 1u) * PARTS * words + 4u * half;
    const u32 row_bytes = RIGHT_PARTS == 1u ? inner * 2u : PARTS * words * 4u;
    const u8* from_right = right + min(place, right_rows - 1u) * row_bytes;
    uint4 held_left[PARTS];
    uint4 held_right[RIGHT_PARTS];
    const auto fetch = [&](u32 k) {
        #pragma unroll
        for (u32 part = 0u; part < PARTS; part++) {
            held_left[part] = *reinterpret_cast<const uint4*>(from_left + part * words + k / 2u);
        }
        #pragma unroll
        for (u32 part = 0u; part < RIGHT_PARTS; part++) {
            held_right[part] = RIGHT_PARTS == 1u
                ? fetch_weights(from_right, k + 8u * half, inner, is_aligned)
                : *reinterpret_cast<const uint4*>(from_right + part * words * 4u + k * 2u + 16u * half);
        }
    };
    const u32 end = min(inner, first_k + CHUNK);
    if (first_k < end) {
        fetch(first_k);
    }
    const bool has_outputs = warp_row() < left_rows && warp_column() < right_rows;
    for (u32 k = first_k; k < end; k += DEPTH) {
        #pragma unroll
        for (u32 part = 0u; part < PARTS; part++) {
            *reinterpret_cast<uint4*>(&lefts[part][place][4u * half]) = held_left[part];
        }
        #pragma unroll
        for (u32 part = 0u; part < RIGHT_PARTS; part++) {
            *reinterpret_cast<uint4*>(&rights[part][place][4u * half]) = held_right[part];
        }
        __syncthreads();
        if (k + DEPTH < end) {
            fetch(k + DEPTH);
        }
        if (has_outputs) {
            u32 b[ACROSS][RIGHT_PARTS][RIGHT_WORDS];
            #pragma unroll
            for (u32 across = 0u; across < ACROSS; across++) {
                #pragma unroll
                for (u32 part = 0u; part < RIGHT_PARTS; part++) {
                    load_right(b[across][part], &rights[part][warp_column() + 8u * across + lane_row()][lane_word()]);
                }
            }
            #pragma unroll
            for (u32 down = 0u; down < DOWN; down++) {
                u32 a[PARTS][LEFT_WORDS];
                #pragma unroll
                for (u32 part = 0u; part < PARTS; part++) {
                    load_left(a[part], &lefts[part][warp_row() + 16u * down + lane_row()][lane_word()], PITCH);
                }
                #pragma unroll
                for (u32 across = 0u; across < ACROSS; across++) {
                    add_products<RIGHT_PARTS>(totals[down][across], a, b[across]);
                }
            }
        }
        __syncthreads();
    }
}
