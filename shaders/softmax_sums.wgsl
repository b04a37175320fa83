// What softmax needs of each part of each row of logits: the largest, where it stands first, the sum of e^(x - largest).
//
// x: [rows, stride], from first_value on; `width` values of a row count, cut into parts of `part`. out: [rows, parts] of
// four words: the largest value, its index in the row, the sum in two floats, large and small part. NaN is passed over
// where the largest is sought; where one is, or +infinity, the sum is NaN. One group per row and part.
// Twins: softmax_sums.cu, src/backend/cpu/softmax.rs.

struct Parameters {
    rows: u32,
    width: u32,
    stride: u32,
    first_value: u32,
    part: u32,
    // 0, which compilers must not know.
    zero: u32,
}

@group(0) @binding(0) var<storage, read> x: array<f32>;
@group(0) @binding(1) var<storage, read_write> out: array<vec4<u32>>;
@group(0) @binding(2) var<uniform> p: Parameters;

// Of each thread's values: the largest, its index, whether one is NaN or +infinity.
var<workgroup> peaks: array<f32, 64>;
var<workgroup> places: array<u32, 64>;
var<workgroup> oddities: array<u32, 64>;
var<workgroup> sums: array<vec2<f32>, 64>;

@compute @workgroup_size(64)
fn softmax_sums(
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
    let first = p.first_value + row * p.stride;
    let begin = item % parts * p.part;
    let end = min(begin + p.part, p.width);
    var largest = -3.4028234e38;
    var place = begin;
    var is_odd = 0u;
    for (var c = begin + lane; c < end; c += 64u) {
        let value = x[first + c];
        let bits = bitcast<u32>(value);
        // By its bits: adapters may take it that there is no NaN.
        let is_nan = (bits & 0x7fffffffu) > NOT_FINITE;
        is_odd |= select(0u, 1u, is_nan || bits == NOT_FINITE);
        if !is_nan && value > largest {
            largest = value;
            place = c;
        }
    }
    peaks[lane] = largest;
    places[lane] = place;
    oddities[lane] = is_odd;
    workgroupBarrier();
    // Every thread looks at those of all: one barrier instead of six.
    for (var other = 0u; other < 64u; other++) {
        let peak = peaks[other];
        if peak > largest || (peak == largest && places[other] < place) {
            largest = peak;
            place = places[other];
        }
        is_odd |= oddities[other];
    }
    var sum = vec2(0.0);
    for (var c = begin + lane; c < end; c += 64u) {
        sum = add_exactly(sum, exp_of(x[first + c] - largest), p.zero);
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
    let high = select(bitcast<u32>(sum.x), 0x7fc00000u, is_odd != 0u);
    out[item] = vec4(bitcast<u32>(largest), place, high, bitcast<u32>(sum.y));
}
