// Rows of `width` values rounded to 16 bits, two in a word of `out`, filled up with zeros to rows of `row_words` words. One
// thread per word of `count`. mode 0: BF16; 1: F16.
// Twins: pack_halves.cu, src/backend/activation/mod.rs.

struct Parameters {
    count: u32,
    width: u32,
    row_words: u32,
    mode: u32,
}

@group(0) @binding(0) var<storage, read> input: array<f32>;
@group(0) @binding(1) var<storage, read_write> out: array<u32>;
@group(0) @binding(2) var<uniform> p: Parameters;

fn bf16_of(x: f32) -> u32 {
    let bits = bitcast<u32>(round_to_bf16(x)) >> 16u;
    // A NaN stays one, whatever bits it had.
    return select(bits, bits | 0x40u, (bitcast<u32>(x) & 0x7fffffffu) > NOT_FINITE);
}

fn pack(x: f32) -> u32 {
    if p.mode == 0u {
        return bf16_of(x);
    }
    return f16_bits(x);
}

@compute @workgroup_size(256)
fn pack_halves(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let i = group_index(group, groups) * 256u + lane;
    if i >= p.count {
        return;
    }
    let k = i % p.row_words * 2u;
    let first = i / p.row_words * p.width + k;
    var word = 0u;
    if k < p.width {
        word = pack(input[first]);
    }
    if k + 1u < p.width {
        word |= pack(input[first + 1u]) << 16u;
    }
    out[i] = word;
}
