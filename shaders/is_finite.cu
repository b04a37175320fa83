// Sets found to 1 where a value is NaN or infinite. One thread per value.
// Twins: is_finite.wgsl, src/backend/cpu/elementwise.rs.

struct Parameters {
    u32 count;
};

extern "C" __global__ void __launch_bounds__(256) is_finite(
    const u32* __restrict__ values,
    u32* __restrict__ found,
    Parameters p
) {
    const u32 i = group_index() * 256u + threadIdx.x;
    if (i < p.count && (values[i] & NOT_FINITE) == NOT_FINITE) {
        // Plain stores of one value would do as well; this one says that several threads may meet.
        atomicExch(found, 1u);
    }
}
