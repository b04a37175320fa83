// A defect: reads what a neighbour may not have written yet.

struct Parameters {
    unsigned count;
};

extern "C" __global__ void missing_barrier(float* out, Parameters p) {
    __shared__ float values[64];
    values[threadIdx.x] = (float)(threadIdx.x + p.count * blockIdx.x);
    out[blockIdx.x * p.count + threadIdx.x] = values[(threadIdx.x + 1u) % p.count];
}
