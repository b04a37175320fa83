// out[i, j] = alpha sum over k of x[i, k] y[j, k] + beta out[i, j], both operands in three parts of BF16: F32 products on tensor
// cores, see shared/split_product.cuh.
//
// A group computes 128 x 128 outputs. Groups: tiles of rows, then of columns, so that groups that run together share
// columns.
// Twins: matmul_split.wgsl, matmul_tiled.cu of operands in one piece.

struct Parameters {
    u32 rows;
    u32 columns;
    u32 inner;
    // Words of the first value of either operand.
    u32 x_first;
    u32 y_first;
    u32 out_first;
    u32 out_row;
    float alpha;
    float beta;
};

extern "C" __global__ void __launch_bounds__(256, 1) matmul_split(
    const u32* __restrict__ x,
    const u32* __restrict__ y,
    float* __restrict__ out,
    Parameters p
) {
    const u32 down_all = (p.rows + TILE - 1u) / TILE;
    const u32 first_i = group_index() % down_all * TILE;
    const u32 first_j = group_index() / down_all * TILE;
    if (first_j >= p.columns) {
        return;
    }
    const u32 row_words = PARTS * part_words(p.inner);
    const u32* left = x + p.x_first + first_i * row_words;
    const u32* right = y + p.y_first + first_j * row_words;
    float* to = out + p.out_first + first_i * p.out_row + first_j;
    u32 k = 0u;
    do {
        float totals[DOWN][ACROSS][4] = {};
        multiply_parts<PARTS>(
            totals,
            left,
            p.rows - first_i,
            reinterpret_cast<const u8*>(right),
            p.columns - first_j,
            p.inner,
            k,
            true
        );
        const float beta = k == 0u ? p.beta : 1.0f;
        // Else the places of all outputs are computed before the loop, and held.
        u32 out_row = p.out_row;
        asm volatile("" : "+r"(out_row));
        for_each_total(totals, p.rows - first_i, p.columns - first_j, [&](u32 row, u32 column, float total) {
            float& value = to[row * out_row + column];
            value = beta == 0.0f ? p.alpha * total : fmaf(p.alpha, total, beta * value);
        });
        k += CHUNK;
    } while (k < p.inner);
}
