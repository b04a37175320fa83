// x W^T with weights in Q8_0 as they are stored and inputs as quantize_q8_0 leaves them, on tensor cores:
// sum over blocks of d_w d_x dot(codes of w, codes of x), dots in integers, the sum in F32 in order of blocks.
//
// Source: ggml `ggml_vec_dot_q8_0_q8_0`. Tiles as in shared/tensor_tile.cuh; one block is in shared memory, and the next on
// its way to registers. Groups: tiles of rows, then of columns, so that groups that run together share weights.
// Twins: matmul_q8_0.wgsl, matmul_direct.cu of decoded operands.

struct Parameters {
    u32 rows;
    u32 columns;
    u32 inner;
    // Byte of the first block of the weights.
    u32 first_byte;
    // Word of the first codes of the inputs, and their first scale.
    u32 x_first;
    u32 scales_first;
    u32 out_first;
    u32 out_row;
};

#define BLOCK 32u
#define BLOCK_BYTES 34u
#define WORDS 8u
// Words from row to row of shared memory: multiples of 16 bytes spread over banks.
#define PITCH 12u
// As an integer 1.5 * 2^23: the F32 of the same bits, and of those plus a dot, which is below 2^22, is that plus the dot.
#define OFFSET 0x4b400000

static __device__ inline void multiply(int (&dots)[4], const u32 (&left)[LEFT_WORDS], const u32 (&right)[RIGHT_WORDS]) {
#ifdef TENSOR_CORES
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(dots[0]), "+r"(dots[1]), "+r"(dots[2]), "+r"(dots[3])
        : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right[0]), "r"(right[1]));
#else
    for (u32 part = 0u; part < 4u; part++) {
        for (u32 at = 0u; at < BLOCK; at++) {
            const signed char x = (signed char)((left[part / 2u * 8u + at / 4u] >> (at % 4u * 8u)) & 0xffu);
            const signed char w = (signed char)((right[part % 2u * 8u + at / 4u] >> (at % 4u * 8u)) & 0xffu);
            dots[part] += (int)x * (int)w;
        }
    }
#endif
}

// 16 codes of a block.
static __device__ inline uint4 fetch_codes(const u8* codes) {
    return make_uint4(word_at(codes, 0u), word_at(codes, 4u), word_at(codes, 8u), word_at(codes, 12u));
}

extern "C" __global__ void __launch_bounds__(256, 1) matmul_q8_0(
    const u8* __restrict__ bytes,
    const u32* __restrict__ x,
    const float* __restrict__ scales,
    float* __restrict__ out,
    Parameters p
) {
    __shared__ __align__(16) u32 left[2][TILE][PITCH];
    __shared__ __align__(16) u32 right[2][TILE][PITCH];
    __shared__ float left_scales[2][TILE];
    __shared__ float right_scales[2][TILE];
    const u32 down_all = (p.rows + TILE - 1u) / TILE;
    const u32 first_i = group_index() % down_all * TILE;
    const u32 first_j = group_index() / down_all * TILE;
    if (first_j >= p.columns) {
        return;
    }
    // A thread loads half a block of one row of either operand, the even ones the input's scale, the odd ones the weight's.
    // Beyond the last row it is repeated: computed and not stored.
    const u32 place = threadIdx.x / 2u;
    const u32 part_of = threadIdx.x % 2u;
    const u32 blocks = p.inner / BLOCK;
    const u32 i = min(first_i + place, p.rows - 1u);
    const u32 j = min(first_j + place, p.columns - 1u);
    const u32* input = x + p.x_first + i * blocks * WORDS + 4u * part_of;
    const float* input_scale = scales + p.scales_first + i * blocks;
    const u8* weight = bytes + p.first_byte + j * blocks * BLOCK_BYTES;
    uint4 held_left = make_uint4(0u, 0u, 0u, 0u);
    uint4 held_right = held_left;
    float held_scale = 0.0f;
    float totals[DOWN][ACROSS][4] = {};
    const bool has_rows = first_i + warp_row() < p.rows;
    if (blocks > 0u) {
        held_left = *reinterpret_cast<const uint4*>(input);
        held_right = fetch_codes(weight + 2u + 16u * part_of);
        held_scale = part_of == 0u ? *input_scale : half_at(weight, 0u);
    }
    u32 stage = 0u;
    for (u32 block = 0u; block < blocks; block++) {
        *reinterpret_cast<uint4*>(&left[stage][place][4u * part_of]) = held_left;
        *reinterpret_cast<uint4*>(&right[stage][place][4u * part_of]) = held_right;
        (part_of == 0u ? left_scales : right_scales)[stage][place] = held_scale;
        // Who comes here again has been waited for by all: two stages are enough.
        __syncthreads();
        if (block + 1u < blocks) {
            input += WORDS;
            input_scale += 1;
            weight += BLOCK_BYTES;
            held_left = *reinterpret_cast<const uint4*>(input);
            held_right = fetch_codes(weight + 2u + 16u * part_of);
            held_scale = part_of == 0u ? *input_scale : half_at(weight, 0u);
        }
        if (has_rows) {
            u32 a[DOWN][LEFT_WORDS];
            float a_scales[DOWN][2];
            #pragma unroll
            for (u32 down = 0u; down < DOWN; down++) {
                const u32 row = warp_row() + 16u * down + lane_row();
                load_left(a[down], &left[stage][row][lane_word()], PITCH);
                a_scales[down][0] = left_scales[stage][row];
                a_scales[down][1] = left_scales[stage][row + 8u];
            }
            #pragma unroll
            for (u32 across = 0u; across < ACROSS; across++) {
                const u32 column = warp_column() + 8u * across;
                u32 b[RIGHT_WORDS];
                load_right(b, &right[stage][column + lane_row()][lane_word()]);
                const float* b_scales = &right_scales[stage][column + 2u * lane_word()];
                #pragma unroll
                for (u32 down = 0u; down < DOWN; down++) {
                    int dots[4] = {OFFSET, OFFSET, OFFSET, OFFSET};
                    multiply(dots, a[down], b);
                    #pragma unroll
                    for (u32 part = 0u; part < 4u; part++) {
                        const float dot = __uint_as_float((u32)dots[part]) - 12582912.0f;
                        const float scale = b_scales[part % 2u] * a_scales[down][part / 2u];
                        totals[down][across][part] = fmaf(scale, dot, totals[down][across][part]);
                    }
                }
            }
        }
        stage ^= 1u;
    }
    store(out + p.out_first + first_i * p.out_row + first_j, p.out_row, totals, p.rows - first_i, p.columns - first_j);
}
