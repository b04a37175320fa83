// out[i, j] = alpha sum over k of a[i, k] b[k, j] + beta out[i, j], without shared memory.
//
// a[i, k] = a[a_first + i a_row + k a_column], likewise b[k, j] and, with rows of out_row values, out. A group computes 32 x 32
// outputs, a thread 4 x 4 of them. Sums run in order of k, in parts of 256. Groups: tiles of columns, then of rows.
// Twins: matmul_direct.wgsl, matmul_tiled.cu, src/backend/cpu/matmul.rs.

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
    // For the twin alone: products and sums are always fused here.
    u32 fused;
    u32 zero;
};

#define PART 256u

extern "C" __global__ void __launch_bounds__(64, 8) matmul_direct(
    const float* __restrict__ a,
    const float* __restrict__ b,
    float* __restrict__ out,
    Parameters p
) {
    const u32 tile = group_index();
    const u32 lane = threadIdx.x;
    const u32 across = (p.columns + 31u) / 32u;
    const u32 i = tile / across * 32u + lane / 8u * 4u;
    const u32 j = tile % across * 32u + lane % 8u * 4u;
    if (i >= p.rows || j >= p.columns) {
        return;
    }
    // Rows and columns beyond the last repeat it: they are computed and not stored.
    u32 rows[4];
    u32 columns[4];
    #pragma unroll
    for (u32 part = 0u; part < 4u; part++) {
        rows[part] = p.a_first + min(i + part, p.rows - 1u) * p.a_row;
        columns[part] = p.b_first + min(j + part, p.columns - 1u) * p.b_column;
    }
    float totals[4][4] = {};
    for (u32 part = 0u; part < p.inner; part += PART) {
        float sums[4][4] = {};
        const u32 end = min(part + PART, p.inner);
        for (u32 k = part; k < end; k++) {
            #pragma unroll
            for (u32 r = 0u; r < 4u; r++) {
                const float x = a[rows[r] + k * p.a_column];
                #pragma unroll
                for (u32 c = 0u; c < 4u; c++) {
                    sums[r][c] = fmaf(x, b[columns[c] + k * p.b_row], sums[r][c]);
                }
            }
        }
        #pragma unroll
        for (u32 r = 0u; r < 4u; r++) {
            #pragma unroll
            for (u32 c = 0u; c < 4u; c++) {
                totals[r][c] += sums[r][c];
            }
        }
    }
    for (u32 r = 0u; r < 4u && i + r < p.rows; r++) {
        for (u32 c = 0u; c < 4u && j + c < p.columns; c++) {
            const u32 at = p.out_first + (i + r) * p.out_row + j + c;
            float sum = p.alpha * totals[r][c];
            if (p.beta != 0.0f) {
                sum = fmaf(p.beta, out[at], sum);
            }
            out[at] = sum;
        }
    }
}
