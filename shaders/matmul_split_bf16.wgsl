// out[i, j] = sum over k of x[i, k] w[j, k]: weights in BF16 as they are stored, inputs in three parts of BF16, see
// shared/split_product.wgsl.
//
// A group computes 128 x 128 outputs. Groups: tiles of rows, then of columns.
// Twins: matmul_split_bf16.cu, matmul_bf16.wgsl of rounded inputs.

struct Parameters {
    rows: u32,
    columns: u32,
    inner: u32,
    // Byte of the first weight.
    first_byte: u32,
    // Word of the first input.
    x_first: u32,
    out_first: u32,
    out_row: u32,
}

@group(0) @binding(1) var<storage, read> x: array<u32>;
@group(0) @binding(2) var<storage, read_write> out: array<f32>;
@group(0) @binding(3) var<uniform> p: Parameters;

fn product(i: u32, j: u32) -> f32 {
    let words = part_words(p.inner);
    let left = p.x_first + i * PARTS * words;
    let right = p.first_byte + j * p.inner * 2u;
    var sum = 0.0;
    for (var k = 0u; k < p.inner; k += 2u) {
        let a = left + k / 2u;
        let values = joined(x[a], x[a + words], x[a + 2u * words]);
        sum += values.x * values_of(short_at(right + 2u * k)).x;
        if k + 1u < p.inner {
            sum += values.y * values_of(short_at(right + 2u * k + 2u)).x;
        }
    }
    return sum;
}

@compute @workgroup_size(256)
fn matmul_split_bf16(
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
            out[p.out_first + i * p.out_row + j] = product(i, j);
        }
    }
}
