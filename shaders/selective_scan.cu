// Mamba-2, token by token: S = exp(dt A) S + dt x B^T, y = S C + D x, dt = clamp(softplus(dt + bias)), for one sequence.
//
// xbc: rows of x [heads, head_dim], B [groups, state_size], C [groups, state_size]; dt: the last `heads` of every dt_stride
// values; state: [head, state, channel of the head], in place; out: [all rows, heads head_dim]. One thread per channel.
// The twin reads and writes the state once per token. Here the rows are passed once per 64 of its values, which stay in
// registers: sums of y wait in `out` in between, so that their order is the twin's.
// Twins: selective_scan.wgsl, src/backend/cpu/selective_scan.rs.

struct Parameters {
    u32 rows;
    u32 first_row;
    u32 heads;
    u32 head_dim;
    u32 scan_groups;
    u32 state_size;
    u32 dt_stride;
    float dt_min;
    float dt_max;
};

// State values that a thread holds.
#define HELD 64u

// Where a channel finds its operands.
struct Channel {
    // Of the head: step of time, decay, what is added to the step.
    const float* dt;
    float a;
    float dt_bias;
    // Of the first row.
    const float* x;
    const float* b;
    const float* c;
    float* y;
    float* state;
    // From row to row.
    u32 width;
    u32 inner;
};

// The same number, which the compiler does not know to be the same: else it keeps HELD addresses in registers.
static __device__ inline u32 anew(u32 x) {
#ifdef __CUDA_ARCH__
    asm volatile("" : "+r"(x));
#endif
    return x;
}

static __device__ inline float time_step(const Channel& own, const Parameters& p, u32 row) {
    const float step = softplus(own.dt[row * p.dt_stride] + own.dt_bias);
    const float raised = step < p.dt_min ? p.dt_min : step;
    return raised > p.dt_max ? p.dt_max : raised;
}

// Adds to y what HELD values of the state contribute, from value `first` on.
static __device__ inline void scan_held(const Channel& own, const Parameters& p, u32 first) {
    float s[HELD];
    float* state = own.state + first * p.head_dim;
    #pragma unroll
    for (u32 n = 0u; n < HELD; n++) {
        s[n] = state[n * p.head_dim];
    }
    for (u32 row = 0u; row < p.rows; row++) {
        const float step = time_step(own, p, row);
        const float decay = exp_of(step * own.a);
        const float input = step * own.x[row * own.width];
        const float* b = own.b + row * own.width + first;
        const float* c = own.c + row * own.width + first;
        float y = first == 0u ? 0.0f : own.y[row * own.inner];
        #pragma unroll
        for (u32 n = 0u; n < HELD; n++) {
            s[n] = fmaf(input, b[n], s[n] * decay);
            y = fmaf(s[n], c[n], y);
        }
        own.y[row * own.inner] = y;
    }
    const u32 stride = anew(p.head_dim);
    #pragma unroll
    for (u32 n = 0u; n < HELD; n++) {
        state[n * stride] = s[n];
    }
}

// The same for one value: the rest of sizes that HELD does not divide.
static __device__ inline void scan_one(const Channel& own, const Parameters& p, u32 n) {
    float s = own.state[n * p.head_dim];
    for (u32 row = 0u; row < p.rows; row++) {
        const float step = time_step(own, p, row);
        const float decay = exp_of(step * own.a);
        const float input = step * own.x[row * own.width];
        s = fmaf(input, own.b[row * own.width + n], s * decay);
        const float y = n == 0u ? 0.0f : own.y[row * own.inner];
        own.y[row * own.inner] = fmaf(s, own.c[row * own.width + n], y);
    }
    own.state[n * p.head_dim] = s;
}

extern "C" __global__ void __launch_bounds__(64, 8) selective_scan(
    const float* __restrict__ xbc,
    const float* __restrict__ dt,
    const float* __restrict__ a,
    const float* __restrict__ d,
    const float* __restrict__ dt_bias,
    float* __restrict__ state,
    float* __restrict__ out,
    Parameters p
) {
    const u32 channel = group_index() * 64u + threadIdx.x;
    const u32 inner = p.heads * p.head_dim;
    if (channel >= inner) {
        return;
    }
    const u32 head = channel / p.head_dim;
    const u32 width = inner + 2u * p.scan_groups * p.state_size;
    const float* row = xbc + p.first_row * width;
    const float* b = row + inner + head / (p.heads / p.scan_groups) * p.state_size;
    const Channel own = {
        dt + (p.first_row + 1u) * p.dt_stride - p.heads + head,
        a[head],
        dt_bias[head],
        row + channel,
        b,
        b + p.scan_groups * p.state_size,
        out + p.first_row * inner + channel,
        state + head * p.state_size * p.head_dim + channel % p.head_dim,
        width,
        inner,
    };
    u32 n = 0u;
    for (; n + HELD <= p.state_size; n += HELD) {
        scan_held(own, p, n);
    }
    for (; n < p.state_size; n++) {
        scan_one(own, p, n);
    }
    for (u32 r = 0u; r < p.rows; r++) {
        own.y[r * inner] += d[head] * own.x[r * width];
    }
}
