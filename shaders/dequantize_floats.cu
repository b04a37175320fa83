// Rows of packed floats as values: `out[row, column] = code scale second_scale`, or through the second scale, in this order.
// FP8: bytes of F8_E4M3, a scale per tensor, row or block of both. NVFP4: E2M1, two in a byte, the first in its low half, a
// scale in F8_E4M3 per 16. One thread per value.
// Twins: dequantize_floats.wgsl, `PackedLinear::dequantize` in formats/src/packed/linear.rs.

struct Parameters {
    // Values to write.
    u32 count;
    u32 columns;
    // Of a code: 8 (F8_E4M3) or 4 (E2M1).
    u32 bits;
    // Where codes begin, and the step to the next row, in bytes.
    u32 first_code;
    u32 row_bytes;
    // Rows of the views that come before those to write, and rows of a head whose halves are to be interleaved.
    u32 first_row;
    u32 head_rows;
    // Rows and columns that share a scale.
    u32 block_rows;
    u32 block_columns;
    // Rows of the first block that come before the views.
    u32 block_row;
    // Scales from one row of blocks to the next.
    u32 blocks;
    // 0: BF16, 1: F16, 2: F32, 3: F8_E4M3.
    u32 scale_type;
    u32 first_scale;
    float second_scale;
    // 1 where the second scale divides.
    u32 divides;
};

// Of 4 bits: sign, exponent, half.
static __device__ inline float e2m1(u32 code) {
    const u32 magnitude = code & 7u;
    u32 bits = (magnitude << 22) + (126u << 23);
    if (magnitude < 2u) {
        bits = __float_as_uint((float)magnitude * 0.5f);
    }
    return __uint_as_float(bits | ((code & 8u) << 28));
}

static __device__ inline float code_at(const Parameters& p, const u8* codes, u32 row, u32 column) {
    const u32 byte = byte_at(codes, p.first_code + row * p.row_bytes + column * p.bits / 8u);
    if (p.bits == 4u) {
        return e2m1((byte >> column * p.bits % 8u) & 15u);
    }
    return e4m3(byte);
}

extern "C" __global__ void __launch_bounds__(256) dequantize_floats(
    const u8* __restrict__ codes,
    const u8* __restrict__ scales,
    float* __restrict__ out,
    Parameters p
) {
    const u32 i = group_index() * 256u + threadIdx.x;
    if (i < p.count) {
        const u32 row = source_row(p.first_row + i / p.columns, p.head_rows);
        const u32 column = i % p.columns;
        const u32 block = (p.block_row + row) / p.block_rows * p.blocks + column / p.block_columns;
        const float value = code_at(p, codes, row, column) * scale_at(scales, p.scale_type, p.first_scale, block);
        out[i] = p.divides == 1u ? value / p.second_scale : value * p.second_scale;
    }
}
