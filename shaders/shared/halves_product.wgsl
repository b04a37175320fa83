// out[i, j] = sum over k of x[i, k] w[j, k]: weights of 16 bits as they are stored, inputs packed by pack_halves.
//
// A group computes 128 x 128 outputs, a thread 8 x 8 of them, in corners of 4 x 4. Products of 32 values of k are summed, then
// these sums, in order of k. Groups: tiles of rows, then of columns.
// Twins: halves_product.cuh, matmul_q8_0.wgsl.

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

const TILE = 128u;
const DEPTH = 32u;
const WORDS = 16u;

// Two weights of a row from k on, a zero beyond the last.
fn weights(row: u32, k: u32) -> vec2<f32> {
    let at = row + 2u * k;
    if k + 1u == p.inner {
        return values_of(short_at(at));
    }
    return values_of(word_at(at));
}

fn corner(i: u32, j: u32) {
    if i >= p.rows || j >= p.columns {
        return;
    }
    // Rows and columns beyond the last repeat it: they are computed and not stored.
    let x_row = (p.inner + DEPTH - 1u) / DEPTH * WORDS;
    let rows = min(vec4(i, i + 1u, i + 2u, i + 3u), vec4(p.rows - 1u)) * x_row + p.x_first;
    let columns = min(vec4(j, j + 1u, j + 2u, j + 3u), vec4(p.columns - 1u)) * p.inner * 2u + p.first_byte;
    var totals = array<vec4<f32>, 4>();
    for (var part = 0u; part < p.inner; part += DEPTH) {
        var sum0 = vec4(0.0);
        var sum1 = vec4(0.0);
        var sum2 = vec4(0.0);
        var sum3 = vec4(0.0);
        for (var k = part; k < min(part + DEPTH, p.inner); k += 2u) {
            let w0 = weights(columns.x, k);
            let w1 = weights(columns.y, k);
            let w2 = weights(columns.z, k);
            let w3 = weights(columns.w, k);
            let even = vec4(w0.x, w1.x, w2.x, w3.x);
            let odd = vec4(w0.y, w1.y, w2.y, w3.y);
            let x0 = values_of(x[rows.x + k / 2u]);
            let x1 = values_of(x[rows.y + k / 2u]);
            let x2 = values_of(x[rows.z + k / 2u]);
            let x3 = values_of(x[rows.w + k / 2u]);
            sum0 += x0.x * even;
            sum1 += x1.x * even;
            sum2 += x2.x * even;
            sum3 += x3.x * even;
            sum0 += x0.y * odd;
            sum1 += x1.y * odd;
            sum2 += x2.y * odd;
            sum3 += x3.y * odd;
        }
        totals[0] += sum0;
        totals[1] += sum1;
        totals[2] += sum2;
        totals[3] += sum3;
    }
    for (var r = 0u; r < min(4u, p.rows - i); r++) {
        for (var c = 0u; c < min(4u, p.columns - j); c++) {
            out[p.out_first + (i + r) * p.out_row + j + c] = totals[r][c];
        }
    }
}

@compute @workgroup_size(256)
fn KERNEL(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let down_all = (p.rows + TILE - 1u) / TILE;
    let i = group_index(group, groups) % down_all * TILE + lane / 16u * 8u;
    let j = group_index(group, groups) / down_all * TILE + lane % 16u * 8u;
    for (var part = 0u; part < 4u; part++) {
        corner(i + part / 2u * 4u, j + part % 2u * 4u);
    }
}
