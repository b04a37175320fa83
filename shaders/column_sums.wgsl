// What columns of rows come to: sums, sums of squares, largest magnitudes.
//
// x: [rows, n], from first_value on, cut into parts of `part` rows. out: [parts, 5, n]: sums in two floats, large and small
// part, sums of squares likewise, each square rounded once, and largest magnitudes, where NaN is passed over. A sum is finite
// where all its values, or their squares in f32, are. One group per part and 32 columns, eight threads per column.
// Twins: column_sums.cu, src/backend/cpu/columns.rs.

struct Parameters {
    rows: u32,
    n: u32,
    first_value: u32,
    part: u32,
    // 0, which compilers must not know.
    zero: u32,
}

@group(0) @binding(0) var<storage, read> x: array<f32>;
@group(0) @binding(1) var<storage, read_write> out: array<f32>;
@group(0) @binding(2) var<uniform> p: Parameters;

var<workgroup> sums: array<vec2<f32>, 256>;
var<workgroup> squares: array<vec2<f32>, 256>;
var<workgroup> peaks: array<f32, 256>;

@compute @workgroup_size(256)
fn column_sums(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let tiles = (p.n + 31u) / 32u;
    let part = group_index(group, groups) / tiles;
    if part * p.part >= p.rows {
        return;
    }
    let column = group_index(group, groups) % tiles * 32u + lane % 32u;
    let end = min((part + 1u) * p.part, p.rows);
    var sum = vec2(0.0);
    var square = vec2(0.0);
    var peak = 0.0;
    if column < p.n {
        for (var row = part * p.part + lane / 32u; row < end; row += 8u) {
            let value = x[p.first_value + row * p.n + column];
            sum = add_exactly(sum, value, p.zero);
            square = add_exactly(square, as_it_is(value * value, p.zero), p.zero);
            // By its bits: adapters may take it that there is no NaN.
            let is_nan = (bitcast<u32>(value) & 0x7fffffffu) > NOT_FINITE;
            if !is_nan && abs(value) > peak {
                peak = abs(value);
            }
        }
    }
    sums[lane] = sum;
    squares[lane] = square;
    peaks[lane] = peak;
    workgroupBarrier();
    if lane >= 32u || column >= p.n {
        return;
    }
    for (var other = lane + 32u; other < 256u; other += 32u) {
        sum = add_exactly(sum, sums[other].x, p.zero);
        sum.y += sums[other].y;
        square = add_exactly(square, squares[other].x, p.zero);
        square.y += squares[other].y;
        peak = max(peak, peaks[other]);
    }
    let at = part * 5u * p.n + column;
    out[at] = sum.x;
    out[at + p.n] = sum.y;
    out[at + 2u * p.n] = square.x;
    out[at + 3u * p.n] = square.y;
    out[at + 4u * p.n] = peak;
}
