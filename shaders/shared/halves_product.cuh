// out[i, j] = sum over k of x[i, k] w[j, k]: weights of 16 bits as they are stored, inputs packed by pack_halves.
//
// 32 values of k are in shared memory, and the next 32 on their way to registers. Their products are summed by the tensor
// cores, these sums in F32 in order of k: tensor cores cut sums off where F32 rounds them. Groups: tiles of rows, then of
// columns, so that groups that run together share weights. `multiply` adds the products of 16 values of k.
// Twins: halves_product.wgsl, matmul_q8_0.cu.

struct Parameters {
    u32 rows;
    u32 columns;
    u32 inner;
    // Byte of the first weight.
    u32 first_byte;
    // Word of the first input.
    u32 x_first;
    u32 out_first;
    u32 out_row;
};

// Values of k, their words, and words from row to row of shared memory: multiples of 16 bytes spread over banks.
#define DEPTH 32u
#define WORDS 16u
#define PITCH 20u

extern "C" __global__ void __launch_bounds__(256, 1) KERNEL(
    const u8* __restrict__ bytes,
    const u32* __restrict__ x,
    float* __restrict__ out,
    Parameters p
) {
    __shared__ __align__(16) u32 left[2][TILE][PITCH];
    __shared__ __align__(16) u32 right[2][TILE][PITCH];
    const u32 down_all = (p.rows + TILE - 1u) / TILE;
    const u32 first_i = group_index() % down_all * TILE;
    const u32 first_j = group_index() / down_all * TILE;
    if (first_j >= p.columns) {
        return;
    }
    // A thread loads 16 bytes of two rows of either operand, 64 rows apart. Beyond the last one it is repeated: computed and
    // not stored.
    const u32 place = threadIdx.x / 4u;
    const u32 quarter = threadIdx.x % 4u;
    const u32 x_row = (p.inner + DEPTH - 1u) / DEPTH * WORDS;
    const bool is_aligned = p.inner % 8u == 0u && p.first_byte % 16u == 0u;
    const u32* inputs[2];
    const u8* weights[2];
    #pragma unroll
    for (u32 part = 0u; part < 2u; part++) {
        const u32 i = min(first_i + place + 64u * part, p.rows - 1u);
        const u32 j = min(first_j + place + 64u * part, p.columns - 1u);
        inputs[part] = x + p.x_first + i * x_row + 4u * quarter;
        weights[part] = bytes + p.first_byte + j * p.inner * 2u;
    }
    uint4 held[2][2];
    float totals[DOWN][ACROSS][4] = {};
    const bool has_rows = first_i + warp_row() < p.rows;
    #pragma unroll
    for (u32 part = 0u; part < 2u && p.inner > 0u; part++) {
        held[0][part] = *reinterpret_cast<const uint4*>(inputs[part]);
        held[1][part] = fetch_weights(weights[part], 8u * quarter, p.inner, is_aligned);
    }
    u32 stage = 0u;
    for (u32 k = 0u; k < p.inner; k += DEPTH) {
        #pragma unroll
        for (u32 part = 0u; part < 2u; part++) {
            *reinterpret_cast<uint4*>(&left[stage][place + 64u * part][4u * quarter]) = held[0][part];
            *reinterpret_cast<uint4*>(&right[stage][place + 64u * part][4u * quarter]) = held[1][part];
        }
        // Who comes here again has been waited for by all: two stages are enough.
        __syncthreads();
        #pragma unroll
        for (u32 part = 0u; part < 2u && k + DEPTH < p.inner; part++) {
            inputs[part] += WORDS;
            held[0][part] = *reinterpret_cast<const uint4*>(inputs[part]);
            held[1][part] = fetch_weights(weights[part], k + DEPTH + 8u * quarter, p.inner, is_aligned);
        }
        if (has_rows) {
            u32 a[DOWN][2][LEFT_WORDS];
            #pragma unroll
            for (u32 down = 0u; down < DOWN; down++) {
                const u32* row = &left[stage][warp_row() + 16u * down + lane_row()][lane_word()];
                load_left(a[down][0], row, PITCH);
                load_left(a[down][1], row + 8u, PITCH);
            }
            #pragma unroll
            for (u32 across = 0u; across < ACROSS; across++) {
                const u32* column = &right[stage][warp_column() + 8u * across + lane_row()][lane_word()];
                u32 b[2][RIGHT_WORDS];
                load_right(b[0], column);
                load_right(b[1], column + 8u);
                #pragma unroll
                for (u32 down = 0u; down < DOWN; down++) {
                    float sums[4] = {};
                    multiply(sums, a[down][0], b[0]);
                    multiply(sums, a[down][1], b[1]);
                    #pragma unroll
                    for (u32 part = 0u; part < 4u; part++) {
                        totals[down][across][part] += sums[part];
                    }
                }
            }
        }
        stage ^= 1u;
    }
    store(out + p.out_first + first_i * p.out_row + first_j, p.out_row, totals, p.rows - first_i, p.columns - first_j);
}
