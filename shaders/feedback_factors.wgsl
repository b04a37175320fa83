// The F16 factors of scales and minima of a super-block of 256 columns, chosen on what its weights should be: those of least
// weighted squared error.
//
// wanted, repairs: [column, row], their sum is rounded, wanted from wanted_first on; pivots: what an error in each column
// counts; scales: [sub-block][d, dmin, scale, min][row] from scales_first on, of which d and dmin are written for every
// sub-block, scale and min become zero. One group per row, whose threads have a sub-block each; family AFFINE or SYMMETRIC.
// Twins: feedback_factors.cu, src/quantize/affine.rs, src/quantize/symmetric.rs.

struct Parameters {
    rows: u32,
    wanted_first: u32,
    scales_first: u32,
    pad: u32,
    grid: Grid,
}

@group(0) @binding(0) var<storage, read> wanted: array<f32>;
@group(0) @binding(1) var<storage, read> repairs: array<f32>;
@group(0) @binding(2) var<storage, read> pivots: array<f32>;
@group(0) @binding(3) var<storage, read_write> scales: array<f32>;
@group(0) @binding(4) var<uniform> p: Parameters;

var<workgroup> targets: array<f32, 256>;
// What threads tell each other of their sub-blocks: [part][sub-block].
var<workgroup> told: array<f32, 80>;

// Sums over a sub-block whose weights are step q - offset, with r what is left.
struct Sums {
    error: f32,
    r: f32,
    rq: f32,
    w: f32,
    q: f32,
    qq: f32,
}

// What every thread knows: the factors, its sub-block's multiples and what they leave.
struct Chosen {
    unit: f32,
    d: f32,
    dmin: f32,
    scale: f32,
    min: f32,
    sums: Sums,
}

fn sums_of(at: u32, step: f32, offset: f32) -> Sums {
    let inverse = recip_or_zero(step);
    var sums = Sums(0.0, 0.0, 0.0, 0.0, 0.0, 0.0);
    for (var i = 0u; i < p.grid.sub; i++) {
        let x = targets[at + i];
        let w = pivots[at + i];
        let q = nearest_value((x + offset) * inverse);
        let r = x + offset - step * q;
        let wr = w * r;
        let wq = w * q;
        sums.error += wr * r;
        sums.r += wr;
        sums.rq += wr * q;
        sums.w += w;
        sums.q += wq;
        sums.qq += wq * q;
    }
    return sums;
}

fn multiple(x: f32) -> f32 {
    if p.grid.family == AFFINE {
        return whole_within(x, 0.0, p.grid.scales);
    }
    return whole_within(x, -p.grid.scales, p.grid.scales - 1.0);
}

fn f16_in_units(x: f32, unit: f32) -> f32 {
    return nearest_f16(x * unit) / unit;
}

// Of parts that threads told: the value of largest magnitude, the first of equals; where multiples have no sign the largest,
// at least 0.
fn largest_told(part: u32, subs: u32) -> f32 {
    let is_affine = p.grid.family == AFFINE;
    var largest = select(told[part * 16u], 0.0, is_affine);
    for (var j = 0u; j < subs; j++) {
        let value = told[part * 16u + j];
        if is_affine {
            largest = max(largest, value);
        } else if abs(value) > abs(largest) {
            largest = value;
        }
    }
    return largest;
}

fn sum_told(part: u32, subs: u32) -> f32 {
    var sum = 0.0;
    for (var j = 0u; j < subs; j++) {
        sum += told[part * 16u + j];
    }
    return sum;
}

// The F16 factor whose whole multiples come nearest to a value of every sub-block: part `values`, weighted by the next part.
fn common_factor(unit: f32, values: u32, subs: u32) -> f32 {
    let is_affine = p.grid.family == AFFINE;
    let largest = largest_told(values, subs);
    var best = 0.0;
    var least = INFINITE;
    for (var k = 0u; k < p.grid.factors_count * select(2u, 1u, is_affine); k++) {
        let place = p.grid.factors_first + p.grid.factors_step * f32(k % p.grid.factors_count);
        let end = select(p.grid.scales - 1.0, -p.grid.scales, k < p.grid.factors_count);
        let reach = select(end * (1.0 + place / p.grid.scales), p.grid.scales + place, is_affine);
        let factor = f16_in_units(largest * (1.0 / reach), unit);
        let inverse = recip_or_zero(factor);
        var error = 0.0;
        for (var j = 0u; j < subs; j++) {
            let value = told[values * 16u + j];
            let r = value - factor * multiple(value * inverse);
            error += told[(values + 1u) * 16u + j] * r * r;
        }
        if error < least {
            least = error;
            best = factor;
        }
    }
    return best;
}

