// Rounds a chunk of at most 256 columns with error feedback: GPTQ's block step, the scales of a sub-block chosen when it is
// reached, by running the feedback inside it for every candidate.
//
// wanted: what rows should be, [column, row] from wanted_first on; repairs: what errors before the chunk change of it,
// [column, row]; feedback: the factor of the second moments within the chunk, [width, width] from feedback_first on; pivots:
// what an error in each column counts; errors (wanted less rounded) and values (of codes): [column, row] from errors_first
// on; scales: [sub-block][d, dmin, scale, min][row] from scales_first on, read where the family is PRESET or super-blocks
// have factors. One group per row, whose threads have a candidate each.
// Twins: feedback_sweep.wgsl, src/quantize/feedback/sweep.rs.
//
// Source: GPTQ, arXiv:2210.17323, Algorithm 1.

struct Parameters {
    u32 rows;
    u32 width;
    u32 wanted_first;
    u32 feedback_first;
    u32 errors_first;
    u32 scales_first;
    u32 pad0;
    u32 pad1;
    Grid grid;
};

// What the candidates of a sub-block are made of: see fit_of.
struct Basis {
    float a;
    float b;
    Scales head;
};

// ENDS, POWERS: the largest target; RANGES, MAGNITUDES: least and largest; others: step or scale, and offset.
static __device__ inline void fit_of(const Grid& g, const float* x, const float* w, float& a, float& b) {
    if (g.family == LINES) {
        const Line line = search_line(x, w, g.last);
        a = line.d;
        b = line.m;
    } else if (g.family == AFFINE) {
        Fit best;
        Fit second;
        affine_fits(g, x, w, best, second);
        a = best.step;
        b = best.offset;
    } else if (g.family == SYMMETRIC) {
        a = symmetric_fit(g, x, w).step;
    } else if (g.family == MAGNITUDES || g.family == RANGES) {
        a = 0.0f;
        b = 0.0f;
        for (u32 i = 0u; i < g.sub; i++) {
            a = fminf(a, x[i]);
            b = fmaxf(b, x[i]);
        }
    } else if (g.family != PRESET) {
        a = largest_of(x, g.sub);
    }
}

static __device__ inline u32 candidates_of(const Grid& g) {
    switch (g.family) {
        case ENDS: return g.a_count + g.b_count;
        case LINES: return g.a_count * g.b_count;
        case POWERS: return 4u;
        case AFFINE: return 25u;
        case SYMMETRIC: return 2u * (2u * g.reach + 1u);
        case MAGNITUDES: return 2u * g.a_count;
        case RANGES: return 3u * g.a_count;
        default: return 1u;
    }
}

static __device__ inline Scales own_scale(float d) { return {d, 0.0f, 1.0f, 1.0f}; }

static __device__ inline Scales magnitude_candidate(const Grid& g, const Basis& basis, u32 k) {
    const float per_high = 1.0f / g.last;
    const float per_low = 1.0f / g.first;
    // The side of the first code has one code more: the larger of the two, whichever it is.
    const float reach = k < g.a_count ? fmaxf(basis.b * per_high, basis.a * per_low)
                                      : fminf(basis.a * per_high, basis.b * per_low);
    return own_scale(nearest_scale(g, reach * (g.a_first + g.a_step * (float)(k % g.a_count))));
}

static __device__ inline Scales range_candidate(const Grid& g, const Basis& basis, u32 k) {
    const float reach = (basis.b - basis.a) * (1.0f / (g.last - g.first));
    const float middle = (basis.b + basis.a) * 0.5f;
    const float d = nearest_scale(g, reach * (g.a_first + g.a_step * (float)(k / 3u)));
    const float center = 0.5f * (g.first + g.last) - middle * recip_or_zero(d);
    const float shift = -0.5f + 0.5f * (float)(k % 3u);
    return {d, d, 1.0f, whole_within(center + shift, g.first, g.last)};
}

static __device__ inline Scales multiple_candidate(const Grid& g, const Basis& basis, u32 k) {
    const float scale = basis.a * recip_or_zero(basis.head.d);
    if (g.family == SYMMETRIC) {
        const u32 around = 2u * g.reach + 1u;
        const float shift = (float)(k % around) - (float)g.reach;
        const float sign = k < around ? 1.0f : -1.0f;
        return {basis.head.d, basis.head.dmin, whole_within(scale * sign + shift, -g.scales, g.scales - 1.0f), 0.0f};
    }
    const float min = basis.b * recip_or_zero(basis.head.dmin);
    return {
        basis.head.d,
        basis.head.dmin,
        whole_within(scale + ((float)(k / 5u) - 2.0f), 0.0f, g.scales),
        whole_within(min + ((float)(k % 5u) - 2.0f), 0.0f, g.scales),
    };
}

