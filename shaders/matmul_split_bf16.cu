// out[i, j] = sum over k of x[i, k] w[j, k]: weights in BF16 as they are stored, inputs in three parts of BF16: F32 products on
// tensor cores, see shared/split_product.cuh.
//
// A group computes 128 x 128 outputs. Groups: tiles of rows, then of columns, so that groups that run together share
// weights.
// Twins: matmul_split_bf16.wgsl, matmul_bf16.cu of rounded inputs.

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

extern "C" __global__ void __launch_bounds__(256, 1) matmul_split_bf16(
    const u8* __restrict__ bytes,
    const u32* __restrict__ x,
    float* __restrict__ out,
    Parameters p
) {
    const u32 down_all = (p.rows + TILE - 1u) / TILE;
    const u32 first_i = group_index() % down_all * TILE;
    const u32 first_j = group_index() / down_all * TILE;
    if (first_j >= p.columns) {
        return;
    }
    float* to = out + p.out_first + first_i * p.out_row + first_j;
    u32 k = 0u;
    do {
        float totals[DOWN][ACROSS][4] = {};
        multiply_parts<1u>(
            totals,
            x + p.x_first + first_i * PARTS * part_words(p.inner),
            p.rows - first_i,
            bytes + p.first_byte + first_j * p.inner * 2u,
            p.columns - first_j,
            p.inner,
            k,
            p.inner % 8u == 0u && p.first_byte % 16u == 0u
        );
        const bool is_first = k == 0u;
        // Else the places of all outputs are computed before the loop, and held.
        u32 out_row = p.out_row;
        asm volatile("" : "+r"(out_row));
        for_each_total(totals, p.rows - first_i, p.columns - first_j, [&](u32 row, u32 column, float total) {
            float& value = to[row * out_row + column];
            value = is_first ? total : value + total;
        });
        k += CHUNK;
    } while (k < p.inner);
}
