// out[i, j] = alpha sum over k of a[i, k] b[k, j] + beta out[i, j], with blocks of both operands in shared memory.
//
// Operands as in matmul_direct. A group computes 64 x 64 outputs, a thread 4 x 4 of them; 16 values of k are in shared
// memory, and the next 16 on their way to registers. Sums run in order of k, in parts of 256: the same as those of
// matmul_direct. Groups: tiles of columns, then of rows.
// Twins: matmul_tiled.wgsl, matmul_direct.cu, src/backend/cpu/matmul.rs.

struct Parameters {
    u32 rows;
    u32 columns;
    u32 inner;
    u32 a_first;
    u32 a_row;
    u32 a_column;
    u32 b_first;
    u32 b_row;
    u32 b_column;
    u32 out_first;
    u32 out_row;
    float alpha;
    float beta;
};

#define TILE 64u
#define DEPTH 16u
// Blocks of k in a part.
#define PARTS 16u
// Rows of shared memory: a multiple of 4 for loads of four, and not of 32, so that columns are spread over banks.
#define PITCH 68u

// One operand of a tile: value [place, k] is at `values[first + place * place_step + k * k_step]`.
struct Operand {
    const float* values;
    u32 first;
    u32 place_step;
    u32 k_step;
    // Of the tile.
    u32 origin;
    // Of the whole operand.
    u32 places;
    u32 inner;
};

// The block value that a thread loads: neighbours lie along the dimension whose values are neighbours in memory.
static __device__ inline u32 depth_of(const Operand& from, u32 item) {
    return from.k_step == 1u ? item % DEPTH : item / TILE;
}

static __device__ inline u32 place_of(const Operand& from, u32 item) {
    return from.k_step == 1u ? item / DEPTH : item % TILE;
}

static __device__ inline void fetch(float (&held)[4], const Operand& from, u32 k) {
    #pragma unroll
    for (u32 part = 0u; part < 4u; part++) {
        const u32 item = part * 256u + threadIdx.x;
        const u32 depth = k + depth_of(from, item);
        const u32 place = from.origin + place_of(from, item);
        held[part] = depth < from.inner && place < from.places
            ? from.values[from.first + place * from.place_step + depth * from.k_step]
            : 0.0f;
    }
}

static __device__ inline void keep(float (*block)[PITCH], const Operand& from, const float (&held)[4]) {
    #pragma unroll
    for (u32 part = 0u; part < 4u; part++) {
        const u32 item = part * 256u + threadIdx.x;
        block[depth_of(from, item)][place_of(from, item)] = held[part];
    }
}

static __device__ inline void load_four(float (&values)[4], const float* from) {
    const float4 four = *reinterpret_cast<const float4*>(from);
    values[0] = four.x;
    values[1] = four.y;
    values[2] = four.z;
    values[3] = four.w;
}

extern "C" __global__ void __launch_bounds__(256, 3) matmul_tiled(
    const float* __restrict__ a,
    const float* __restrict__ b,
    float* __restrict__ out,
    Parameters p
) {
    __shared__ __align__(16) float left[DEPTH][PITCH];
    __shared__ __align__(16) float right[DEPTH][PITCH];
    const u32 tile = group_index();
    const u32 across = (p.columns + TILE - 1u) / TILE;
    const u32 first_i = tile / across * TILE;
    const u32 first_j = tile % across * TILE;
    if (first_i >= p.rows) {
        return;
    }
    const u32 thread_i = threadIdx.x / 16u * 4u;
    const u32 thread_j = threadIdx.x % 16u * 4u;
    const Operand from_a = {a, p.a_first, p.a_row, p.a_column, first_i, p.rows, p.inner};
    const Operand from_b = {b, p.b_first, p.b_column, p.b_row, first_j, p.columns, p.inner};
    float totals[4][4] = {};
    float sums[4][4] = {};
    float held_a[4];
    float held_b[4];
    fetch(held_a, from_a, 0u);
    fetch(held_b, from_b, 0u);
    for (u32 k = 0u; k < p.inner; k += DEPTH) {
        keep(left, from_a, held_a);
        keep(right, from_b, held_b);
        __syncthreads();
        fetch(held_a, from_a, k + DEPTH);
        fetch(held_b, from_b, k + DEPTH);
        #pragma unroll
        for (u32 depth = 0u; depth < DEPTH; depth++) {
            float x[4];
            float y[4];
            load_four(x, &left[depth][thread_i]);
            load_four(y, &right[depth][thread_j]);
            #pragma unroll
            for (u32 r = 0u; r < 4u; r++) {
                #pragma unroll
                for (u32 c = 0u; c < 4u; c++) {
                    sums[r][c] = fmaf(x[r], y[c], sums[r][c]);
                }
            }
        }
        const bool is_part_full = k / DEPTH % PARTS == PARTS - 1u;
        if (is_part_full || k + DEPTH >= p.inner) {
            #pragma unroll
            for (u32 r = 0u; r < 4u; r++) {
                #pragma unroll
                for (u32 c = 0u; c < 4u; c++) {
                    totals[r][c] += sums[r][c];
                    sums[r][c] = 0.0f;
                }
            }
        }
        __syncthreads();
    }
    const u32 i = first_i + thread_i;
    const u32 j = first_j + thread_j;
    #pragma unroll
    for (u32 r = 0u; r < 4u; r++) {
        #pragma unroll
        for (u32 c = 0u; c < 4u; c++) {
            if (i + r >= p.rows || j + c >= p.columns) {
                continue;
            }
            const u32 at = p.out_first + (i + r) * p.out_row + j + c;
            float sum = p.alpha * totals[r][c];
            if (p.beta != 0.0f) {
                sum = fmaf(p.beta, out[at], sum);
            }
            out[at] = sum;
        }
    }
}
