// What the KL divergence of two rows of logits needs besides their softmax_sums: the sum of e^(x - largest) (x - y) of each
// part of each row.
//
// x, the reference: [rows, x_stride], from first_x on; y: [rows, y_stride], from first_y on; `width` values of a row count,
// cut into parts of `part`. x_sums: softmax_sums of x, of the same parts. out: [rows, parts] of two floats, large and small
// part of the sum. One group per row and part.
// Twins: kl_divergence.cu, src/backend/cpu/softmax.rs.

struct Parameters {
    rows: u32,
    width: u32,
    x_stride: u32,
    first_x: u32,
    y_stride: u32,
    first_y: u32,
    part: u32,
    // 0, which compilers must not know.
    zero: u32,
}

@group(0) @binding(0) var<storage, read> x: array<f32>;
@group(0) @binding(1) var<storage, read> y: array<f32>;
@group(0) @binding(2) var<storage, read> x_sums: array<vec4<u32>>;
@group(0) @binding(3) var<storage, read_write> out: array<vec2<f32>>;
@group(0) @binding(4) var<uniform> p: Parameters;

var<workgroup> sums: array<vec2<f32>, 64>;

@compute @workgroup_size(64)
fn kl_divergence(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let item = group_index(group, groups);
    let parts = (p.width + p.part - 1u) / p.part;
    let row = item / parts;
    if row >= p.rows {
        return;
    }
    let x_row = p.first_x + row * p.x_stride;
    let y_row = p.first_y + row * p.y_stride;
    let begin = item % parts * p.part;
    let end = min(begin + p.part, p.width);
    let largest = bitcast<f32>(x_sums[item].x);
    var sum = vec2(0.0);
    for (var c = begin + lane; c < end; c += 64u) {
        let value = x[x_row + c];
        sum = add_exactly(sum, exp_of(value - largest) * (value - y[y_row + c]), p.zero);
    }
    sums[lane] = sum;
    workgroupBarrier();
    if lane > 0u {
        return;
    }
    for (var other = 1u; other < 64u; other++) {
        sum = add_exactly(sum, sums[other].x, p.zero);
        sum.y += sums[other].y;
    }
    out[item] = sum;
}
