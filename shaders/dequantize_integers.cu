// Rows of packed integers as values: `out[row, column] = (code - zero) scale`. One thread per value.
// Codes are consecutive digits of `bits` bits, from the lowest bits of a row's 32-bit words on: each `2^(bits - 1)` too
// large (`pack-quantized`, GPTQ), or signed bytes (`int-quantized`). Words of a row lie side by side, or one of every row
// does (GPTQ). Where a device takes subnormal numbers for zero, values below 2^-126 are lost.
// Twins: dequantize_integers.wgsl, `PackedLinear::dequantize` in formats/src/packed/linear.rs.

struct Parameters {
    // Values to write.
    u32 count;
    u32 columns;
    // Of a code: 4 or 8.
    u32 bits;
    // 128 where codes are signed bytes: their highest bit changed, they are 128 too large as well.
    u32 flip;
    // Where codes begin, and the steps to the next row and to the next 32 bits of a row, in bytes.
    u32 first_code;
    u32 row_bytes;
    u32 word_bytes;
    // Columns that share a scale.
    u32 group_columns;
    // Scales of a row, or 0 where all rows share one.
    u32 groups;
    // 0: BF16, 1: F16, 2: F32.
    u32 scale_type;
    u32 first_scale;
    // 0: none, 1: signed bytes in the order of scales, 2: words with the digits of consecutive rows.
    u32 zero_type;
    u32 first_zero;
    // Digits of the first word that belong to rows before.
    u32 first_digit;
    // Rows of the views that come before those to write, and rows of a head whose halves are to be interleaved.
    u32 first_row;
    u32 head_rows;
};

// Some bits, the first one counted from that of a byte.
static __device__ inline int digit(const Parameters& p, const u8* bytes, u32 byte, u32 bit) {
    const u32 digits = (bytes[byte + bit / 8u] >> bit % 8u) & ((1u << p.bits) - 1u);
    return (int)(digits ^ p.flip) - (int)(1u << (p.bits - 1u));
}

static __device__ inline int code_at(const Parameters& p, const u8* codes, u32 row, u32 column) {
    const u32 bit = column * p.bits;
    const u32 byte = p.first_code + row * p.row_bytes + bit / 32u * p.word_bytes + bit % 32u / 8u;
    return digit(p, codes, byte, bit % 8u);
}

static __device__ inline int zero_at(const Parameters& p, const u8* zeros, u32 row, u32 group) {
    if (p.zero_type == 0u) {
        return 0;
    }
    if (p.zero_type == 1u) {
        return digit(p, zeros, p.first_zero + row * p.groups + group, 0u);
    }
    const u32 place = p.first_digit + row;
    const u32 per_word = 32u / p.bits;
    const u32 byte = p.first_zero + (place / per_word * p.groups + group) * 4u;
    return digit(p, zeros, byte, place % per_word * p.bits);
}

extern "C" __global__ void __launch_bounds__(256) dequantize_integers(
    const u8* __restrict__ codes,
    const u8* __restrict__ scales,
    const u8* __restrict__ zeros,
    float* __restrict__ out,
    Parameters p
) {
    const u32 i = group_index() * 256u + threadIdx.x;
    if (i < p.count) {
        const u32 row = source_row(p.first_row + i / p.columns, p.head_rows);
        const u32 column = i % p.columns;
        const u32 group = column / p.group_columns;
        const int code = code_at(p, codes, row, column) - zero_at(p, zeros, row, group);
        out[i] = (float)code * scale_at(scales, p.scale_type, p.first_scale, row * p.groups + group);
    }
}
