// Groups are spread over two dimensions; kernels count them in one.

typedef unsigned int u32;
typedef unsigned char u8;

static __device__ inline u32 group_index() { return blockIdx.x + blockIdx.y * gridDim.x; }
