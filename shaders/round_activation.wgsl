// Inputs of a matrix product as a runtime sees them. One thread per block of `block` of `count` values.
//
// mode 0: rounded to BF16; 1: to F16; 2: 8 bit, scale in F16 (Q8_0); 3: 8 bit, the largest magnitude at -127 (Q8_K);
// 4: 8 bit with the block's largest magnitude over 127; 5: 8 bit with `scale`; 6: F8_E4M3 with the block's largest magnitude
// over 448; 7: F8_E4M3 with `scale`; 8: E2M1, the block's largest magnitude over 6 an F8_E4M3 in units of `scale` (NVFP4).
// Twins: round_activation.cu, src/backend/activation/mod.rs.

struct Parameters {
    count: u32,
    block: u32,
    mode: u32,
    scale: f32,
}

@group(0) @binding(0) var<storage, read> input: array<f32>;
@group(0) @binding(1) var<storage, read_write> out: array<f32>;
@group(0) @binding(2) var<uniform> p: Parameters;

// Of a NaN larger than every number.
fn magnitude(x: f32) -> u32 {
    return bitcast<u32>(x) & 0x7fffffffu;
}

// The nearest F8_E4M3, ties to even, 448 at most. A NaN stays one.
fn round_to_e4m3(value: f32) -> f32 {
    if is_nan(value) {
        return value;
    }
    let x = clamp(value, -448.0, 448.0);
    if abs(x) < 0.015625 {
        return round(x * 512.0) / 512.0;
    }
    let bits = bitcast<u32>(x);
    return bitcast<f32>((bits + 0x7ffffu + ((bits >> 20u) & 1u)) & 0xfff00000u);
}

// The nearest E2M1, ties to even mantissas, 6 at most.
fn round_to_e2m1(x: f32) -> f32 {
    let size = abs(x);
    let steps = select(select(0.5, 1.0, size < 4.0), 2.0, size < 2.0);
    return clamp(round(x * steps) / steps, -6.0, 6.0);
}

// A NaN stays one.
fn round_to_code(x: f32, mode: u32) -> f32 {
    if is_nan(x) {
        return x;
    }
    if mode == 8u {
        return round_to_e2m1(x);
    }
    if mode >= 6u {
        return round_to_e4m3(x);
    }
    let code = round(x);
    return select(code, clamp(code, -128.0, 127.0), mode >= 4u);
}

@compute @workgroup_size(64)
fn round_activation(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let item = group_index(group, groups) * 64u + lane;
    let first = item * p.block;
    if first >= p.count {
        return;
    }
    let end = min(first + p.block, p.count);
    if p.mode < 2u {
        for (var i = first; i < end; i++) {
            if p.mode == 0u {
                out[i] = round_to_bf16(input[i]);
            } else {
                out[i] = round_to_f16(input[i]);
            }
        }
        return;
    }
    var extreme = 0.0;
    for (var i = first; i < end; i++) {
        if magnitude(input[i]) > magnitude(extreme) {
            extreme = input[i];
        }
    }
    let largest = bitcast<f32>(magnitude(extreme));
    var step = p.scale;
    var inverse = 1.0 / p.scale;
    if p.mode == 2u {
        step = round_to_f16(largest / 127.0);
        inverse = 127.0 / largest;
    } else if p.mode == 3u {
        inverse = -127.0 / extreme;
        step = 1.0 / inverse;
    } else if p.mode == 4u {
        step = largest / 127.0;
        inverse = 1.0 / step;
    } else if p.mode == 6u {
        step = largest / 448.0;
        inverse = 1.0 / step;
    } else if p.mode == 8u {
        step = round_to_e4m3(largest / 6.0 / p.scale) * p.scale;
        inverse = 1.0 / step;
    }
    // Of zeros.
    if (p.mode < 5u && largest == 0.0) || (p.mode >= 4u && step == 0.0) {
        inverse = 0.0;
        step = 0.0;
    }
    for (var i = first; i < end; i++) {
        out[i] = round_to_code(input[i] * inverse, p.mode) * step;
    }
}
