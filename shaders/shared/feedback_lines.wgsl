// Scale and offset of a block whose weights are d code + m, both F16: the search of Q4_1 and Q5_1.
//
// Of `targets`, what the columns should be, and `pivots`, what an error in each counts, from `at` on.
// Twins: feedback_lines.cuh, src/quantize/affine_block.rs.

struct Line {
    d: f32,
    m: f32,
}

// Weighted sums over codes, with x relative to its mean.
struct LineSums {
    q: f32,
    qq: f32,
    qx: f32,
}

// What does not depend on the codes; x is in units of a power of two.
struct LineTotals {
    inverse_unit: f32,
    low: f32,
    high: f32,
    w: f32,
    per_w: f32,
    mean: f32,
}

// NaN and infinities count as zero.
fn in_units(at: u32, inverse_unit: f32) -> f32 {
    return select(0.0, targets[at] * inverse_unit, is_number(targets[at]));
}

fn line_totals(at: u32, inverse_unit: f32) -> LineTotals {
    let start = in_units(at, inverse_unit);
    var totals = LineTotals(inverse_unit, start, start, 0.0, 0.0, 0.0);
    var wx = 0.0;
    for (var i = 0u; i < 32u; i++) {
        let value = in_units(at + i, inverse_unit);
        totals.low = min(totals.low, value);
        totals.high = max(totals.high, value);
        totals.w += pivots[at + i];
        wx += pivots[at + i] * value;
    }
    totals.per_w = recip_or_zero(totals.w);
    totals.mean = wx * totals.per_w;
    return totals;
}

fn line_sums(totals: LineTotals, line: Line, at: u32) -> LineSums {
    let inverse = recip_or_zero(line.d);
    var sums = LineSums(0.0, 0.0, 0.0);
    for (var i = 0u; i < 32u; i++) {
        let value = in_units(at + i, totals.inverse_unit);
        let code = whole_within((value - line.m) * inverse, 0.0, p.grid.last);
        let wq = pivots[at + i] * code;
        sums.q += wq;
        sums.qq += wq * code;
        sums.qx += wq * (value - totals.mean);
    }
    return sums;
}

// Scale and offset of least error for some codes.
fn best_line(totals: LineTotals, sums: LineSums) -> Line {
    let mean = sums.q * totals.per_w;
    let spread = sums.qq - sums.q * mean;
    let d = select(0.0, sums.qx * recip_or_zero(spread), spread > sums.qq * 1e-6);
    return Line(d, totals.mean - d * mean);
}

fn line_error(totals: LineTotals, sums: LineSums, line: Line) -> f32 {
    let m = line.m - totals.mean;
    let cross = m * sums.q - sums.qx;
    return line.d * (line.d * sums.qq + cross + cross) + m * m * totals.w;
}

fn line_in_f16(line: Line, unit: f32) -> Line {
    return Line(nearest_f16(line.d * unit) / unit, nearest_f16(line.m * unit) / unit);
}

// Ranges from one end of the best line so far to the other end of the values, in about as many steps as there are codes.
fn first_line(totals: LineTotals, at: u32) -> Line {
    let last = p.grid.last;
    var best = Line((totals.high - totals.low) * (1.0 / last), totals.low);
    var most = 0.0;
    for (var attempt = 0u; attempt < 36u; attempt++) {
        let steps = last + -1.8 + 0.3 * f32(attempt % 12u);
        var tried = Line((totals.high - best.m) * (1.0 / steps), best.m);
        if attempt / 12u % 2u == 1u {
            let top = best.m + best.d * last;
            let d = (top - totals.low) * (1.0 / steps);
            tried = Line(d, top - d * last);
        }
        let sums = line_sums(totals, tried, at);
        let line = best_line(totals, sums);
        let gain = line.d * sums.qx;
        if gain > most {
            most = gain;
            best = line;
        }
    }
    return best;
}

fn search_line(at: u32) -> Line {
    var largest = 0.0;
    for (var i = 0u; i < 32u; i++) {
        largest = max(largest, abs(in_units(at + i, 1.0)));
    }
    let unit = unit_of(largest);
    let totals = line_totals(at, 1.0 / unit);
    var line = line_in_f16(first_line(totals, at), unit);
    var best = line;
    var least = INFINITE;
    for (var round = 0u; round < 3u; round++) {
        let sums = line_sums(totals, line, at);
        let error = line_error(totals, sums, line);
        if error >= least {
            break;
        }
        least = error;
        best = line;
        line = line_in_f16(best_line(totals, sums), unit);
    }
    return Line(best.d * unit, best.m * unit);
}
