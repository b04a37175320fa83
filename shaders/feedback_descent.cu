// A pass over a chunk of at most 256 columns that are rounded: each scale and each code moves to where the loss tr(E M E^T)
// is least, everything else held.
//
// wanted, errors (wanted less rounded), values (of codes): [column, row] from columns_first on; gradient: E M of the chunk,
// [column, row]; moments: M within the chunk, [width, width] from moments_first on; scales: [sub-block][d, dmin, scale,
// min][row] from scales_first on. One group per row.
// Twins: feedback_descent.wgsl, src/quantize/feedback/descent.rs.

struct Parameters {
    u32 rows;
    u32 width;
    u32 columns_first;
    u32 moments_first;
    u32 scales_first;
    u32 pad0;
    u32 pad1;
    u32 pad2;
    Grid grid;
};

// A sub-block while it moves: [column].
struct SubBlock {
    float wanted[128];
    float errors[128];
    float before[128];
    float values[128];
    float bends[128];
    Scales scales;
};

// For errors that change along a direction v: g v and v M v; v M goes to sub.bends. v: 0 values, 1 values less the minimum, 2
// ones.
struct Along {
    float slope;
    float curvature;
};

static __device__ inline float direction(const SubBlock& sub, u32 which, u32 j) {
    if (which == 2u) {
        return 1.0f;
    }
    return which == 1u ? sub.values[j] - sub.scales.min : sub.values[j];
}

static __device__ inline Along along(
    const Grid& g,
    SubBlock& sub,
    const float* gradient,
    const float* moments,
    u32 width,
    u32 which
) {
    for (u32 j = threadIdx.x; j < g.sub; j += 32u) {
        float bend = 0.0f;
        for (u32 i = 0u; i < g.sub; i++) {
            bend = fmaf(direction(sub, which, i), moments[i * width + j], bend);
        }
        sub.bends[j] = bend;
    }
    __syncthreads();
    Along found = {0.0f, 0.0f};
    for (u32 j = 0u; j < g.sub; j++) {
        const float v = direction(sub, which, j);
        found.slope = fmaf(gradient[j], v, found.slope);
        found.curvature = fmaf(sub.bends[j], v, found.curvature);
    }
    return found;
}

// Takes scales, which change errors by `change` along the direction, where that loses less.
static __device__ inline void accept(
    const Grid& g,
    SubBlock& sub,
    float* gradient,
    const Along& along,
    const Scales& scales,
    float change
) {
    const bool is_better = change * (along.slope + along.slope + change * along.curvature) < 0.0f;
    const float moved = is_better ? change : 0.0f;
    const Scales taken = is_better ? scales : sub.scales;
    const float step = step_of(taken);
    const float offset = offset_of(taken);
    __syncthreads();
    for (u32 j = threadIdx.x; j < g.sub; j += 32u) {
        sub.errors[j] = sub.wanted[j] - (step * sub.values[j] - offset);
        gradient[j] = fmaf(moved, sub.bends[j], gradient[j]);
    }
    if (threadIdx.x == 0u) {
        sub.scales = taken;
    }
    __syncthreads();
}

// Moves the scale, codes held, to the best that the type can store.
static __device__ inline void move_step(const Grid& g, SubBlock& sub, float* gradient, const float* moments, u32 width) {
    const bool with_min = g.lattice == ZERO_POINT;
    const Along found = along(g, sub, gradient, moments, width, with_min ? 1u : 0u);
    Scales scales = sub.scales;
    const float change = found.slope * recip_or_zero(found.curvature);
    if (g.lattice == MULTIPLES) {
        scales.scale = whole_within(scales.scale + change * recip_or_zero(scales.d), g.low, g.high);
    } else if (with_min) {
        const float d = nearest_scale(g, scales.d + change);
        scales.d = d > 0.0f ? d : scales.d;
        scales.dmin = scales.d;
    } else {
        scales.d = nearest_scale(g, scales.d + change);
    }
    // A step that grows by c makes every error shrink by c times its value.
    const float moved = with_min ? sub.scales.d - scales.d : step_of(sub.scales) - step_of(scales);
    accept(g, sub, gradient, found, scales, moved);
}

