// Rows of `width` values rounded to 16 bits, two in a word of `out`, filled up with zeros to rows of `row_words` words. One
// thread per word of `count`. mode 0: BF16; 1: F16.
// Twins: pack_halves.wgsl, src/backend/activation/mod.rs.

struct Parameters {
    u32 count;
    u32 width;
    u32 row_words;
    u32 mode;
};

static __device__ inline u32 bf16_of(float x) {
    const u32 bits = __float_as_uint(round_to_bf16(x)) >> 16;
    // A NaN stays one, whatever bits it had.
    return x != x ? bits | 0x40u : bits;
}

static __device__ inline u32 pack(float x, u32 mode) { return mode == 0u ? bf16_of(x) : f16_bits(x); }

extern "C" __global__ void __launch_bounds__(256) pack_halves(
    const float* __restrict__ input,
    u32* __restrict__ out,
    Parameters p
) {
    const u32 i = group_index() * 256u + threadIdx.x;
    if (i >= p.count) {
        return;
    }
    const u32 k = i % p.row_words * 2u;
    const float* row = input + i / p.row_words * p.width;
    const u32 low = k < p.width ? pack(row[k], p.mode) : 0u;
    const u32 high = k + 1u < p.width ? pack(row[k + 1u], p.mode) : 0u;
    out[i] = low | high << 16;
}
