// out[i, j] = alpha sum over k of a[i, k] b[k, j] + beta out[i, j], without shared memory.
//
// a[i, k] = a[a_first + i a_row + k a_column], likewise b[k, j] and, with rows of out_row values, out. A group computes 32 x 32
// outputs, a thread 4 x 4 of them. Sums run in order of k, in parts of 256; with `fused` products and sums are rounded once.
// Groups: tiles of columns, then of rows.
// Twins: matmul_direct.cu, matmul_tiled.wgsl, src/backend/cpu/matmul.rs.

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
    fused: u32,
    // 0, which compilers must not know.
    zero: u32,
}

@group(0) @binding(0) var<storage, read> a: array<f32>;
@group(0) @binding(1) var<storage, read> b: array<f32>;
@group(0) @binding(2) var<storage, read_write> out: array<f32>;
@group(0) @binding(3) var<uniform> p: Parameters;

const PART = 256u;

// sum + x y
fn added(x: f32, y: vec4<f32>, sum: vec4<f32>) -> vec4<f32> {
    if p.fused == 0u {
        return sum + x * y;
    }
    return vec4(
        fused(x, y.x, sum.x, p.zero),
        fused(x, y.y, sum.y, p.zero),
        fused(x, y.z, sum.z, p.zero),
        fused(x, y.w, sum.w, p.zero),
    );
}

@compute @workgroup_size(64)
fn matmul_direct(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let tile = group_index(group, groups);
    let across = (p.columns + 31u) / 32u;
    let i = tile / across * 32u + lane / 8u * 4u;
    let j = tile % across * 32u + lane % 8u * 4u;
    if i >= p.rows || j >= p.columns {
        return;
    }
    // Rows and columns beyond the last repeat it: they are computed and not stored.
    let rows = min(vec4(i, i + 1u, i + 2u, i + 3u), vec4(p.rows - 1u)) * p.a_row + p.a_first;
    let columns = min(vec4(j, j + 1u, j + 2u, j + 3u), vec4(p.columns - 1u)) * p.b_column + p.b_first;
    var totals = array<vec4<f32>, 4>();
    for (var part = 0u; part < p.inner; part += PART) {
        var sum0 = vec4(0.0);
        var sum1 = vec4(0.0);
        var sum2 = vec4(0.0);
        var sum3 = vec4(0.0);
        for (var k = part; k < min(part + PART, p.inner); k++) {
            let x = rows + k * p.a_column;
            let y = columns + k * p.b_row;
            let right = vec4(b[y.x], b[y.y], b[y.z], b[y.w]);
            sum0 = added(a[x.x], right, sum0);
            sum1 = added(a[x.y], right, sum1);
            sum2 = added(a[x.z], right, sum2);
            sum3 = added(a[x.w], right, sum3);
        }
        totals[0] += sum0;
        totals[1] += sum1;
        totals[2] += sum2;
        totals[3] += sum3;
    }
    for (var r = 0u; r < min(4u, p.rows - i); r++) {
        for (var c = 0u; c < min(4u, p.columns - j); c++) {
            let at = p.out_first + (i + r) * p.out_row + j + c;
            var sum = p.alpha * totals[r][c];
            if p.beta != 0.0 {
                sum += p.beta * out[at];
            }
            out[at] = sum;
        }
    }
}
