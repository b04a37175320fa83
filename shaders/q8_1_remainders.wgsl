// What Q8_1 has beside Q8_0: `out[block] = F16(D sum) - d sum` with the sum of a block's codes, D its largest magnitude over
// 127 and d the nearest F16 of D. Runtimes multiply minima of weights with the former, rounded inputs add up to the latter.
// One thread per block of 32, of `blocks`.
// Source: ggml `quantize_row_q8_1` (x86). Twins: q8_1_remainders.cu, `block_q8_1_sum` in src/backend/activation/mod.rs.

struct Parameters {
    blocks: u32,
}

@group(0) @binding(0) var<storage, read> input: array<f32>;
@group(0) @binding(1) var<storage, read_write> out: array<f32>;
@group(0) @binding(2) var<uniform> p: Parameters;

@compute @workgroup_size(64)
fn q8_1_remainders(
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
    // Whole numbers up to 32 * 127: exact.
    var sum = 0.0;
    for (var i = first; i < first + 32u; i++) {
        sum += round(input[i] * inverse);
    }
    let scale = largest / 127.0;
    out[block] = round_to_f16(scale * sum) - round_to_f16(scale) * sum;
}
