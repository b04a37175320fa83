// x W^T with weights in Q8_0 as they are stored and inputs as quantize_q8_0 leaves them:
// sum over blocks of d_w d_x dot(codes of w, codes of x), dots in integers, the sum in F32 in order of blocks.
//
// Source: ggml `ggml_vec_dot_q8_0_q8_0`. A group computes 128 x 128 outputs, a thread 8 x 8 of them, in corners of 4 x 4.
// Groups: tiles of rows, then of columns.
// Twins: matmul_q8_0.cu, matmul_direct.wgsl of decoded operands.

struct Parameters {
    rows: u32,
    columns: u32,
    inner: u32,
    // Byte of the first block of the weights.
    first_byte: u32,
    // Word of the first codes of the inputs, and their first scale.
    x_first: u32,
    scales_first: u32,
    out_first: u32,
    out_row: u32,
}

@group(0) @binding(1) var<storage, read> x: array<u32>;
@group(0) @binding(2) var<storage, read> scales: array<f32>;
@group(0) @binding(3) var<storage, read_write> out: array<f32>;
@group(0) @binding(4) var<uniform> p: Parameters;

const TILE = 128u;
const BLOCK = 32u;
const BLOCK_BYTES = 34u;
const WORDS = 8u;

// Of four inputs with one weight.
fn dots(codes: vec4<u32>, word: u32) -> vec4<i32> {
    return vec4(
        dot4I8Packed(codes.x, word),
        dot4I8Packed(codes.y, word),
        dot4I8Packed(codes.z, word),
        dot4I8Packed(codes.w, word),
    );
}

fn corner(i: u32, j: u32) {
    if i >= p.rows || j >= p.columns {
        return;
    }
    // Rows and columns beyond the last repeat it: they are computed and not stored.
    let blocks = p.inner / BLOCK;
    let rows = min(vec4(i, i + 1u, i + 2u, i + 3u), vec4(p.rows - 1u)) * blocks;
    let columns = min(vec4(j, j + 1u, j + 2u, j + 3u), vec4(p.columns - 1u)) * blocks;
    // [column][row]
    var totals = array<vec4<f32>, 4>();
    for (var block = 0u; block < blocks; block++) {
        let input = p.x_first + (rows + block) * WORDS;
        let weight = p.first_byte + (columns + block) * BLOCK_BYTES;
        var dot0 = vec4(0);
        var dot1 = vec4(0);
        var dot2 = vec4(0);
        var dot3 = vec4(0);
        for (var word = 0u; word < WORDS; word++) {
            let codes = vec4(x[input.x + word], x[input.y + word], x[input.z + word], x[input.w + word]);
            let at = weight + 2u + 4u * word;
            dot0 += dots(codes, word_at(at.x));
            dot1 += dots(codes, word_at(at.y));
            dot2 += dots(codes, word_at(at.z));
            dot3 += dots(codes, word_at(at.w));
        }
        let at = p.scales_first + rows + block;
        let scale = vec4(scales[at.x], scales[at.y], scales[at.z], scales[at.w]);
        totals[0] += half_at(weight.x) * scale * vec4<f32>(dot0);
        totals[1] += half_at(weight.y) * scale * vec4<f32>(dot1);
        totals[2] += half_at(weight.z) * scale * vec4<f32>(dot2);
        totals[3] += half_at(weight.w) * scale * vec4<f32>(dot3);
    }
    for (var c = 0u; c < min(4u, p.columns - j); c++) {
        for (var r = 0u; r < min(4u, p.rows - i); r++) {
            out[p.out_first + (i + r) * p.out_row + j + c] = totals[c][r];
        }
    }
}

@compute @workgroup_size(256)
fn matmul_q8_0(
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
