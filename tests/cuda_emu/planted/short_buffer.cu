// A defect: writes one value too many.

struct Parameters {
    unsigned count;
};

extern "C" __global__ void short_buffer(float* out, Parameters p) {
    if (threadIdx.x <= p.count) {
        out[threadIdx.x] = 1.0f;
    }
}
