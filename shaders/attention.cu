// Causal grouped-query attention of one sequence: softmax(q k^T / sqrt(head_dim)) v, in one pass over the positions.
//
// query: [all rows, heads head_dim], the sequence from first_row on; its row r sees position + r + 1 rows of keys and
// values, [positions, key_value_heads head_dim]; out as query. With is_f16, queries and sums of values are rounded to F16 as
// llama.cpp's flash attention on CPU does; keys and values were when they were stored. One group per row and head, whose
// threads compute the scores of 64 positions, then each some channels. head_dim is at most 256.
// The twin's threads each compute every weight; here each thread computes one of 64, with the same bits.
// Twins: attention.wgsl, src/backend/cpu/attention.rs.

struct Parameters {
    u32 rows;
    u32 first_row;
    u32 position;
    u32 heads;
    u32 key_value_heads;
    u32 head_dim;
    u32 is_f16;
};

// Of the first scores and of what was before them; NaN is passed over.
static __device__ inline float largest_of(const float* scores, u32 count, float largest) {
    for (u32 i = 0u; i < count; i++) {
        largest = scores[i] > largest ? scores[i] : largest;
    }
    return largest;
}

extern "C" __global__ void __launch_bounds__(64) attention(
    const float* __restrict__ query,
    const float* __restrict__ keys,
    const float* __restrict__ values,
    float* __restrict__ out,
    Parameters p
) {
    __shared__ float own[256];
    // Of 64 positions: scores, the largest of all up to each, what it multiplies the sums with, its weight.
    __shared__ float scores[64];
    __shared__ float peaks[64];
    __shared__ float shrinks[64];
    __shared__ float weights[64];
    const u32 item = group_index();
    const u32 row = item / p.heads;
    const u32 head = item % p.heads;
    if (row >= p.rows) {
        return;
    }
    const u32 lane = threadIdx.x;
    const u32 seen = p.position + row + 1u;
    const u32 q = ((p.first_row + row) * p.heads + head) * p.head_dim;
    const u32 width = p.key_value_heads * p.head_dim;
    const u32 cache = head / (p.heads / p.key_value_heads) * p.head_dim;
    const float scale = 1.0f / sqrtf((float)p.head_dim);
    for (u32 c = lane; c < p.head_dim; c += 64u) {
        own[c] = p.is_f16 ? round_to_f16(query[q + c]) : query[q + c];
    }
    __syncthreads();
    float sums[4] = {};
    float total = 0.0f;
    float largest = -3.4e38f;
    for (u32 first = 0u; first < seen; first += 64u) {
        if (first + lane < seen) {
            const float* key = keys + (first + lane) * width + cache;
            float score = 0.0f;
            for (u32 c = 0u; c < p.head_dim; c++) {
                score = fmaf(own[c], key[c], score);
            }
            scores[lane] = score * scale;
        }
        __syncthreads();
        const u32 count = min(64u, seen - first);
        if (lane < count) {
            const float peak = largest_of(scores, lane, largest);
            const bool is_larger = scores[lane] > peak;
            const float power = exp_of(is_larger ? peak - scores[lane] : scores[lane] - peak);
            peaks[lane] = is_larger ? scores[lane] : peak;
            shrinks[lane] = is_larger ? power : 1.0f;
            // An infinite score has no share; in F16, as runtimes have it, the first one has all.
            const bool has_share = p.is_f16 || __float_as_uint(scores[lane]) != NOT_FINITE;
            const float first_weight = has_share ? 1.0f : __uint_as_float(0x7fc00000u);
            weights[lane] = is_larger ? first_weight : power;
        }
        __syncthreads();
        for (u32 other = 0u; other < count; other++) {
            const float shrink = shrinks[other];
            if (shrink != 1.0f) {
                total *= shrink;
                for (u32 part = 0u; part < 4u; part++) {
                    sums[part] *= shrink;
                    sums[part] = p.is_f16 ? round_to_f16(sums[part]) : sums[part];
                }
            }
            const float weight = weights[other];
            total += weight;
            const float* value = values + (first + other) * width + cache;
            for (u32 part = 0u; part < 4u; part++) {
                const u32 c = part * 64u + lane;
                if (c < p.head_dim) {
                    const float sum = fmaf(weight, value[c], sums[part]);
                    sums[part] = p.is_f16 ? round_to_f16(sum) : sum;
                }
            }
        }
        largest = peaks[count - 1u];
    }
    for (u32 part = 0u; part < 4u; part++) {
        const u32 c = part * 64u + lane;
        if (c < p.head_dim) {
            out[q + c] = sums[part] / total;
        }
    }
}
