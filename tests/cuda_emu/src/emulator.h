// What a CUDA kernel finds around it, for a C++ compiler: one fiber per CUDA thread, one block at a time per OS thread.
//
// Not there: tensor cores, asynchronous copies, cooperative groups. Kernels that use them give a plain branch for when
// __CUDA_ARCH__ is not defined.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <utility>

struct dim3 {
    unsigned x, y, z;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};

struct alignas(16) double2 {
    double x, y;
};

struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

namespace emulator {

struct Thread {
    dim3 index;
    unsigned linear;
};

// Of the fiber that runs, its block and its launch.
extern thread_local Thread* current;
extern thread_local dim3 block_index, block_size, grid_size;

// Waits for all threads of the block.
void block_barrier();
// The same; says of how many threads `flag` is set.
int block_count(bool flag);
// Waits for the lanes in `mask`.
void warp_barrier(unsigned mask);
// What lane `source` of the warp gives.
uint64_t warp_exchange(unsigned mask, uint64_t value, int source);

// Where errors of a launch go.
struct Message {
    char* text;
    size_t bytes;
    // Keeps the first one.
    void set(const char* format, ...) __attribute__((format(printf, 2, 3)));
};

// A launch as the host describes it: pointers to arguments, as cuLaunchKernel takes them.
struct Request {
    dim3 grid;
    unsigned threads;
    // 0: ascending, 1: descending, more: with a stride.
    unsigned order;
    void** arguments;
    Message message;
};

// Runs every block; false with a message if one fails.
bool run(const Request& request, void (*body)(void*), void* argument);

template <class... A>
struct Call {
    void (*kernel)(A...);
    void** arguments;
};

template <class... A, size_t... I>
void invoke(Call<A...>& call, std::index_sequence<I...>) {
    call.kernel(*static_cast<std::remove_reference_t<A>*>(call.arguments[I])...);
}

// What a kernel takes: pointers, then a structure of so many bytes.
struct Shape {
    size_t views;
    size_t parameter_bytes;
};

template <class... A>
Shape shape(void (*)(A...)) {
    using Last = std::tuple_element_t<sizeof...(A) - 1, std::tuple<A...>>;
    return {sizeof...(A) - 1, sizeof(Last)};
}

template <class... A>
bool launch(void (*kernel)(A...), const Request& request) {
    Call<A...> call{kernel, request.arguments};
    auto body = [](void* call) { invoke(*static_cast<Call<A...>*>(call), std::index_sequence_for<A...>{}); };
    return run(request, body, &call);
}

inline unsigned lane() { return current->linear % 32; }

template <class T>
T exchange(unsigned mask, T value, int source) {
    static_assert(sizeof(T) <= 8, "shuffles move at most 8 bytes");
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof(T));
    bits = warp_exchange(mask, bits, source);
    std::memcpy(&value, &bits, sizeof(T));
    return value;
}

}  // namespace emulator

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ static thread_local
#define __constant__ static
#define threadIdx (emulator::current->index)
#define blockIdx (emulator::block_index)
#define blockDim (emulator::block_size)
#define gridDim (emulator::grid_size)
#define warpSize 32

using std::max;
using std::min;

inline void __syncthreads() { emulator::block_barrier(); }
inline int __syncthreads_count(int flag) { return emulator::block_count(flag != 0); }
inline void __syncwarp(unsigned mask = ~0u) { emulator::warp_barrier(mask); }

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
    const int first = emulator::lane() & ~(width - 1);
    return emulator::exchange(mask, value, first | (source & (width - 1)));
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    const int lane = emulator::lane(), source = lane + delta;
    return emulator::exchange(mask, value, source / width == lane / width ? source : lane);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    const int lane = emulator::lane(), source = lane - delta;
    return emulator::exchange(mask, value, source >= lane / width * width ? source : lane);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
    const int lane = emulator::lane(), source = lane ^ bits;
    return emulator::exchange(mask, value, source / width == lane / width ? source : lane);
}

inline float __uint_as_float(unsigned bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline unsigned __float_as_uint(float value) {
    unsigned bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

// Blocks on other OS threads make real atomics necessary.
inline unsigned atomicExch(unsigned* at, unsigned value) { return __atomic_exchange_n(at, value, __ATOMIC_SEQ_CST); }
inline unsigned atomicAdd(unsigned* at, unsigned value) { return __atomic_fetch_add(at, value, __ATOMIC_SEQ_CST); }
inline unsigned atomicMax(unsigned* at, unsigned value) {
    unsigned old = __atomic_load_n(at, __ATOMIC_SEQ_CST);
    while (old < value && !__atomic_compare_exchange_n(at, &old, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
    }
    return old;
}
inline float atomicAdd(float* at, float value) {
    unsigned* bits = reinterpret_cast<unsigned*>(at);
    unsigned old = __atomic_load_n(bits, __ATOMIC_SEQ_CST);
    while (!__atomic_compare_exchange_n(bits, &old, __float_as_uint(__uint_as_float(old) + value), false,
                                        __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
    }
    return __uint_as_float(old);
}

// The launcher of a kernel, for the host.
#define EMULATOR_EXPORT(symbol, kernel) \
    extern "C" emulator::Shape symbol##_shape() { return emulator::shape(&kernel); } \
    extern "C" bool symbol(const emulator::Request* request) { return emulator::launch(&kernel, *request); }
