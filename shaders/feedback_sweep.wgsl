// Rounds a chunk of at most 256 columns with error feedback: GPTQ's block step, the scales of a sub-block chosen when it is
// reached, by running the feedback inside it for every candidate.
//
// wanted: what rows should be, [column, row] from wanted_first on; repairs: what errors before the chunk change of it,
// [column, row]; feedback: the factor of the second moments within the chunk, [width, width] from feedback_first on; pivots:
// what an error in each column counts; errors (wanted less rounded) and values (of codes): [column, row] from errors_first
// on; scales: [sub-block][d, dmin, scale, min][row] from scales_first on, read where the family is PRESET or super-blocks
// have factors. One group per row, whose threads have a candidate each.
// Twins: feedback_sweep.cu, src/quantize/feedback/sweep.rs.
//
// Source: GPTQ, arXiv:2210.17323, Algorithm 1.

struct Parameters {
    rows: u32,
    width: u32,
    wanted_first: u32,
    feedback_first: u32,
    errors_first: u32,
    scales_first: u32,
    // 0, which compilers must not know.
    zero: u32,
    pad: u32,
    grid: Grid,
}

@group(0) @binding(0) var<storage, read> wanted: array<f32>;
@group(0) @binding(1) var<storage, read> repairs: array<f32>;
@group(0) @binding(2) var<storage, read> feedback: array<f32>;
@group(0) @binding(3) var<storage, read> pivots: array<f32>;
@group(0) @binding(4) var<storage, read_write> errors: array<f32>;
@group(0) @binding(5) var<storage, read_write> values: array<f32>;
@group(0) @binding(6) var<storage, read_write> scales: array<f32>;
@group(0) @binding(7) var<uniform> p: Parameters;

var<workgroup> targets: array<f32, 256>;
var<workgroup> losses: array<f32, 32>;
var<workgroup> picks: array<u32, 32>;
var<workgroup> fit: array<f32, 2>;
var<workgroup> rounded: array<f32, 128>;

// What the candidates of a sub-block are made of: see fit_of.
struct Basis {
    a: f32,
    b: f32,
    head: Scales,
}

// ENDS, POWERS: the largest target; RANGES, MAGNITUDES: least and largest; others: step or scale, and offset.
fn fit_of(at: u32) -> vec2<f32> {
    let family = p.grid.family;
    if family == LINES {
        let line = search_line(at);
        return vec2(line.d, line.m);
    }
    if family == AFFINE {
        let best = affine_fits(at).best;
        return vec2(best.step, best.offset);
    }
    if family == SYMMETRIC {
        return vec2(symmetric_fit(at).step, 0.0);
    }
    if family == MAGNITUDES || family == RANGES {
        var range = vec2(0.0, 0.0);
        for (var i = 0u; i < p.grid.sub; i++) {
            range = vec2(min(range.x, targets[at + i]), max(range.y, targets[at + i]));
        }
        return range;
    }
    return vec2(largest_of(at, p.grid.sub), 0.0);
}

fn candidate_count() -> u32 {
    switch p.grid.family {
        case ENDS: { return p.grid.a_count + p.grid.b_count; }
        case LINES: { return p.grid.a_count * p.grid.b_count; }
        case POWERS: { return 4u; }
        case AFFINE: { return 25u; }
        case SYMMETRIC: { return 2u * (2u * p.grid.reach + 1u); }
        case MAGNITUDES: { return 2u * p.grid.a_count; }
        case RANGES: { return 3u * p.grid.a_count; }
        default: { return 1u; }
    }
}

fn own_scale(d: f32) -> Scales {
    return Scales(d, 0.0, 1.0, 1.0);
}

fn magnitude_candidate(basis: Basis, k: u32) -> Scales {
    let per_high = 1.0 / p.grid.last;
    let per_low = 1.0 / p.grid.first;
    // The side of the first code has one code more: the larger of the two, whichever it is.
    let positive = max(basis.b * per_high, basis.a * per_low);
    let negative = min(basis.a * per_high, basis.b * per_low);
    let reach = select(negative, positive, k < p.grid.a_count);
    return own_scale(nearest_scale(reach * (p.grid.a_first + p.grid.a_step * f32(k % p.grid.a_count))));
}

fn range_candidate(basis: Basis, k: u32) -> Scales {
    let reach = (basis.b - basis.a) * (1.0 / (p.grid.last - p.grid.first));
    let middle = (basis.b + basis.a) * 0.5;
    let d = nearest_scale(reach * (p.grid.a_first + p.grid.a_step * f32(k / 3u)));
    let center = 0.5 * (p.grid.first + p.grid.last) - middle * recip_or_zero(d);
    let shift = -0.5 + 0.5 * f32(k % 3u);
    return Scales(d, d, 1.0, whole_within(center + shift, p.grid.first, p.grid.last));
}

fn multiple_candidate(basis: Basis, k: u32) -> Scales {
    let head = basis.head;
    let scale = basis.a * recip_or_zero(head.d);
    if p.grid.family == SYMMETRIC {
        let around = 2u * p.grid.reach + 1u;
        let shift = f32(k % around) - f32(p.grid.reach);
        let sign = select(-1.0, 1.0, k < around);
        return Scales(
            head.d,
            head.dmin,
            whole_within(scale * sign + shift, -p.grid.scales, p.grid.scales - 1.0),
            0.0,
        );
    }
    let min = basis.b * recip_or_zero(head.dmin);
    return Scales(
        head.d,
        head.dmin,
        whole_within(scale + (f32(k / 5u) - 2.0), 0.0, p.grid.scales),
        whole_within(min + (f32(k % 5u) - 2.0), 0.0, p.grid.scales),
    );
}

