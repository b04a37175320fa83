// Rows of packed integers as values: `out[row, column] = (code - zero) scale`. One thread per value.
// Codes are consecutive digits of `bits` bits, from the lowest bits of a row's 32-bit words on: each `2^(bits - 1)` too
// large (`pack-quantized`, GPTQ), or signed bytes (`int-quantized`). Words of a row lie side by side, or one of every row
// does (GPTQ). Where a device takes subnormal numbers for zero, values below 2^-126 are lost.
// Twins: dequantize_integers.cu, `PackedLinear::dequantize` in formats/src/packed/linear.rs.

struct Parameters {
    // Values to write.
    count: u32,
    columns: u32,
    // Of a code: 4 or 8.
    bits: u32,
    // 128 where codes are signed bytes: their highest bit changed, they are 128 too large as well.
    flip: u32,
    // Where codes begin, and the steps to the next row and to the next 32 bits of a row, in bytes.
    first_code: u32,
    row_bytes: u32,
    word_bytes: u32,
    // Columns that share a scale.
    group_columns: u32,
    // Scales of a row, or 0 where all rows share one.
    groups: u32,
    // 0: BF16, 1: F16, 2: F32.
    scale_type: u32,
    first_scale: u32,
    // 0: none, 1: signed bytes in the order of scales, 2: words with the digits of consecutive rows.
    zero_type: u32,
    first_zero: u32,
    // Digits of the first word that belong to rows before.
    first_digit: u32,
    // Rows of the views that come before those to write, and rows of a head whose halves are to be interleaved.
    first_row: u32,
    head_rows: u32,
}

@group(0) @binding(0) var<storage, read> codes: array<u32>;
@group(0) @binding(1) var<storage, read> scales: array<u32>;
@group(0) @binding(2) var<storage, read> zeros: array<u32>;
@group(0) @binding(3) var<storage, read_write> out: array<f32>;
@group(0) @binding(4) var<uniform> p: Parameters;

// Some bits of a word, the first one counted from that of a byte within it.
fn digit(word: u32, byte: u32, bit: u32) -> i32 {
    let digits = (word >> ((byte & 3u) * 8u + bit)) & ((1u << p.bits) - 1u);
    return i32(digits ^ p.flip) - i32(1u << (p.bits - 1u));
}

fn code_at(row: u32, column: u32) -> i32 {
    let bit = column * p.bits;
    let byte = p.first_code + row * p.row_bytes + bit / 32u * p.word_bytes + bit % 32u / 8u;
    return digit(codes[byte >> 2u], byte, bit % 8u);
}

fn zero_at(row: u32, group: u32) -> i32 {
    if p.zero_type == 0u {
        return 0;
    }
    if p.zero_type == 1u {
        let byte = p.first_zero + row * p.groups + group;
        return digit(zeros[byte >> 2u], byte, 0u);
    }
    let place = p.first_digit + row;
    let per_word = 32u / p.bits;
    let byte = p.first_zero + (place / per_word * p.groups + group) * 4u;
    return digit(zeros[byte >> 2u], byte, place % per_word * p.bits);
}

@compute @workgroup_size(256)
fn dequantize_integers(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let i = group_index(group, groups) * 256u + lane;
    if i < p.count {
        let row = source_row(p.first_row + i / p.columns, p.head_rows);
        let column = i % p.columns;
        let of_row = column / p.group_columns;
        let code = code_at(row, column) - zero_at(row, of_row);
        out[i] = f32(code) * scale_at(p.scale_type, p.first_scale, row * p.groups + of_row);
    }
}
