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

// What a thread loads of one operand: four values of each block, a step apart.
struct Loads {
    // The first of the block that comes.
    const float* next;
    u32 next_part;
    u32 next_block;
    // Where it belongs in the block: place is a row of A or a column of B.
    u32 depth;
    u32 place;
    // The same from value to value: neighbouring threads load what is neighbouring in memory.
    u32 depth_step;
    u32 place_step;
    // Places of the operand in this tile.
    u32 places;
};

static __device__ inline Loads loads_of(const float* values, u32 place_step, u32 k_step, u32 first, u32 places) {
    Loads loads;
    const bool is_along_k = k_step == 1u;
    loads.depth = is_along_k ? threadIdx.x % DEPTH : threadIdx.x / TILE;
    loads.place = is_along_k ? threadIdx.x / DEPTH : threadIdx.x % TILE;
    loads.depth_step = is_along_k ? 0u : 256u / TILE;
    loads.place_step = is_along_k ? 256u / DEPTH : 0u;
    loads.next = values + (first + loads.place) * place_step + loads.depth * k_step;
    loads.next_part = loads.depth_step * k_step + loads.place_step * place_step;
    loads.next_block = DEPTH * k_step;
    loads.places = places - first;
    return loads;
}

// Beyond the last zeros.
static __device__ inline void fetch(float (&held)[4], Loads& loads, u32 depths) {
    #pragma unroll
    for (u32 part = 0u; part < 4u; part++) {
        const bool is_there = loads.depth + part * loads.depth_step < depths
            && loads.place + part * loads.place_step < loads.places;
        held[part] = is_there ? loads.next[part * loads.next_part] : 0.0f;
    }
    loads.next += loads.next_block;
}

static __device__ inline void keep(float (*block)[PITCH], const Loads& loads, const float (&held)[4]) {
    #pragma unroll
    for (u32 part = 0u; part < 4u; part++) {
        block[loads.depth + part * loads.depth_step][loads.place + part * loads.place_step] = held[part];
    }
}

static __device__ inline void load_four(float (&values)[4], const float* from) {
    const float4 four = *reinterpret_cast<const float4*>(from);
    values[0] = four.x;
    values[1] = four.y;
    values[2] = four.z;
    values[3] = four.w;
}

extern "C" __global__ void __launch_bounds__(256, 2) matmul_tiled(
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
    Loads of_a = loads_of(a + p.a_first, p.a_row, p.a_column, first_i, p.rows);
    Loads of_b = loads_of(b + p.b_first, p.b_column, p.b_row, first_j, p.columns);
    float totals[4][4] = {};
    float sums[4][4] = {};
    float held_a[4];
    float held_b[4];
    fetch(held_a, of_a, p.inner);
    fetch(held_b, of_b, p.inner);
    for (u32 k = 0u; k < p.inner; k += DEPTH) {
        keep(left, of_a, held_a);
        keep(right, of_b, held_b);
        __syncthreads();
        const u32 depths_left = p.inner - min(k + DEPTH, p.inner);
        fetch(held_a, of_a, depths_left);
        fetch(held_b, of_b, depths_left);
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
