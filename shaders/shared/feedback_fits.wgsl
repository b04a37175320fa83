// Steps and offsets of least weighted squared error for some columns of one row, nothing rounded but the codes.
//
// Of `targets`, what the columns should be, and `pivots`, what an error in each counts, from `at` on.
// Twins: feedback_fits.cuh, src/quantize/{affine,affine_block,symmetric}.rs.

// A sub-block stored as step q - offset.
struct Fit {
    step: f32,
    offset: f32,
    // How much of the weighted energy it explains.
    gain: f32,
    // What an error of the step costs.
    stiffness: f32,
}

// The best of all fits, and the best from the other of two starts.
struct Fits {
    best: Fit,
    second: Fit,
}

// What no choice of codes changes.
struct Range {
    low: f32,
    high: f32,
    w: f32,
    per_w: f32,
    mean: f32,
}

// The value of largest magnitude, the first of equals.
fn largest_of(at: u32, count: u32) -> f32 {
    var largest = targets[at];
    for (var i = 0u; i < count; i++) {
        if abs(targets[at + i]) > abs(largest) {
            largest = targets[at + i];
        }
    }
    return largest;
}

fn range_of(at: u32) -> Range {
    var range = Range(0.0, targets[at], 0.0, 0.0, 0.0);
    var wx = 0.0;
    for (var i = 0u; i < p.grid.sub; i++) {
        let x = targets[at + i];
        let w = pivots[at + i];
        range.low = min(range.low, x);
        range.high = max(range.high, x);
        range.w += w;
        wx += w * x;
    }
    range.per_w = recip_or_zero(range.w);
    range.mean = wx * range.per_w;
    return range;
}

// Rounds to the codes of some step and offset, then fits both to them, the offset not below zero.
fn affine_fit(range: Range, at: u32, offset: f32, inverse: f32) -> Fit {
    var q = 0.0;
    var qq = 0.0;
    var qx = 0.0;
    for (var i = 0u; i < p.grid.sub; i++) {
        let x = targets[at + i];
        let w = pivots[at + i];
        let code = whole_within((x + offset) * inverse, 0.0, p.grid.last);
        let wq = w * code;
        q += wq;
        qq += wq * code;
        qx += w * (x - range.mean) * code;
    }
    let center = q * range.per_w;
    let stiffness = qq - q * center;
    let is_free = qx * center > range.mean * stiffness;
    let numerator = select(qx + range.mean * q, qx, is_free);
    let step = numerator * recip_or_zero(select(qq, stiffness, is_free));
    let gain = step * numerator - select(range.w * range.mean * range.mean, 0.0, is_free);
    return Fit(
        step,
        select(0.0, step * center - range.mean, is_free),
        select(-INFINITE, gain, stiffness > 0.0),
        stiffness,
    );
}

// The best of all fits, and the best from the other of two starts: least weight or drifting offset.
fn affine_fits(at: u32) -> Fits {
    let range = range_of(at);
    let bottom = Fit((range.high - range.low) * (1.0 / p.grid.last), -range.low, -INFINITE, 0.0);
    var plain = bottom;
    var per_range = recip_or_zero(range.high - range.low);
    for (var k = 0u; k < p.grid.a_count; k++) {
        let inverse = per_range * (p.grid.last + (p.grid.a_first + p.grid.a_step * f32(k)));
        let fit = affine_fit(range, at, bottom.offset, inverse);
        if fit.gain > plain.gain {
            plain = fit;
        }
    }
    var drift = bottom;
    for (var k = 0u; k < p.grid.b_count; k++) {
        per_range = recip_or_zero(range.high + drift.offset);
        let inverse = per_range * (p.grid.last + (p.grid.b_first + p.grid.b_step * f32(k)));
        let fit = affine_fit(range, at, drift.offset, inverse);
        if fit.gain > drift.gain {
            drift = fit;
        }
    }
    if drift.gain > plain.gain {
        return Fits(drift, plain);
    }
    return Fits(plain, drift);
}

// Rounds to values of codes and fits the step to them.
fn symmetric_fit_to(at: u32, inverse: f32) -> Fit {
    var qq = 0.0;
    var qx = 0.0;
    for (var i = 0u; i < p.grid.sub; i++) {
        let x = targets[at + i];
        let q = nearest_value(x * inverse);
        let wq = pivots[at + i] * q;
        qq += wq * q;
        qx += wq * x;
    }
    let step = qx * recip_or_zero(qq);
    return Fit(step, 0.0, step * qx, qq);
}

// The best of all steps tried.
fn symmetric_fit(at: u32) -> Fit {
    let per_largest = recip_or_zero(largest_of(at, p.grid.sub));
    let before_around = p.grid.a_count + p.grid.b_count;
    var best = Fit(0.0, 0.0, 0.0, 0.0);
    for (var k = 0u; k < before_around + p.grid.around_count; k++) {
        var inverse = 0.0;
        if k < p.grid.a_count {
            inverse = per_largest * (p.grid.first + (p.grid.a_first + p.grid.a_step * f32(k)));
        } else if k < before_around {
            inverse = per_largest * (p.grid.last + (p.grid.b_first + p.grid.b_step * f32(k - p.grid.a_count)));
        } else {
            let around = p.grid.around_first + p.grid.around_step * f32(k - before_around);
            inverse = recip_or_zero(best.step) * (1.0 + around);
        }
        let fit = symmetric_fit_to(at, inverse);
        if fit.gain > best.gain {
            best = fit;
        }
    }
    return best;
}
