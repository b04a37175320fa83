// out[i, j] = alpha sum over k of a[i, k] b[k, j] + beta out[i, j], with blocks of both operands in shared memory.
//
// Operands as in matmul_direct. A group computes 64 x 64 outputs, a thread 4 x 4 of them; 16 values of k are loaded at a
// time. Sums run in order of k, in parts of 256: the same as those of matmul_direct. Groups: tiles of columns, then of rows.
// Twins: matmul_tiled.cu, matmul_direct.wgsl, src/backend/cpu/matmul.rs.

struct Parameters {
    rows: u32,
    columns: u32,
    inner: u32,
    a_first: u32,
    a_row: u32,
    a_column: u32,
    b_first: u32,
    b_row: u32,
    b_column: u32,
    out_first: u32,
    out_row: u32,
    alpha: f32,
    beta: f32,
}

@group(0) @binding(0) var<storage, read> a: array<f32>;
@group(0) @binding(1) var<storage, read> b: array<f32>;
@group(0) @binding(2) var<storage, read_write> out: array<f32>;
@group(0) @binding(3) var<uniform> p: Parameters;

const TILE = 64u;
const DEPTH = 16u;
const PARTS = 16u;

// [k][i] and [k][j], as vectors of four.
var<workgroup> left: array<array<vec4<f32>, 16>, 16>;
var<workgroup> right: array<array<vec4<f32>, 16>, 16>;

@compute @workgroup_size(256)
fn matmul_tiled(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let tile = group_index(group, groups);
    let across = (p.columns + TILE - 1u) / TILE;
    let first_i = tile / across * TILE;
    let first_j = tile % across * TILE;
    let thread_i = lane / 16u;
    let thread_j = lane % 16u;
    // Who loads what: neighbours along the dimension whose values are neighbours in memory.
    let a_k = select(lane / 16u, lane % 16u, p.a_column == 1u);
    let a_i = select(lane % 16u, lane / 16u, p.a_column == 1u);
    let b_k = select(lane / 16u, lane % 16u, p.b_row == 1u);
    let b_j = select(lane % 16u, lane / 16u, p.b_row == 1u);
    var totals = array<vec4<f32>, 4>();
    var sums = array<vec4<f32>, 4>();
    for (var k = 0u; k < p.inner; k += DEPTH) {
        for (var part = 0u; part < 4u; part++) {
            let i = first_i + a_i * 4u + part;
            let j = first_j + b_j * 4u + part;
            var x = 0.0;
            var y = 0.0;
            if i < p.rows && k + a_k < p.inner {
                x = a[p.a_first + i * p.a_row + (k + a_k) * p.a_column];
            }
            if j < p.columns && k + b_k < p.inner {
                y = b[p.b_first + (k + b_k) * p.b_row + j * p.b_column];
            }
            left[a_k][a_i][part] = x;
            right[b_k][b_j][part] = y;
        }
        workgroupBarrier();
        for (var depth = 0u; depth < DEPTH; depth++) {
            let x = left[depth][thread_i];
            let y = right[depth][thread_j];
            sums[0] += x.x * y;
            sums[1] += x.y * y;
            sums[2] += x.z * y;
            sums[3] += x.w * y;
        }
        if (k / DEPTH) % PARTS == PARTS - 1u {
            for (var r = 0u; r < 4u; r++) {
                totals[r] += sums[r];
                sums[r] = vec4(0.0);
            }
        }
        workgroupBarrier();
    }
    let i = first_i + thread_i * 4u;
    let j = first_j + thread_j * 4u;
    if i >= p.rows || j >= p.columns {
        return;
    }
    for (var r = 0u; r < min(4u, p.rows - i); r++) {
        let row = totals[r] + sums[r];
        for (var c = 0u; c < min(4u, p.columns - j); c++) {
            let at = p.out_first + (i + r) * p.out_row + j + c;
            var sum = p.alpha * row[c];
            if p.beta != 0.0 {
                sum += p.beta * out[at];
            }
            out[at] = sum;
        }
    }
}
