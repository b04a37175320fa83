// sums[i, j] += sum over rows of x[row, first_i + i] x[row, j], for j >= first_i + i and those of its tile.
//
// x: [rows, n], from first_value on. sums: [count_i, n], each in two floats, large and small part. A group computes 32 x 32
// sums, a thread 4 x 4. The rows of a call are summed in f32, in order, then added without loss: callers give at most 512.
// Groups: tiles of columns, then of rows; those below the diagonal do nothing.
// Twins: gram.cu, src/backend/cpu/gram.rs.

struct Parameters {
    rows: u32,
    n: u32,
    first_i: u32,
    count_i: u32,
    first_value: u32,
    // 0, which compilers must not know.
    zero: u32,
}

@group(0) @binding(0) var<storage, read> x: array<f32>;
@group(0) @binding(1) var<storage, read_write> sums: array<vec2<f32>>;
@group(0) @binding(2) var<uniform> p: Parameters;

@compute @workgroup_size(64)
fn gram(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let tile = group_index(group, groups);
    let across = (p.n + 31u) / 32u;
    let i = tile / across * 32u + lane / 8u * 4u;
    let j = tile % across * 32u + lane % 8u * 4u;
    let is_below = tile / across * 32u + p.first_i >= tile % across * 32u + 32u;
    if is_below || i >= p.count_i || j >= p.n {
        return;
    }
    let lefts = min(vec4(i, i + 1u, i + 2u, i + 3u), vec4(p.count_i - 1u)) + p.first_i + p.first_value;
    let rights = min(vec4(j, j + 1u, j + 2u, j + 3u), vec4(p.n - 1u)) + p.first_value;
    var sum0 = vec4(0.0);
    var sum1 = vec4(0.0);
    var sum2 = vec4(0.0);
    var sum3 = vec4(0.0);
    for (var row = 0u; row < p.rows; row++) {
        let left = lefts + row * p.n;
        let right = rights + row * p.n;
        let y = vec4(x[right.x], x[right.y], x[right.z], x[right.w]);
        sum0 += x[left.x] * y;
        sum1 += x[left.y] * y;
        sum2 += x[left.z] * y;
        sum3 += x[left.w] * y;
    }
    var all = array<vec4<f32>, 4>(sum0, sum1, sum2, sum3);
    for (var r = 0u; r < min(4u, p.count_i - i); r++) {
        for (var c = 0u; c < min(4u, p.n - j); c++) {
            let at = (i + r) * p.n + j + c;
            sums[at] = add_exactly(sums[at], all[r][c], p.zero);
        }
    }
}
