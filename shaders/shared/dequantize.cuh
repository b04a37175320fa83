// One thread per value: `out[i] = value(bytes, first byte of its block, place in the block)`.

struct Parameters {
    // Values to write.
    u32 count;
    // Where the first block begins.
    u32 first_byte;
};

extern "C" __global__ void __launch_bounds__(256) KERNEL(
    const u8* __restrict__ bytes,
    float* __restrict__ out,
    Parameters p
) {
    const u32 i = group_index() * 256u + threadIdx.x;
    if (i < p.count) {
        out[i] = value(bytes, p.first_byte + i / ELEMENTS * BYTES, i % ELEMENTS);
    }
}
