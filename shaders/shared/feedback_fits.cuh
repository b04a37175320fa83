// Steps and offsets of least weighted squared error for some columns of one row, nothing rounded but the codes.
//
// x: what the columns should be; w: what an error in each counts.
// Twins: feedback_fits.wgsl, src/quantize/{affine,affine_block,symmetric}.rs.

// A sub-block stored as step q - offset.
struct Fit {
    float step;
    float offset;
    // How much of the weighted energy it explains.
    float gain;
    // What an error of the step costs.
    float stiffness;
};

// What no choice of codes changes.
struct Range {
    float low;
    float high;
    float w;
    float per_w;
    float mean;
};

// The value of largest magnitude, the first of equals.
static __device__ inline float largest_of(const float* x, u32 count) {
    float largest = x[0];
    for (u32 i = 0u; i < count; i++) {
        largest = fabsf(x[i]) > fabsf(largest) ? x[i] : largest;
    }
    return largest;
}

static __device__ inline Range range_of(const float* x, const float* w, u32 count) {
    Range range = {0.0f, x[0], 0.0f, 0.0f, 0.0f};
    float wx = 0.0f;
    for (u32 i = 0u; i < count; i++) {
        range.low = fminf(range.low, x[i]);
        range.high = fmaxf(range.high, x[i]);
        range.w += w[i];
        wx += w[i] * x[i];
    }
    range.per_w = recip_or_zero(range.w);
    range.mean = wx * range.per_w;
    return range;
}

// Rounds to the codes of some step and offset, then fits both to them, the offset not below zero.
static __device__ inline Fit affine_fit(
    const Grid& g,
    const Range& range,
    const float* x,
    const float* w,
    float offset,
    float inverse
) {
    float q = 0.0f;
    float qq = 0.0f;
    float qx = 0.0f;
    for (u32 i = 0u; i < g.sub; i++) {
        const float code = whole_within((x[i] + offset) * inverse, 0.0f, g.last);
        const float wq = w[i] * code;
        q += wq;
        qq += wq * code;
        qx += w[i] * (x[i] - range.mean) * code;
    }
    const float center = q * range.per_w;
    const float stiffness = qq - q * center;
    const bool free = qx * center > range.mean * stiffness;
    const float numerator = free ? qx : qx + range.mean * q;
    const float step = numerator * recip_or_zero(free ? stiffness : qq);
    const float gain = step * numerator - (free ? 0.0f : range.w * range.mean * range.mean);
    return {step, free ? step * center - range.mean : 0.0f, stiffness > 0.0f ? gain : -INFINITE, stiffness};
}

// The best of all fits, and the best from the other of two starts: least weight or drifting offset.
static __device__ inline void affine_fits(const Grid& g, const float* x, const float* w, Fit& best, Fit& second) {
    const Range range = range_of(x, w, g.sub);
    const Fit bottom = {(range.high - range.low) * (1.0f / g.last), -range.low, -INFINITE, 0.0f};
    Fit plain = bottom;
    float per_range = recip_or_zero(range.high - range.low);
    for (u32 k = 0u; k < g.a_count; k++) {
        const float inverse = per_range * (g.last + (g.a_first + g.a_step * (float)k));
        const Fit fit = affine_fit(g, range, x, w, bottom.offset, inverse);
        if (fit.gain > plain.gain) {
            plain = fit;
        }
    }
    Fit drift = bottom;
    for (u32 k = 0u; k < g.b_count; k++) {
        per_range = recip_or_zero(range.high + drift.offset);
        const float inverse = per_range * (g.last + (g.b_first + g.b_step * (float)k));
        const Fit fit = affine_fit(g, range, x, w, drift.offset, inverse);
        if (fit.gain > drift.gain) {
            drift = fit;
        }
    }
    const bool is_drift = drift.gain > plain.gain;
    best = is_drift ? drift : plain;
    second = is_drift ? plain : drift;
}

// Rounds to values of codes and fits the step to them.
static __device__ inline Fit symmetric_fit_to(const Grid& g, const float* x, const float* w, float inverse) {
    float qq = 0.0f;
    float qx = 0.0f;
    for (u32 i = 0u; i < g.sub; i++) {
        const float q = nearest_value(g, x[i] * inverse);
        const float wq = w[i] * q;
        qq += wq * q;
        qx += wq * x[i];
    }
    const float step = qx * recip_or_zero(qq);
    return {step, 0.0f, step * qx, qq};
}

// The best of all steps tried.
static __device__ inline Fit symmetric_fit(const Grid& g, const float* x, const float* w) {
    const float per_largest = recip_or_zero(largest_of(x, g.sub));
    Fit best = {0.0f, 0.0f, 0.0f, 0.0f};
    for (u32 k = 0u; k < g.a_count + g.b_count + g.around_count; k++) {
        float inverse;
        if (k < g.a_count) {
            inverse = per_largest * (g.first + (g.a_first + g.a_step * (float)k));
        } else if (k < g.a_count + g.b_count) {
            inverse = per_largest * (g.last + (g.b_first + g.b_step * (float)(k - g.a_count)));
        } else {
            const float at = g.around_first + g.around_step * (float)(k - g.a_count - g.b_count);
            inverse = recip_or_zero(best.step) * (1.0f + at);
        }
        const Fit fit = symmetric_fit_to(g, x, w, inverse);
        if (fit.gain > best.gain) {
            best = fit;
        }
    }
    return best;
}
