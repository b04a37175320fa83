// losses += errors times gradient, by row: the loss tr(E M E^T) of a chunk of `width` columns, each sum in two floats.
//
// errors, gradient (E M): [column, row], errors from errors_first on; losses: [row][large part, small part]. One thread per
// row.
// Twins: feedback_loss.wgsl, src/quantize/feedback/mod.rs.

struct Parameters {
    u32 rows;
    u32 width;
    u32 errors_first;
    // For the twin alone: sums are not reordered here.
    u32 zero;
};

extern "C" __global__ void __launch_bounds__(64) feedback_loss(
    const float* __restrict__ errors,
    const float* __restrict__ gradient,
    float2* __restrict__ losses,
    Parameters p
) {
    const u32 row = group_index() * 64u + threadIdx.x;
    if (row >= p.rows) {
        return;
    }
    float2 loss = losses[row];
    for (u32 c = 0u; c < p.width; c++) {
        const float term = errors[p.errors_first + c * p.rows + row] * gradient[c * p.rows + row];
        loss = add_exactly(loss, term);
    }
    losses[row] = loss;
}
