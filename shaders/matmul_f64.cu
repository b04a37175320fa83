// out_r[i, j] = sum over k of a_r[i, k] ((before_r[k] b_r[k, j]) after_r[j]) in f64, for every run r of a block-diagonal matrix.
//
// A group computes 64 x 64 outputs of a run, a thread 4 x 4 of them, columns 16 apart; 16 values of k are in shared memory, and
// the next 16 on their way to registers. Every output is one sum in order of k, product and sum rounded apart: the bits of
// the CPU. Steps from run to run are 0 where all runs share an operand. Groups: runs, then tiles of rows, then of columns.
// Twins: none in WGSL, which has no f64; src/rewrite/matrix.rs.

struct Parameters {
    u32 runs;
    u32 rows;
    u32 columns;
    u32 inner;
    u32 a_run;
    u32 a_row;
    u32 a_column;
    u32 b_run;
    u32 b_row;
    u32 before_run;
    u32 after_run;
    u32 out_run;
    u32 out_row;
};

#define TILE 64u
#define DEPTH 16u
// Values of an operand that a thread loads of every 16 of k.
#define LOADS 4u
#define STEP 16u
// Rows of shared memory: even, for loads of two, and no multiple of 16, so that columns are spread over banks.
#define PITCH 66u

// Where in a block the values lie that a thread loads of A: neighbours load what is neighbouring in memory.
static __device__ inline u32 depth_of(u32 item, bool is_along_k) { return is_along_k ? item % DEPTH : item / TILE; }

static __device__ inline u32 place_of(u32 item, bool is_along_k) { return is_along_k ? item / DEPTH : item % TILE; }

static __device__ inline void fetch_a(double (&held)[LOADS], const double* a, const Parameters& p, u32 first_i, u32 first_k) {
    #pragma unroll
    for (u32 load = 0u; load < LOADS; load++) {
        const u32 item = threadIdx.x + load * 256u;
        const u32 k = first_k + depth_of(item, p.a_column == 1u);
        const u32 i = first_i + place_of(item, p.a_column == 1u);
        held[load] = k < p.inner && i < p.rows ? a[i * p.a_row + k * p.a_column] : 0.0;
    }
}

static __device__ inline void fetch_b(
    double (&held)[LOADS],
    const double* b,
    const double* before,
    const double* after,
    const Parameters& p,
    u32 first_j,
    u32 first_k
) {
    #pragma unroll
    for (u32 load = 0u; load < LOADS; load++) {
        const u32 item = threadIdx.x + load * 256u;
        const u32 k = first_k + item / TILE;
        const u32 j = first_j + item % TILE;
        held[load] = k < p.inner && j < p.columns ? before[k] * b[k * p.b_row + j] * after[j] : 0.0;
    }
}

static __device__ inline void load_two(double* values, const double* from) {
    const double2 two = *reinterpret_cast<const double2*>(from);
    values[0] = two.x;
    values[1] = two.y;
}

extern "C" __global__ void __launch_bounds__(256, 2) matmul_f64(
    const double* __restrict__ a,
    const double* __restrict__ b,
    const double* __restrict__ before,
    const double* __restrict__ after,
    double* __restrict__ out,
    Parameters p
) {
    __shared__ __align__(16) double left[DEPTH][PITCH];
    __shared__ __align__(16) double right[DEPTH][PITCH];
    const u32 across = (p.columns + TILE - 1u) / TILE;
    const u32 tiles = (p.rows + TILE - 1u) / TILE * across;
    const u32 run = group_index() / tiles;
    const u32 tile = group_index() % tiles;
    if (run >= p.runs) {
        return;
    }
    const u32 first_i = tile / across * TILE;
    const u32 first_j = tile % across * TILE;
    a += run * p.a_run;
    b += run * p.b_run;
    before += run * p.before_run;
    after += run * p.after_run;
    const u32 thread_i = threadIdx.x / STEP * 4u;
    const u32 thread_j = threadIdx.x % STEP;
    double sums[4][4] = {};
    double held_a[LOADS];
    double held_b[LOADS];
    fetch_a(held_a, a, p, first_i, 0u);
    fetch_b(held_b, b, before, after, p, first_j, 0u);
    for (u32 k = 0u; k < p.inner; k += DEPTH) {
        #pragma unroll
        for (u32 load = 0u; load < LOADS; load++) {
            const u32 item = threadIdx.x + load * 256u;
            left[depth_of(item, p.a_column == 1u)][place_of(item, p.a_column == 1u)] = held_a[load];
            right[item / TILE][item % TILE] = held_b[load];
        }
        __syncthreads();
        fetch_a(held_a, a, p, first_i, k + DEPTH);
        fetch_b(held_b, b, before, after, p, first_j, k + DEPTH);
        // Beyond the last value of k there are zeros, which change no sum: none is -0.
        #pragma unroll
        for (u32 depth = 0u; depth < DEPTH; depth++) {
            double x[4];
            load_two(&x[0], &left[depth][thread_i]);
            load_two(&x[2], &left[depth][thread_i + 2u]);
            #pragma unroll
            for (u32 c = 0u; c < 4u; c++) {
                const double y = right[depth][thread_j + c * STEP];
                #pragma unroll
                for (u32 r = 0u; r < 4u; r++) {
                    sums[r][c] += x[r] * y;
                }
            }
        }
        __syncthreads();
    }
    #pragma unroll
    for (u32 r = 0u; r < 4u; r++) {
        #pragma unroll
        for (u32 c = 0u; c < 4u; c++) {
            const u32 i = first_i + thread_i + r;
            const u32 j = first_j + thread_j + c * STEP;
            if (i < p.rows && j < p.columns) {
                out[run * p.out_run + i * p.out_row + j] = sums[r][c];
            }
        }
    }
}
