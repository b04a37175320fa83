// The F16 factors of scales and minima of a super-block of 256 columns, chosen on what its weights should be: those of least
// weighted squared error.
//
// wanted, repairs: [column, row], their sum is rounded, wanted from wanted_first on; pivots: what an error in each column
// counts; scales: [sub-block][d, dmin, scale, min][row] from scales_first on, of which d and dmin are written for every
// sub-block, scale and min become zero. One group per row, whose threads have a sub-block each; family AFFINE or SYMMETRIC.
// Twins: feedback_factors.wgsl, src/quantize/affine.rs, src/quantize/symmetric.rs.

struct Parameters {
    u32 rows;
    u32 wanted_first;
    u32 scales_first;
    u32 pad;
    Grid grid;
};

// Sums over a sub-block whose weights are step q - offset, with r what is left.
struct Sums {
    float error;
    float r;
    float rq;
    float w;
    float q;
    float qq;
};

// What every thread knows: the factors, its sub-block's multiples and what they leave.
struct Chosen {
    float unit;
    float d;
    float dmin;
    float scale;
    float min;
    Sums sums;
};

static __device__ inline Sums sums_of(const Grid& g, const float* x, const float* w, float step, float offset) {
    const float inverse = recip_or_zero(step);
    Sums sums = {0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
    for (u32 i = 0u; i < g.sub; i++) {
        const float q = nearest_value(g, (x[i] + offset) * inverse);
        const float r = x[i] + offset - step * q;
        const float wr = w[i] * r;
        const float wq = w[i] * q;
        sums.error += wr * r;
        sums.r += wr;
        sums.rq += wr * q;
        sums.w += w[i];
        sums.q += wq;
        sums.qq += wq * q;
    }
    return sums;
}

static __device__ inline float lowest_multiple(const Grid& g) { return g.family == AFFINE ? 0.0f : -g.scales; }
static __device__ inline float highest_multiple(const Grid& g) { return g.family == AFFINE ? g.scales : g.scales - 1.0f; }

static __device__ inline float multiple(const Grid& g, float x) {
    return whole_within(x, lowest_multiple(g), highest_multiple(g));
}

static __device__ inline float f16_in_units(float x, float unit) { return nearest_f16(x * unit) / unit; }

// The F16 factor whose whole multiples come nearest to a value of every sub-block.
static __device__ inline float common_factor(
    const Grid& g,
    float unit,
    const float* values,
    const float* weights,
    u32 subs
) {
    const bool is_affine = g.family == AFFINE;
    float largest = largest_of(values, subs);
    for (u32 j = 0u; is_affine && j < subs; j++) {
        largest = fmaxf(j == 0u ? 0.0f : largest, values[j]);
    }
    float best = 0.0f;
    float least = INFINITE;
    for (u32 k = 0u; k < g.factors_count * (is_affine ? 1u : 2u); k++) {
        const float at = g.factors_first + g.factors_step * (float)(k % g.factors_count);
        const float end = k < g.factors_count ? -g.scales : g.scales - 1.0f;
        const float reach = is_affine ? g.scales + at : end * (1.0f + at / g.scales);
        const float factor = f16_in_units(largest * (1.0f / reach), unit);
        const float inverse = recip_or_zero(factor);
        float error = 0.0f;
        for (u32 j = 0u; j < subs; j++) {
            const float r = values[j] - factor * multiple(g, values[j] * inverse);
            error += weights[j] * r * r;
        }
        if (error < least) {
            least = error;
            best = factor;
        }
    }
    return best;
}

// Takes the nearest multiples for the sub-block where they leave less error.
static __device__ inline void accept(const Grid& g, Chosen& c, const float* x, const float* w, float scale, float min) {
    const float whole = multiple(g, scale);
    const float whole_min = g.family == AFFINE ? multiple(g, min) : 0.0f;
    const Sums other = sums_of(g, x, w, c.d * whole, c.dmin * whole_min);
    if (other.error < c.sums.error) {
        c.scale = whole;
        c.min = whole_min;
        c.sums = other;
    }
}

// Other local minima: the second fit, scales next to its own with the middle kept, offsets about a third of a step away with
// the top kept.
static __device__ inline void look_around_affine(const Grid& g, Chosen& c, const float* x, const float* w, const Fit& second) {
    const float per_d = recip_or_zero(c.d);
    const float per_dmin = recip_or_zero(c.dmin);
    accept(g, c, x, w, second.step * per_d, second.offset * per_dmin);
    float scale = c.scale;
    float min = c.min;
    const float middle = c.sums.q * recip_or_zero(c.sums.w) * c.d * per_dmin;
    for (float shift = -1.0f; shift < 2.0f; shift += 2.0f) {
        const float other = multiple(g, scale + shift);
        accept(g, c, x, w, other, min + (other - scale) * middle);
    }
    scale = c.scale;
    min = c.min;
    const float per_code = c.dmin * per_d * (1.0f / g.last);
    for (float sign = -1.0f; sign < 2.0f; sign += 2.0f) {
        const float other = multiple(g, min + c.d * scale * per_dmin * (sign * 0.35f));
        accept(g, c, x, w, scale + (other - min) * per_code, other);
    }
}

// The scales next to its own.
static __device__ inline void look_around_symmetric(const Grid& g, Chosen& c, const float* x, const float* w) {
    const float own = c.scale;
    for (u32 k = 1u; k <= g.factors_reach; k++) {
        accept(g, c, x, w, own - (float)k, 0.0f);
        accept(g, c, x, w, own + (float)k, 0.0f);
    }
}

static __device__ inline float error_moved(const Sums& s, float step, float offset) {
    return s.error + step * (step * s.qq - 2.0f * s.rq) + offset * (offset * s.w + 2.0f * (s.r - step * s.q));
}

// With the codes as they are, the best scale for each minimum near.
static __device__ inline void descend_affine(const Grid& g, Chosen& c) {
    const float scale = c.scale;
    const float min = c.min;
    const float per_scale = recip_or_zero(c.d * c.sums.qq);
    float least = c.sums.error;
    for (u32 k = 0u; k < 5u; k++) {
        // 0, -1, 1, -2, 2
        const float size = (float)((k + 1u) / 2u);
        const float other_min = multiple(g, min + (k % 2u == 1u ? -size : size));
        const float offset = c.dmin * (other_min - min);
        const float other_scale = multiple(g, scale + (c.sums.rq + offset * c.sums.q) * per_scale);
        const float error = error_moved(c.sums, c.d * (other_scale - scale), offset);
        if (error < least) {
            least = error;
            c.scale = other_scale;
            c.min = other_min;
        }
    }
    const float step = c.d * (c.scale - scale);
    const float offset = c.dmin * (c.min - min);
    c.sums.error = error_moved(c.sums, step, offset);
    c.sums.r = c.sums.r - step * c.sums.q + offset * c.sums.w;
    c.sums.rq = c.sums.rq - step * c.sums.qq + offset * c.sums.q;
}

extern "C" __global__ void __launch_bounds__(32) feedback_factors(
    const float* __restrict__ wanted,
    const float* __restrict__ repairs,
    const float* __restrict__ pivots,
    float* __restrict__ scales,
    Parameters p
) {
    __shared__ float targets[256];
    // What threads tell each other of their sub-blocks.
    __shared__ float told[5][16];
    const u32 row = group_index();
    if (row >= p.rows) {
        return;
    }
    const Grid& g = p.grid;
    const u32 lane = threadIdx.x;
    const u32 subs = 256u / g.sub;
    const bool is_affine = g.family == AFFINE;
    for (u32 c = lane; c < 256u; c += 32u) {
        const float target = repairs[c * p.rows + row] + wanted[p.wanted_first + c * p.rows + row];
        targets[c] = fabsf(target) < INFINITE ? target : 0.0f;
    }
    __syncthreads();
    Chosen c = {};
    c.unit = unit_of(fabsf(largest_of(targets, 256u)));
    __syncthreads();
    for (u32 column = lane; column < 256u; column += 32u) {
        targets[column] *= 1.0f / c.unit;
    }
    __syncthreads();
    const bool has_sub = lane < subs;
    const float* x = targets + (has_sub ? lane : 0u) * g.sub;
    const float* w = pivots + (has_sub ? lane : 0u) * g.sub;
    Fit best;
    Fit second = {};
    if (is_affine) {
        affine_fits(g, x, w, best, second);
    } else {
        best = symmetric_fit(g, x, w);
    }
    if (has_sub) {
        told[0][lane] = best.step;
        told[1][lane] = best.stiffness;
        told[2][lane] = best.offset;
        told[3][lane] = is_affine ? range_of(x, w, g.sub).w : 0.0f;
        told[4][lane] = largest_of(x, g.sub) * (1.0f / g.first);
    }
    __syncthreads();
    c.d = common_factor(g, c.unit, told[0], told[1], subs);
    c.scale = multiple(g, best.step * recip_or_zero(c.d));
    float best_d = 0.0f;
    float best_dmin = 0.0f;
    float least = INFINITE;
    if (is_affine) {
        c.dmin = common_factor(g, c.unit, told[2], told[3], subs);
        c.min = multiple(g, best.offset * recip_or_zero(c.dmin));
    } else {
        // What plain rounding would take: the largest step at the first scale.
        best_d = f16_in_units(largest_of(told[4], subs) * (-1.0f / g.scales), c.unit);
        const float scale = multiple(g, largest_of(x, g.sub) * (1.0f / g.first) * recip_or_zero(best_d));
        const Sums sums = sums_of(g, x, w, best_d * scale, 0.0f);
        __syncthreads();
        if (has_sub) {
            told[0][lane] = sums.error;
        }
        __syncthreads();
        least = 0.0f;
        for (u32 j = 0u; j < subs; j++) {
            least += told[0][j];
        }
    }
    for (u32 round = 0u; round <= g.rounds; round++) {
        c.sums = sums_of(g, x, w, c.d * c.scale, c.dmin * c.min);
        __syncthreads();
        if (has_sub) {
            told[0][lane] = c.sums.error;
        }
        __syncthreads();
        float error = 0.0f;
        for (u32 j = 0u; j < subs; j++) {
            error += told[0][j];
        }
        if (error < least) {
            least = error;
            best_d = c.d;
            best_dmin = c.dmin;
        }
        if (round == g.rounds) {
            break;
        }
        if (round == 0u && is_affine) {
            look_around_affine(g, c, x, w, second);
        } else if (round == 0u) {
            look_around_symmetric(g, c, x, w);
        }
        // Least squares over all sub-blocks, codes as they are.
        float parts[5] = {};
        if (is_affine) {
            descend_affine(g, c);
            parts[1] = c.scale * c.min * c.sums.q;
            parts[2] = c.min * c.min * c.sums.w;
            parts[4] = c.min * c.sums.r;
            parts[3] = c.scale * c.sums.rq;
        } else {
            const float moved = multiple(g, c.scale + c.sums.rq * recip_or_zero(c.d * c.sums.qq));
            parts[3] = moved * (c.sums.rq - c.d * (moved - c.scale) * c.sums.qq);
            c.scale = moved;
        }
        parts[0] = c.scale * c.scale * c.sums.qq;
        __syncthreads();
        if (has_sub) {
            for (u32 part = 0u; part < 5u; part++) {
                told[part][lane] = parts[part];
            }
        }
        __syncthreads();
        float sums[5] = {};
        for (u32 j = 0u; j < subs; j++) {
            for (u32 part = 0u; part < 5u; part++) {
                sums[part] += told[part][j];
            }
        }
        const float dd = sums[0];
        const float dm = sums[1];
        const float mm = sums[2];
        const float rd = sums[3];
        const float rm = sums[4];
        if (!is_affine) {
            c.d = f16_in_units(c.d + rd * recip_or_zero(dd), c.unit);
            continue;
        }
        const float determinant = dd * mm - dm * dm;
        const float inverse = recip_or_zero(determinant);
        const bool both = determinant > 0.0f;
        const float d = both ? (rd * mm - rm * dm) * inverse : rd * recip_or_zero(dd);
        const float dmin = both ? (rd * dm - rm * dd) * inverse : 0.0f;
        c.d = f16_in_units(fmaxf(c.d + d, 0.0f), c.unit);
        c.dmin = f16_in_units(fmaxf(c.dmin + dmin, 0.0f), c.unit);
    }
    if (has_sub) {
        float* out = scales + p.scales_first + lane * 4u * p.rows + row;
        out[0] = best_d * c.unit;
        out[p.rows] = best_dmin * c.unit;
        out[2u * p.rows] = 0.0f;
        out[3u * p.rows] = 0.0f;
    }
}
