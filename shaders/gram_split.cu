// sums[i, j] += sum over k of x[first_i + i, k] x[j, k], for j >= first_i + i and those of its tile: second moments of the columns
// that are rows here, in three parts of BF16, on tensor cores, see shared/split_product.cuh.
//
// x: [n, inner]. sums: [count_i, n], each in two floats, large and small part. A group computes 128 x 128 sums. What k runs over
// in a call is summed in f32, then added without loss: callers give at most 512. Groups: tiles of columns, then of rows;
// those below the diagonal do nothing.
// Twins: gram_split.wgsl, gram.cu of rows in one piece.

struct Parameters {
    u32 n;
    u32 inner;
    u32 first_i;
    u32 count_i;
    // For the twin alone: sums are not reordered here.
    u32 zero;
};

extern "C" __global__ void __launch_bounds__(256, 1) gram_split(
    const u32* __restrict__ x,
    float2* __restrict__ sums,
    Parameters p
) {
    const u32 across = (p.n + TILE - 1u) / TILE;
    const u32 tile_i = group_index() / across * TILE;
    const u32 tile_j = group_index() % across * TILE;
    const bool is_below = p.first_i + tile_i >= tile_j + TILE;
    if (is_below || tile_i >= p.count_i) {
        return;
    }
    const u32 row_words = PARTS * part_words(p.inner);
    float totals[DOWN][ACROSS][4] = {};
    multiply_parts<PARTS>(
        totals,
        x + (p.first_i + tile_i) * row_words,
        p.count_i - tile_i,
        reinterpret_cast<const u8*>(x + tile_j * row_words),
        p.n - tile_j,
        p.inner,
        0u,
        true
    );
    float2* to = sums + tile_i * p.n + tile_j;
    for_each_total(totals, p.count_i - tile_i, p.n - tile_j, [&](u32 row, u32 column, float total) {
        float2& sum = to[row * p.n + column];
        sum = add_exactly(sum, total);
    });
}
