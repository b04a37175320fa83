// How many values have which magnitude, in bins of the upper bits of an f32.
//
// x: values, from first_value on, `part` of them per group. counts: 1024 bins, added to: the bits of a magnitude, shifted by
// `shift`, less `least`, but not below the first bin nor above the last. NaN and infinities are left out. One group per part.
// Twins: magnitude_counts.wgsl, src/backend/cpu/columns.rs.

struct Parameters {
    u32 count;
    u32 first_value;
    u32 part;
    u32 shift;
    u32 least;
};

extern "C" __global__ void __launch_bounds__(256) magnitude_counts(
    const u32* __restrict__ x,
    u32* __restrict__ counts,
    Parameters p
) {
    __shared__ u32 found[1024];
    const u32 lane = threadIdx.x;
    for (u32 bin = lane; bin < 1024u; bin += 256u) {
        found[bin] = 0u;
    }
    __syncthreads();
    const u32 end = min((group_index() + 1u) * p.part, p.count);
    for (u32 i = group_index() * p.part + lane; i < end; i += 256u) {
        const u32 bits = x[p.first_value + i] & 0x7fffffffu;
        if (bits < NOT_FINITE) {
            const u32 bin = bits >> p.shift;
            atomicAdd(&found[bin < p.least ? 0u : min(bin - p.least, 1023u)], 1u);
        }
    }
    __syncthreads();
    for (u32 bin = lane; bin < 1024u; bin += 256u) {
        if (found[bin] > 0u) {
            atomicAdd(&counts[bin], found[bin]);
        }
    }
}
