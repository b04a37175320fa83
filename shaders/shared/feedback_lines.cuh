// Scale and offset of a block whose weights are d code + m, both F16: the search of Q4_1 and Q5_1.
// Twins: feedback_lines.wgsl, src/quantize/affine_block.rs.

struct Line {
    float d;
    float m;
};

// Weighted sums over codes, with x relative to its mean.
struct LineSums {
    float q;
    float qq;
    float qx;
};

// What does not depend on the codes; x is in units of a power of two.
struct LineTotals {
    float inverse_unit;
    float low;
    float high;
    float w;
    float per_w;
    float mean;
};

// NaN and infinities count as zero.
static __device__ inline float in_units(float x, float inverse_unit) {
    return fabsf(x) < INFINITE ? x * inverse_unit : 0.0f;
}

static __device__ inline LineTotals line_totals(const float* x, const float* w, float inverse_unit) {
    const float start = in_units(x[0], inverse_unit);
    LineTotals totals = {inverse_unit, start, start, 0.0f, 0.0f, 0.0f};
    float wx = 0.0f;
    for (u32 i = 0u; i < 32u; i++) {
        const float value = in_units(x[i], inverse_unit);
        totals.low = fminf(totals.low, value);
        totals.high = fmaxf(totals.high, value);
        totals.w += w[i];
        wx += w[i] * value;
    }
    totals.per_w = recip_or_zero(totals.w);
    totals.mean = wx * totals.per_w;
    return totals;
}

static __device__ inline LineSums line_sums(
    const LineTotals& totals,
    const Line& line,
    const float* x,
    const float* w,
    float last
) {
    const float inverse = recip_or_zero(line.d);
    LineSums sums = {0.0f, 0.0f, 0.0f};
    for (u32 i = 0u; i < 32u; i++) {
        const float value = in_units(x[i], totals.inverse_unit);
        const float code = whole_within((value - line.m) * inverse, 0.0f, last);
        const float wq = w[i] * code;
        sums.q += wq;
        sums.qq += wq * code;
        sums.qx += wq * (value - totals.mean);
    }
    return sums;
}

// Scale and offset of least error for some codes.
static __device__ inline Line best_line(const LineTotals& totals, const LineSums& sums) {
    const float mean = sums.q * totals.per_w;
    const float spread = sums.qq - sums.q * mean;
    const float d = spread > sums.qq * 1e-6f ? sums.qx * recip_or_zero(spread) : 0.0f;
    return {d, totals.mean - d * mean};
}

static __device__ inline float line_error(const LineTotals& totals, const LineSums& sums, const Line& line) {
    const float m = line.m - totals.mean;
    const float cross = m * sums.q - sums.qx;
    return line.d * (line.d * sums.qq + cross + cross) + m * m * totals.w;
}

static __device__ inline Line line_in_f16(const Line& line, float unit) {
    return {nearest_f16(line.d * unit) / unit, nearest_f16(line.m * unit) / unit};
}

// Ranges from one end of the best line so far to the other end of the values, in about as many steps as there are codes.
static __device__ inline Line first_line(const LineTotals& totals, const float* x, const float* w, float last) {
    Line best = {(totals.high - totals.low) * (1.0f / last), totals.low};
    float most = 0.0f;
    for (u32 attempt = 0u; attempt < 36u; attempt++) {
        const float steps = last + -1.8f + 0.3f * (float)(attempt % 12u);
        Line tried;
        if (attempt / 12u % 2u == 0u) {
            tried = {(totals.high - best.m) * (1.0f / steps), best.m};
        } else {
            const float top = best.m + best.d * last;
            const float d = (top - totals.low) * (1.0f / steps);
            tried = {d, top - d * last};
        }
        const LineSums sums = line_sums(totals, tried, x, w, last);
        const Line line = best_line(totals, sums);
        const float gain = line.d * sums.qx;
        if (gain > most) {
            most = gain;
            best = line;
        }
    }
    return best;
}

static __device__ inline Line search_line(const float* x, const float* w, float last) {
    float largest = 0.0f;
    for (u32 i = 0u; i < 32u; i++) {
        largest = fmaxf(largest, fabsf(in_units(x[i], 1.0f)));
    }
    const float unit = unit_of(largest);
    const LineTotals totals = line_totals(x, w, 1.0f / unit);
    Line line = line_in_f16(first_line(totals, x, w, last), unit);
    Line best = line;
    float least = INFINITE;
    for (u32 round = 0u; round < 3u; round++) {
        const LineSums sums = line_sums(totals, line, x, w, last);
        const float error = line_error(totals, sums, line);
        if (error >= least) {
            break;
        }
        least = error;
        best = line;
        line = line_in_f16(best_line(totals, sums), unit);
    }
    return {best.d * unit, best.m * unit};
}
