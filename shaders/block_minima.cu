// The minima of blocks of Q4_1 and Q5_1, the second F16 of each: `out[block] = m`. One thread per block of `blocks`, which
// begin at `first_byte` and have `block_bytes`.
// Twins: block_minima.wgsl, formats/src/block/q4_1.rs and q5_1.rs.

struct Parameters {
    u32 blocks;
    u32 first_byte;
    u32 block_bytes;
};

extern "C" __global__ void __launch_bounds__(256) block_minima(
    const u8* __restrict__ bytes,
    float* __restrict__ out,
    Parameters p
) {
    const u32 block = group_index() * 256u + threadIdx.x;
    if (block < p.blocks) {
        out[block] = half_at(bytes, p.first_byte + block * p.block_bytes + 2u);
    }
}
