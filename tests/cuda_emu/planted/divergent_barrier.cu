// A defect: half of the threads wait for those that have returned.

struct Parameters {
    unsigned count;
};

extern "C" __global__ void divergent_barrier(float* out, Parameters p) {
    if (threadIdx.x >= p.count) {
        return;
    }
    __syncthreads();
    out[threadIdx.x] = 1.0f;
}