// The same for the minimum.
static __device__ inline void move_offset(const Grid& g, SubBlock& sub, float* gradient, const float* moments, u32 width) {
    const Along found = along(g, sub, gradient, moments, width, 2u);
    Scales scales = sub.scales;
    const float change = -(found.slope * recip_or_zero(found.curvature));
    if (g.lattice == MULTIPLES) {
        scales.min = whole_within(scales.min + change * recip_or_zero(scales.dmin), 0.0f, g.min_high);
    } else if (g.lattice == ZERO_POINT) {
        scales.min = whole_within(scales.min + change * recip_or_zero(scales.d), g.low, g.high);
    } else {
        scales.dmin = nearest_f16(scales.dmin + change);
    }
    accept(g, sub, gradient, found, scales, offset_of(scales) - offset_of(sub.scales));
}

// Moves every code in turn. One thread: a code depends on all before it.
static __device__ inline void move_codes(const Grid& g, SubBlock& sub, const float* gradient, const float* moments, u32 width) {
    const float step = step_of(sub.scales);
    const float offset = offset_of(sub.scales);
    const float inverse = recip_or_zero(step);
    float* changes = sub.bends;
    for (u32 j = 0u; j < g.sub; j++) {
        float slope = gradient[j];
        for (u32 i = 0u; i < j; i++) {
            slope = fmaf(changes[i], moments[i * width + j], slope);
        }
        const float curvature = moments[j * width + j];
        const float target = sub.wanted[j] - sub.errors[j] + slope * recip_or_zero(curvature);
        const float value = nearest_value(g, (target + offset) * inverse);
        const float error = sub.wanted[j] - (step * value - offset);
        const float change = error - sub.errors[j];
        const bool is_better = change * (slope + slope + change * curvature) < 0.0f;
        changes[j] = is_better ? change : 0.0f;
        if (is_better) {
            sub.values[j] = value;
            sub.errors[j] = error;
        }
    }
}

extern "C" __global__ void __launch_bounds__(32) feedback_descent(
    const float* __restrict__ wanted,
    const float* __restrict__ gradient,
    const float* __restrict__ moments,
    float* __restrict__ errors,
    float* __restrict__ values,
    float* __restrict__ scales,
    Parameters p
) {
    __shared__ float slopes[256];
    __shared__ SubBlock sub;
    const u32 row = group_index();
    if (row >= p.rows) {
        return;
    }
    const Grid& g = p.grid;
    const u32 lane = threadIdx.x;
    const u32 rows = p.rows;
    wanted += p.columns_first + row;
    errors += p.columns_first + row;
    values += p.columns_first + row;
    scales += p.scales_first + row;
    moments += p.moments_first;
    for (u32 c = lane; c < p.width; c += 32u) {
        slopes[c] = gradient[c * rows + row];
    }
    for (u32 first = 0u; first < p.width; first += g.sub) {
        const float* inner = moments + first * p.width + first;
        float* own = scales + first / g.sub * 4u * rows;
        for (u32 j = lane; j < g.sub; j += 32u) {
            const u32 at = (first + j) * rows;
            sub.wanted[j] = wanted[at];
            sub.errors[j] = errors[at];
            sub.before[j] = errors[at];
            sub.values[j] = values[at];
        }
        if (lane == 0u) {
            sub.scales = {own[0], own[rows], own[2u * rows], own[3u * rows]};
        }
        __syncthreads();
        if (g.lattice != FIXED) {
            move_step(g, sub, slopes + first, inner, p.width);
        }
        if (g.lattice == OWN_WITH_MIN || g.lattice == ZERO_POINT || (g.lattice == MULTIPLES && g.min_high >= 0.0f)) {
            move_offset(g, sub, slopes + first, inner, p.width);
        }
        if (lane == 0u) {
            move_codes(g, sub, slopes + first, inner, p.width);
            own[0] = sub.scales.d;
            own[rows] = sub.scales.dmin;
            own[2u * rows] = sub.scales.scale;
            own[3u * rows] = sub.scales.min;
        }
        __syncthreads();
        for (u32 j = lane; j < g.sub; j += 32u) {
            const u32 at = (first + j) * rows;
            errors[at] = sub.errors[j];
            values[at] = sub.values[j];
        }
        for (u32 j = first + g.sub + lane; j < p.width; j += 32u) {
            float sum = 0.0f;
            for (u32 i = 0u; i < g.sub; i++) {
                sum = fmaf(sub.errors[i] - sub.before[i], moments[(first + i) * p.width + j], sum);
            }
            slopes[j] += sum;
        }
        __syncthreads();
    }
}
