// out[i, j] = alpha sum over k of x[i, k] y[j, k] + beta out[i, j], both operands in three parts of BF16, see
// shared/split_product.wgsl.
//
// A group computes 128 x 128 outputs. Groups: tiles of rows, then of columns.
// Twins: matmul_split.cu, matmul_tiled.wgsl of operands in one piece.

struct Parameters {
    rows: u32,
    columns: u32,
    inner: u32,
    // Words of the first value of either operand.
    x_first: u32,
    y_first: u32,
    out_first: u32,
    out_row: u32,
    alpha: f32,
    beta: f32,
}

@group(0) @binding(0) var<storage, read> x: array<u32>;
@group(0) @binding(1) var<storage, read> y: array<u32>;
@group(0) @binding(2) var<storage, read_write> out: array<f32>;
@group(0) @binding(3) var<uniform> p: Parameters;

fn product(i: u32, j: u32) -> f32 {
    let words = part_words(p.inner);
    let left = p.x_first + i * PARTS * words;
    let right = p.y_first + j * PARTS * words;
    var sum = 0.0;
    for (var word = 0u; word < (p.inner + 1u) / 2u; word++) {
        let a = left + word;
        let b = right + word;
        let products = joined(x[a], x[a + words], x[a + 2u * words]) * joined(y[b], y[b + words], y[b + 2u * words]);
        sum += products.x;
        sum += products.y;
    }
    return sum;
}

@compute @workgroup_size(256)
fn matmul_split(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let down_all = (p.rows + TILE - 1u) / TILE;
    let first_i = group_index(group, groups) % down_all * TILE;
    let first_j = group_index(group, groups) / down_all * TILE;
    for (var item = lane; item < TILE * TILE; item += 256u) {
        let i = first_i + item / TILE;
        let j = first_j + item % TILE;
        if i < p.rows && j < p.columns {
            let at = p.out_first + i * p.out_row + j;
            var value = p.alpha * product(i, j);
            if p.beta != 0.0 {
                value += p.beta * out[at];
            }
            out[at] = value;
        }
    }
}
