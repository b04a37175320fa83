// A pass over a chunk of at most 256 columns that are rounded: each scale and each code moves to where the loss tr(E M E^T)
// is least, everything else held.
//
// wanted, errors (wanted less rounded), values (of codes): [column, row] from columns_first on; gradient: E M of the chunk,
// [column, row]; moments: M within the chunk, [width, width] from moments_first on; scales: [sub-block][d, dmin, scale,
// min][row] from scales_first on. One group per row.
// Twins: feedback_descent.cu, src/quantize/feedback/descent.rs.

struct Parameters {
    rows: u32,
    width: u32,
    columns_first: u32,
    moments_first: u32,
    scales_first: u32,
    // 0, which compilers must not know.
    zero: u32,
    pad0: u32,
    pad1: u32,
    grid: Grid,
}

@group(0) @binding(0) var<storage, read> wanted: array<f32>;
@group(0) @binding(1) var<storage, read> gradient: array<f32>;
@group(0) @binding(2) var<storage, read> moments: array<f32>;
@group(0) @binding(3) var<storage, read_write> errors: array<f32>;
@group(0) @binding(4) var<storage, read_write> values: array<f32>;
@group(0) @binding(5) var<storage, read_write> scales: array<f32>;
@group(0) @binding(6) var<uniform> p: Parameters;

var<workgroup> slopes: array<f32, 256>;
// A sub-block while it moves: [column].
var<workgroup> sub_wanted: array<f32, 128>;
var<workgroup> sub_errors: array<f32, 128>;
var<workgroup> sub_before: array<f32, 128>;
var<workgroup> sub_values: array<f32, 128>;
// v M of a direction, later changes of errors.
var<workgroup> bends: array<f32, 128>;

// For errors that change along a direction v: g v and v M v. v: 0 values, 1 values less the minimum, 2 ones.
struct Along {
    slope: f32,
    curvature: f32,
}

fn direction(which: u32, min: f32, j: u32) -> f32 {
    if which == 2u {
        return 1.0;
    }
    return select(sub_values[j], sub_values[j] - min, which == 1u);
}

fn along(first: u32, inner: u32, which: u32, min: f32, lane: u32) -> Along {
    for (var j = lane; j < p.grid.sub; j += 32u) {
        var bend = 0.0;
        for (var i = 0u; i < p.grid.sub; i++) {
            bend = fused(direction(which, min, i), moments[inner + i * p.width + j], bend, p.zero);
        }
        bends[j] = bend;
    }
    workgroupBarrier();
    var found = Along(0.0, 0.0);
    for (var j = 0u; j < p.grid.sub; j++) {
        let v = direction(which, min, j);
        found.slope = fused(slopes[first + j], v, found.slope, p.zero);
        found.curvature = fused(bends[j], v, found.curvature, p.zero);
    }
    return found;
}

// Takes scales, which change errors by `change` along the direction, where that loses less: gives those that hold now.
fn accept(first: u32, lane: u32, found: Along, before: Scales, scales: Scales, change: f32) -> Scales {
    let is_better = change * (found.slope + found.slope + change * found.curvature) < 0.0;
    let moved = select(0.0, change, is_better);
    var taken = before;
    if is_better {
        taken = scales;
    }
    let step = step_of(taken);
    let offset = offset_of(taken);
    workgroupBarrier();
    for (var j = lane; j < p.grid.sub; j += 32u) {
        sub_errors[j] = sub_wanted[j] - (step * sub_values[j] - offset);
        slopes[first + j] = fused(moved, bends[j], slopes[first + j], p.zero);
    }
    workgroupBarrier();
    return taken;
}

// Moves the scale, codes held, to the best that the type can store.
fn move_step(first: u32, inner: u32, lane: u32, before: Scales) -> Scales {
    let with_min = p.grid.lattice == ZERO_POINT;
    let found = along(first, inner, select(0u, 1u, with_min), before.min, lane);
    var scales = before;
    let change = found.slope * recip_or_zero(found.curvature);
    if p.grid.lattice == MULTIPLES {
        scales.scale = whole_within(scales.scale + change * recip_or_zero(scales.d), p.grid.low, p.grid.high);
    } else if with_min {
        let d = nearest_scale(scales.d + change);
        scales.d = select(scales.d, d, d > 0.0);
        scales.dmin = scales.d;
    } else {
        scales.d = nearest_scale(scales.d + change);
    }
    // A step that grows by c makes every error shrink by c times its value.
    let moved = select(step_of(before) - step_of(scales), before.d - scales.d, with_min);
    return accept(first, lane, found, before, scales, moved);
}