// Scales to try.
fn candidate(basis: Basis, k: u32) -> Scales {
    switch p.grid.family {
        case ENDS: {
            let is_first = k < p.grid.a_count;
            let from_first = p.grid.a_first + p.grid.a_step * f32(k);
            let from_last = p.grid.b_first + p.grid.b_step * (f32(k) - f32(p.grid.a_count));
            let end = select(p.grid.last + from_last, p.grid.first + from_first, is_first);
            return own_scale(nearest_f16(basis.a * (1.0 / end)));
        }
        case LINES: {
            let d = nearest_f16(basis.a * (1.0 + (p.grid.a_first + p.grid.a_step * f32(k / p.grid.b_count))));
            let shift = p.grid.b_first + p.grid.b_step * f32(k % p.grid.b_count);
            return Scales(d, nearest_f16(shift * d - basis.b), 1.0, 1.0);
        }
        case POWERS: {
            let d = power_of_two(basis.a) * (0.0625 * f32(1u << k));
            return own_scale(max(d, bitcast<f32>(1u << 23u)));
        }
        case MAGNITUDES: { return magnitude_candidate(basis, k); }
        case RANGES: { return range_candidate(basis, k); }
        case PRESET: { return basis.head; }
        default: { return multiple_candidate(basis, k); }
    }
}

// A column of a sub-block rounded with some scales.
struct Column {
    value: f32,
    error: f32,
    missed: f32,
}

fn round_column(s: Scales, inverse: f32, target_value: f32, wanted_value: f32) -> Column {
    let offset = offset_of(s);
    let value = nearest_value((target_value + offset) * inverse);
    let result = step_of(s) * value - offset;
    return Column(value, wanted_value - result, target_value - result);
}

@compute @workgroup_size(32)
fn feedback_sweep(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let row = group_index(group, groups);
    if row >= p.rows {
        return;
    }
    let sub = p.grid.sub;
    let wanted_row = p.wanted_first + row;
    let errors_row = p.errors_first + row;
    for (var c = lane; c < p.width; c += 32u) {
        targets[c] = repairs[c * p.rows + row] + wanted[wanted_row + c * p.rows];
    }
    workgroupBarrier();
    for (var first = 0u; first < p.width; first += sub) {
        if lane == 0u {
            let found = fit_of(first);
            fit[0] = found.x;
            fit[1] = found.y;
        }
        workgroupBarrier();
        let own = p.scales_first + row + first / sub * 4u * p.rows;
        let head = Scales(
            scales[own],
            scales[own + p.rows],
            scales[own + 2u * p.rows],
            scales[own + 3u * p.rows],
        );
        let basis = Basis(fit[0], fit[1], head);
        let inner = p.feedback_first + first * p.width + first;
        var tried: array<f32, 128>;
        var least = INFINITE;
        var pick = 0u;
        for (var k = lane; k < candidate_count(); k += 32u) {
            let s = candidate(basis, k);
            let inverse = recip_or_zero(step_of(s));
            var loss = 0.0;
            for (var j = 0u; j < sub; j++) {
                var target_value = targets[first + j];
                for (var i = 0u; i < j; i++) {
                    target_value = fused(tried[i], feedback[inner + i * p.width + j], target_value, p.zero);
                }
                let column = round_column(s, inverse, target_value, wanted[wanted_row + (first + j) * p.rows]);
                loss = fused(column.missed * column.missed, pivots[first + j], loss, p.zero);
                tried[j] = column.error;
            }
            if loss < least {
                least = loss;
                pick = k;
            }
        }
        losses[lane] = least;
        picks[lane] = pick;
        workgroupBarrier();
        // The first candidate of least loss, for every thread.
        least = INFINITE;
        pick = 0u;
        for (var other = 0u; other < 32u; other++) {
            let is_first = losses[other] == least && picks[other] < pick;
            if losses[other] < least || is_first {
                least = losses[other];
                pick = picks[other];
            }
        }
        if lane == 0u {
            let best = candidate(basis, pick);
            let inverse = recip_or_zero(step_of(best));
            for (var j = 0u; j < sub; j++) {
                var target_value = targets[first + j];
                for (var i = 0u; i < j; i++) {
                    target_value = fused(rounded[i], feedback[inner + i * p.width + j], target_value, p.zero);
                }
                let at = (first + j) * p.rows;
                let column = round_column(best, inverse, target_value, wanted[wanted_row + at]);
                rounded[j] = column.error;
                values[errors_row + at] = column.value;
            }
            scales[own] = best.d;
            scales[own + p.rows] = best.dmin;
            scales[own + 2u * p.rows] = best.scale;
            scales[own + 3u * p.rows] = best.min;
        }
        workgroupBarrier();
        for (var j = lane; j < sub; j += 32u) {
            errors[errors_row + (first + j) * p.rows] = rounded[j];
        }
        for (var j = first + sub + lane; j < p.width; j += 32u) {
            var sum = 0.0;
            for (var i = 0u; i < sub; i++) {
                sum = fused(rounded[i], feedback[p.feedback_first + (first + i) * p.width + j], sum, p.zero);
            }
            targets[j] += sum;
        }
        workgroupBarrier();
    }
}
