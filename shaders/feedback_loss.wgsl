// losses += errors times gradient, by row: the loss tr(E M E^T) of a chunk of `width` columns, each sum in two floats.
//
// errors, gradient (E M): [column, row], errors from errors_first on; losses: [row][large part, small part]. One thread per
// row.
// Twins: feedback_loss.cu, src/quantize/feedback/mod.rs.

struct Parameters {
    rows: u32,
    width: u32,
    errors_first: u32,
    // 0, which compilers must not know.
    zero: u32,
}

@group(0) @binding(0) var<storage, read> errors: array<f32>;
@group(0) @binding(1) var<storage, read> gradient: array<f32>;
@group(0) @binding(2) var<storage, read_write> losses: array<vec2<f32>>;
@group(0) @binding(3) var<uniform> p: Parameters;

@compute @workgroup_size(64)
fn feedback_loss(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let row = group_index(group, groups) * 64u + lane;
    if row >= p.rows {
        return;
    }
    var loss = losses[row];
    for (var c = 0u; c < p.width; c++) {
        let term = errors[p.errors_first + c * p.rows + row] * gradient[c * p.rows + row];
        loss = add_exactly(loss, term, p.zero);
    }
    losses[row] = loss;
}
