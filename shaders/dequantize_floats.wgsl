// Rows of packed floats as values: `out[row, column] = code scale second_scale`, or through the second scale, in this order.
// FP8: bytes of F8_E4M3, a scale per tensor, row or block of both. NVFP4: E2M1, two in a byte, the first in its low half, a
// scale in F8_E4M3 per 16. One thread per value. Where a device takes subnormal numbers for zero, values below 2^-126 are
// lost; WGSL lets quotients be wrong in their last bits.
// Twins: dequantize_floats.cu, `PackedLinear::dequantize` in formats/src/packed/linear.rs.

struct Parameters {
    // Values to write.
    count: u32,
    columns: u32,
    // Of a code: 8 (F8_E4M3) or 4 (E2M1).
    bits: u32,
    // Where codes begin, and the step to the next row, in bytes.
    first_code: u32,
    row_bytes: u32,
    // Rows of the views that come before those to write, and rows of a head whose halves are to be interleaved.
    first_row: u32,
    head_rows: u32,
    // Rows and columns that share a scale.
    block_rows: u32,
    block_columns: u32,
    // Rows of the first block that come before the views.
    block_row: u32,
    // Scales from one row of blocks to the next.
    blocks: u32,
    // 0: BF16, 1: F16, 2: F32, 3: F8_E4M3.
    scale_type: u32,
    first_scale: u32,
    second_scale: f32,
    // 1 where the second scale divides.
    divides: u32,
}

@group(0) @binding(0) var<storage, read> codes: array<u32>;
@group(0) @binding(1) var<storage, read> scales: array<u32>;
@group(0) @binding(2) var<storage, read_write> out: array<f32>;
@group(0) @binding(3) var<uniform> p: Parameters;

// Of 4 bits: sign, exponent, half.
fn e2m1(code: u32) -> f32 {
    let magnitude = code & 7u;
    var bits = (magnitude << 22u) + (126u << 23u);
    if magnitude < 2u {
        bits = bitcast<u32>(f32(magnitude) * 0.5);
    }
    return bitcast<f32>(bits | ((code & 8u) << 28u));
}

fn code_at(row: u32, column: u32) -> f32 {
    let byte = p.first_code + row * p.row_bytes + column * p.bits / 8u;
    let digits = codes[byte >> 2u] >> ((byte & 3u) * 8u + column * p.bits % 8u);
    if p.bits == 4u {
        return e2m1(digits & 15u);
    }
    return e4m3(digits & 0xffu);
}

@compute @workgroup_size(256)
fn dequantize_floats(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let i = group_index(group, groups) * 256u + lane;
    if i < p.count {
        let row = source_row(p.first_row + i / p.columns, p.head_rows);
        let column = i % p.columns;
        let block = (p.block_row + row) / p.block_rows * p.blocks + column / p.block_columns;
        let value = code_at(row, column) * scale_at(p.scale_type, p.first_scale, block);
        if p.divides == 1u {
            out[i] = value / p.second_scale;
        } else {
            out[i] = value * p.second_scale;
        }
    }
}