// Scales to try.
static __device__ inline Scales candidate(const Grid& g, const Basis& basis, u32 k) {
    if (g.family == ENDS) {
        const bool is_first = k < g.a_count;
        const float at = is_first ? g.a_first + g.a_step * (float)k : g.b_first + g.b_step * (float)(k - g.a_count);
        return own_scale(nearest_f16(basis.a * (1.0f / ((is_first ? g.first : g.last) + at))));
    }
    if (g.family == LINES) {
        const float d = nearest_f16(basis.a * (1.0f + (g.a_first + g.a_step * (float)(k / g.b_count))));
        const float min = nearest_f16((g.b_first + g.b_step * (float)(k % g.b_count)) * d - basis.b);
        return {d, min, 1.0f, 1.0f};
    }
    if (g.family == POWERS) {
        const float d = power_of_two(basis.a) * (0.0625f * (float)(1u << k));
        return own_scale(fmaxf(d, __uint_as_float(1u << 23)));
    }
    if (g.family == MAGNITUDES) {
        return magnitude_candidate(g, basis, k);
    }
    if (g.family == RANGES) {
        return range_candidate(g, basis, k);
    }
    if (g.family == PRESET) {
        return basis.head;
    }
    return multiple_candidate(g, basis, k);
}

// What a sub-block is rounded from.
struct SubBlock {
    const float* targets;
    const float* wanted;
    const float* weights;
    // Of its first row and column.
    const float* feedback;
    u32 rows;
    u32 width;
};

// What the sub-block loses with some scales. Errors and values go to `errors` and, where it is no null pointer, `values`.
static __device__ inline float simulate(const Grid& g, const SubBlock& sub, const Scales& s, float* errors, float* values) {
    const float step = step_of(s);
    const float offset = offset_of(s);
    const float inverse = recip_or_zero(step);
    float loss = 0.0f;
    for (u32 j = 0u; j < g.sub; j++) {
        float target = sub.targets[j];
        for (u32 i = 0u; i < j; i++) {
            target = fmaf(errors[i], sub.feedback[i * sub.width + j], target);
        }
        const float value = nearest_value(g, (target + offset) * inverse);
        const float rounded = step * value - offset;
        const float missed = target - rounded;
        loss = fmaf(missed * missed, sub.weights[j], loss);
        errors[j] = sub.wanted[j * sub.rows] - rounded;
        if (values != nullptr) {
            values[j * sub.rows] = value;
        }
    }
    return loss;
}

extern "C" __global__ void __launch_bounds__(32, 1) feedback_sweep(
    const float* __restrict__ wanted,
    const float* __restrict__ repairs,
    const float* __restrict__ feedback,
    const float* __restrict__ pivots,
    float* __restrict__ errors,
    float* __restrict__ values,
    float* __restrict__ scales,
    Parameters p
) {
    __shared__ float targets[256];
    __shared__ float losses[32];
    __shared__ u32 picks[32];
    __shared__ float fit[2];
    __shared__ float rounded[128];
    const u32 row = group_index();
    if (row >= p.rows) {
        return;
    }
    const Grid& g = p.grid;
    const u32 lane = threadIdx.x;
    const u32 rows = p.rows;
    wanted += p.wanted_first + row;
    errors += p.errors_first + row;
    values += p.errors_first + row;
    scales += p.scales_first + row;
    feedback += p.feedback_first;
    for (u32 c = lane; c < p.width; c += 32u) {
        targets[c] = repairs[c * rows + row] + wanted[c * rows];
    }
    __syncthreads();
    for (u32 first = 0u; first < p.width; first += g.sub) {
        if (lane == 0u) {
            fit_of(g, targets + first, pivots + first, fit[0], fit[1]);
        }
        __syncthreads();
        float* own = scales + first / g.sub * 4u * rows;
        const Basis basis = {fit[0], fit[1], {own[0], own[rows], own[2u * rows], own[3u * rows]}};
        const SubBlock sub = {
            targets + first, wanted + first * rows, pivots + first, feedback + first * p.width + first, rows, p.width,
        };
        float tried[128];
        float least = INFINITE;
        u32 pick = 0u;
        for (u32 k = lane; k < candidates_of(g); k += 32u) {
            const float loss = simulate(g, sub, candidate(g, basis, k), tried, nullptr);
            if (loss < least) {
                least = loss;
                pick = k;
            }
        }
        losses[lane] = least;
        picks[lane] = pick;
        __syncthreads();
        // The first candidate of least loss, for every thread.
        least = INFINITE;
        pick = 0u;
        for (u32 other = 0u; other < 32u; other++) {
            const bool is_first = losses[other] == least && picks[other] < pick;
            if (losses[other] < least || is_first) {
                least = losses[other];
                pick = picks[other];
            }
        }
        const Scales best = candidate(g, basis, pick);
        if (lane == 0u) {
            simulate(g, sub, best, rounded, values + first * rows);
            own[0] = best.d;
            own[rows] = best.dmin;
            own[2u * rows] = best.scale;
            own[3u * rows] = best.min;
        }
        __syncthreads();
        for (u32 j = lane; j < g.sub; j += 32u) {
            errors[(first + j) * rows] = rounded[j];
        }
        for (u32 j = first + g.sub + lane; j < p.width; j += 32u) {
            float sum = 0.0f;
            for (u32 i = 0u; i < g.sub; i++) {
                sum = fmaf(rounded[i], feedback[(first + i) * p.width + j], sum);
            }
            targets[j] += sum;
        }
        __syncthreads();
    }
}
