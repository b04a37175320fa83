// The minima of blocks of Q4_1 and Q5_1, the second F16 of each: `out[block] = m`. One thread per block of `blocks`, which
// begin at `first_byte` and have `block_bytes`.
// Twins: block_minima.cu, formats/src/block/q4_1.rs and q5_1.rs.

struct Parameters {
    blocks: u32,
    first_byte: u32,
    block_bytes: u32,
}

@group(0) @binding(1) var<storage, read_write> out: array<f32>;
@group(0) @binding(2) var<uniform> p: Parameters;

@compute @workgroup_size(256)
fn block_minima(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let block = group_index(group, groups) * 256u + lane;
    if block < p.blocks {
        out[block] = half_at(p.first_byte + block * p.block_bytes + 2u);
    }
}
