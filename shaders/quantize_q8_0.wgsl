// Inputs as blocks of Q8_0: codes of 8 bit, four in a word, and a scale per block of 32: an F16, written as F32. One thread
// per block of `blocks`. Codes and scales are those of round_activation with mode 2.
// Source: ggml `quantize_row_q8_0` (x86). Twins: quantize_q8_0.cu, src/backend/activation/mod.rs.

struct Parameters {
    blocks: u32,
}

@group(0) @binding(0) var<storage, read> input: array<f32>;
@group(0) @binding(1) var<storage, read_write> codes: array<u32>;
@group(0) @binding(2) var<storage, read_write> scales: array<f32>;
@group(0) @binding(3) var<uniform> p: Parameters;

@compute @workgroup_size(64)
fn quantize_q8_0(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let block = group_index(group, groups) * 64u + lane;
    if block >= p.blocks {
        return;
    }
    let first = block * 32u;
    // Of a NaN larger than every number.
    var largest_bits = 0u;
    for (var i = first; i < first + 32u; i++) {
        largest_bits = max(largest_bits, bitcast<u32>(input[i]) & 0x7fffffffu);
    }
    let largest = bitcast<f32>(largest_bits);
    var inverse = 0.0;
    if largest_bits != 0u {
        inverse = 127.0 / largest;
    }
    scales[block] = round_to_f16(largest / 127.0);
    for (var word = 0u; word < 8u; word++) {
        var packed = 0u;
        for (var at = 0u; at < 4u; at++) {
            let code = i32(round(input[first + 4u * word + at] * inverse));
            packed |= (bitcast<u32>(code) & 0xffu) << (8u * at);
        }
        codes[block * 8u + word] = packed;
    }
}