// Takes the nearest multiples for the sub-block where they leave less error.
fn accept(chosen: Chosen, at: u32, scale: f32, min: f32) -> Chosen {
    var c = chosen;
    let whole = multiple(scale);
    var whole_min = 0.0;
    if p.grid.family == AFFINE {
        whole_min = multiple(min);
    }
    let other = sums_of(at, c.d * whole, c.dmin * whole_min);
    if other.error < c.sums.error {
        c.scale = whole;
        c.min = whole_min;
        c.sums = other;
    }
    return c;
}

// Other local minima: the second fit, scales next to its own with the middle kept, offsets about a third of a step away with
// the top kept.
fn look_around_affine(chosen: Chosen, at: u32, second: Fit) -> Chosen {
    var c = chosen;
    let per_d = recip_or_zero(c.d);
    let per_dmin = recip_or_zero(c.dmin);
    c = accept(c, at, second.step * per_d, second.offset * per_dmin);
    var scale = c.scale;
    var min = c.min;
    let middle = c.sums.q * recip_or_zero(c.sums.w) * c.d * per_dmin;
    for (var shift = -1.0; shift < 2.0; shift += 2.0) {
        let other = multiple(scale + shift);
        c = accept(c, at, other, min + (other - scale) * middle);
    }
    scale = c.scale;
    min = c.min;
    let per_code = c.dmin * per_d * (1.0 / p.grid.last);
    for (var sign = -1.0; sign < 2.0; sign += 2.0) {
        let other = multiple(min + c.d * scale * per_dmin * (sign * 0.35));
        c = accept(c, at, scale + (other - min) * per_code, other);
    }
    return c;
}

// The scales next to its own.
fn look_around_symmetric(chosen: Chosen, at: u32) -> Chosen {
    var c = chosen;
    let own = c.scale;
    for (var k = 1u; k <= p.grid.factors_reach; k++) {
        c = accept(c, at, own - f32(k), 0.0);
        c = accept(c, at, own + f32(k), 0.0);
    }
    return c;
}

fn error_moved(s: Sums, step: f32, offset: f32) -> f32 {
    return s.error + step * (step * s.qq - 2.0 * s.rq) + offset * (offset * s.w + 2.0 * (s.r - step * s.q));
}

// With the codes as they are, the best scale for each minimum near.
fn descend_affine(chosen: Chosen) -> Chosen {
    var c = chosen;
    let scale = c.scale;
    let min = c.min;
    let per_scale = recip_or_zero(c.d * c.sums.qq);
    var least = c.sums.error;
    for (var k = 0u; k < 5u; k++) {
        // 0, -1, 1, -2, 2
        let size = f32((k + 1u) / 2u);
        let other_min = multiple(min + select(size, -size, k % 2u == 1u));
        let offset = c.dmin * (other_min - min);
        let other_scale = multiple(scale + (c.sums.rq + offset * c.sums.q) * per_scale);
        let error = error_moved(c.sums, c.d * (other_scale - scale), offset);
        if error < least {
            least = error;
            c.scale = other_scale;
            c.min = other_min;
        }
    }
    let step = c.d * (c.scale - scale);
    let offset = c.dmin * (c.min - min);
    c.sums.error = error_moved(c.sums, step, offset);
    c.sums.r = c.sums.r - step * c.sums.q + offset * c.sums.w;
    c.sums.rq = c.sums.rq - step * c.sums.qq + offset * c.sums.q;
    return c;
}