// The same for the minimum.
fn move_offset(first: u32, inner: u32, lane: u32, before: Scales) -> Scales {
    let found = along(first, inner, 2u, 0.0, lane);
    var scales = before;
    let change = -(found.slope * recip_or_zero(found.curvature));
    if p.grid.lattice == MULTIPLES {
        scales.min = whole_within(scales.min + change * recip_or_zero(scales.dmin), 0.0, p.grid.min_high);
    } else if p.grid.lattice == ZERO_POINT {
        scales.min = whole_within(scales.min + change * recip_or_zero(scales.d), p.grid.low, p.grid.high);
    } else {
        scales.dmin = nearest_f16(scales.dmin + change);
    }
    return accept(first, lane, found, before, scales, offset_of(scales) - offset_of(before));
}

// Moves every code in turn. One thread: a code depends on all before it.
fn move_codes(first: u32, inner: u32, s: Scales) {
    let step = step_of(s);
    let offset = offset_of(s);
    let inverse = recip_or_zero(step);
    for (var j = 0u; j < p.grid.sub; j++) {
        var slope = slopes[first + j];
        for (var i = 0u; i < j; i++) {
            slope = fused(bends[i], moments[inner + i * p.width + j], slope, p.zero);
        }
        let curvature = moments[inner + j * p.width + j];
        let target_value = sub_wanted[j] - sub_errors[j] + slope * recip_or_zero(curvature);
        let value = nearest_value((target_value + offset) * inverse);
        let error = sub_wanted[j] - (step * value - offset);
        let change = error - sub_errors[j];
        let is_better = change * (slope + slope + change * curvature) < 0.0;
        bends[j] = select(0.0, change, is_better);
        if is_better {
            sub_values[j] = value;
            sub_errors[j] = error;
        }
    }
}

@compute @workgroup_size(32)
fn feedback_descent(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let row = group_index(group, groups);
    if row >= p.rows {
        return;
    }
    let sub = p.grid.sub;
    let lattice = p.grid.lattice;
    let columns_row = p.columns_first + row;
    for (var c = lane; c < p.width; c += 32u) {
        slopes[c] = gradient[c * p.rows + row];
    }
    for (var first = 0u; first < p.width; first += sub) {
        let inner = p.moments_first + first * p.width + first;
        let own = p.scales_first + row + first / sub * 4u * p.rows;
        for (var j = lane; j < sub; j += 32u) {
            let at = columns_row + (first + j) * p.rows;
            sub_wanted[j] = wanted[at];
            sub_errors[j] = errors[at];
            sub_before[j] = errors[at];
            sub_values[j] = values[at];
        }
        var s = Scales(
            scales[own],
            scales[own + p.rows],
            scales[own + 2u * p.rows],
            scales[own + 3u * p.rows],
        );
        workgroupBarrier();
        if lattice != FIXED {
            s = move_step(first, inner, lane, s);
        }
        if lattice == OWN_WITH_MIN || lattice == ZERO_POINT || (lattice == MULTIPLES && p.grid.min_high >= 0.0) {
            s = move_offset(first, inner, lane, s);
        }
        if lane == 0u {
            move_codes(first, inner, s);
            scales[own] = s.d;
            scales[own + p.rows] = s.dmin;
            scales[own + 2u * p.rows] = s.scale;
            scales[own + 3u * p.rows] = s.min;
        }
        workgroupBarrier();
        for (var j = lane; j < sub; j += 32u) {
            let at = columns_row + (first + j) * p.rows;
            errors[at] = sub_errors[j];
            values[at] = sub_values[j];
        }
        for (var j = first + sub + lane; j < p.width; j += 32u) {
            var sum = 0.0;
            for (var i = 0u; i < sub; i++) {
                let change = sub_errors[i] - sub_before[i];
                sum = fused(change, moments[p.moments_first + (first + i) * p.width + j], sum, p.zero);
            }
            slopes[j] += sum;
        }
        workgroupBarrier();
    }
}
