// sums[i, j] += sum over k of x[first_i + i, k] x[j, k], for j >= first_i + i and those of its tile: second moments of the columns
// that are rows here, in three parts of BF16, see shared/split_product.wgsl.
//
// x: [n, inner]. sums: [count_i, n], each in two floats, large and small part. A group computes 128 x 128 sums. What k runs over
// in a call is summed in f32, then added without loss: callers give at most 512. Groups: tiles of columns, then of rows;
// those below the diagonal do nothing.
// Twins: gram_split.cu, gram.wgsl of rows in one piece.

struct Parameters {
    n: u32,
    inner: u32,
    first_i: u32,
    count_i: u32,
    // 0, which compilers must not know.
    zero: u32,
}

@group(0) @binding(0) var<storage, read> x: array<u32>;
@group(0) @binding(1) var<storage, read_write> sums: array<vec2<f32>>;
@group(0) @binding(2) var<uniform> p: Parameters;

fn product(i: u32, j: u32) -> f32 {
    let words = part_words(p.inner);
    var sum = 0.0;
    for (var word = 0u; word < (p.inner + 1u) / 2u; word++) {
        let a = i * PARTS * words + word;
        let b = j * PARTS * words + word;
        let products = joined(x[a], x[a + words], x[a + 2u * words]) * joined(x[b], x[b + words], x[b + 2u * words]);
        sum += products.x;
        sum += products.y;
    }
    return sum;
}

@compute @workgroup_size(256)
fn gram_split(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let across = (p.n + TILE - 1u) / TILE;
    let first_i = group_index(group, groups) / across * TILE;
    let first_j = group_index(group, groups) % across * TILE;
    if p.first_i + first_i >= first_j + TILE {
        return;
    }
    for (var item = lane; item < TILE * TILE; item += 256u) {
        let i = first_i + item / TILE;
        let j = first_j + item % TILE;
        if i < p.count_i && j < p.n {
            let at = i * p.n + j;
            sums[at] = add_exactly(sums[at], product(p.first_i + i, j), p.zero);
        }
    }
}