@compute @workgroup_size(32)
fn feedback_factors(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let row = group_index(group, groups);
    if row >= p.rows {
        return;
    }
    let subs = 256u / p.grid.sub;
    let is_affine = p.grid.family == AFFINE;
    for (var column = lane; column < 256u; column += 32u) {
        let target_value = repairs[column * p.rows + row] + wanted[p.wanted_first + column * p.rows + row];
        targets[column] = select(0.0, target_value, is_number(target_value));
    }
    workgroupBarrier();
    var c: Chosen;
    c.unit = unit_of(abs(largest_of(0u, 256u)));
    workgroupBarrier();
    for (var column = lane; column < 256u; column += 32u) {
        targets[column] *= 1.0 / c.unit;
    }
    workgroupBarrier();
    let has_sub = lane < subs;
    let at = select(0u, lane, has_sub) * p.grid.sub;
    var fits: Fits;
    if is_affine {
        fits = affine_fits(at);
    } else {
        fits.best = symmetric_fit(at);
    }
    let extreme = largest_of(at, p.grid.sub) * (1.0 / p.grid.first);
    if has_sub {
        told[lane] = fits.best.step;
        told[16u + lane] = fits.best.stiffness;
        told[32u + lane] = fits.best.offset;
        told[48u + lane] = select(0.0, range_of(at).w, is_affine);
        told[64u + lane] = extreme;
    }
    workgroupBarrier();
    c.d = common_factor(c.unit, 0u, subs);
    c.scale = multiple(fits.best.step * recip_or_zero(c.d));
    var best_d = 0.0;
    var best_dmin = 0.0;
    var least = INFINITE;
    if is_affine {
        c.dmin = common_factor(c.unit, 2u, subs);
        c.min = multiple(fits.best.offset * recip_or_zero(c.dmin));
    } else {
        // What plain rounding would take: the largest step at the first scale.
        best_d = f16_in_units(largest_told(4u, subs) * (-1.0 / p.grid.scales), c.unit);
        let scale = multiple(extreme * recip_or_zero(best_d));
        let sums = sums_of(at, best_d * scale, 0.0);
        workgroupBarrier();
        if has_sub {
            told[lane] = sums.error;
        }
        workgroupBarrier();
        least = sum_told(0u, subs);
    }
    for (var round = 0u; round <= p.grid.rounds; round++) {
        c.sums = sums_of(at, c.d * c.scale, c.dmin * c.min);
        workgroupBarrier();
        if has_sub {
            told[lane] = c.sums.error;
        }
        workgroupBarrier();
        let error = sum_told(0u, subs);
        if error < least {
            least = error;
            best_d = c.d;
            best_dmin = c.dmin;
        }
        if round == p.grid.rounds {
            break;
        }
        if round == 0u && is_affine {
            c = look_around_affine(c, at, fits.second);
        } else if round == 0u {
            c = look_around_symmetric(c, at);
        }
        // Least squares over all sub-blocks, codes as they are.
        var parts = array<f32, 5>(0.0, 0.0, 0.0, 0.0, 0.0);
        if is_affine {
            c = descend_affine(c);
            parts[1] = c.scale * c.min * c.sums.q;
            parts[2] = c.min * c.min * c.sums.w;
            parts[3] = c.scale * c.sums.rq;
            parts[4] = c.min * c.sums.r;
        } else {
            let moved = multiple(c.scale + c.sums.rq * recip_or_zero(c.d * c.sums.qq));
            parts[3] = moved * (c.sums.rq - c.d * (moved - c.scale) * c.sums.qq);
            c.scale = moved;
        }
        parts[0] = c.scale * c.scale * c.sums.qq;
        workgroupBarrier();
        if has_sub {
            for (var part = 0u; part < 5u; part++) {
                told[part * 16u + lane] = parts[part];
            }
        }
        workgroupBarrier();
        let dd = sum_told(0u, subs);
        let dm = sum_told(1u, subs);
        let mm = sum_told(2u, subs);
        let rd = sum_told(3u, subs);
        let rm = sum_told(4u, subs);
        if is_affine {
            let determinant = dd * mm - dm * dm;
            let inverse = recip_or_zero(determinant);
            let both = determinant > 0.0;
            let d = select(rd * recip_or_zero(dd), (rd * mm - rm * dm) * inverse, both);
            let dmin = select(0.0, (rd * dm - rm * dd) * inverse, both);
            c.d = f16_in_units(max(c.d + d, 0.0), c.unit);
            c.dmin = f16_in_units(max(c.dmin + dmin, 0.0), c.unit);
        } else {
            c.d = f16_in_units(c.d + rd * recip_or_zero(dd), c.unit);
        }
    }
    if has_sub {
        let first = p.scales_first + lane * 4u * p.rows + row;
        scales[first] = best_d * c.unit;
        scales[first + p.rows] = best_dmin * c.unit;
        scales[first + 2u * p.rows] = 0.0;
        scales[first + 3u * p.rows] = 0.0;
    }
}
