// One thread per value: `out[i] = value(first byte of its block, place in the block)`.

struct Parameters {
    // Values to write.
    count: u32,
    // Where the first block begins.
    first_byte: u32,
}

@group(0) @binding(1) var<storage, read_write> out: array<f32>;
@group(0) @binding(2) var<uniform> p: Parameters;

@compute @workgroup_size(256)
fn KERNEL(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let i = group_index(group, groups) * 256u + lane;
    if i < p.count {
        out[i] = value(p.first_byte + i / ELEMENTS * BYTES, i % ELEMENTS);
    }
}
