// The part of CUDA's runtime that csrc/ uses, for a CPU: g++ -I tests/emulation. Blocks run one after the
// other, the threads of a block in turns (emulation.cpp). What is not here, kernels may not use.

#pragma once

#include <climits>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#include "emulation.h"

// ---- words of the language ------------------------------------------------------------------------------

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __grid_constant__

// shared.ld gathers the variables of functions in .cu files, which are these: keep no other static ones
// there, because emulation.cpp fills them with 0xff before a block. (An attribute could not mark them: g++
// drops it in templates.)
#define __shared__ static

// ---- vectors --------------------------------------------------------------------------------------------

#define EMULATION_VECTORS(T, name, align2, align4)                                                   \
    struct alignas(align2) name##2 { T x, y; };                                                      \
    struct name##3 { T x, y, z; };                                                                   \
    struct alignas(align4) name##4 { T x, y, z, w; };                                                \
    constexpr name##2 make_##name##2(T x, T y) { return {x, y}; }                                    \
    constexpr name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }                            \
    constexpr name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }

EMULATION_VECTORS(int, int, 8, 16)
EMULATION_VECTORS(unsigned, uint, 8, 16)
EMULATION_VECTORS(float, float, 8, 16)
EMULATION_VECTORS(unsigned short, ushort, 4, 8)
#undef EMULATION_VECTORS

struct alignas(16) double2 { double x, y; };
constexpr double2 make_double2(double x, double y) { return {x, y}; }

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

// ---- threads together -----------------------------------------------------------------------------------

#define EMULATION_HERE \
    const char *file = __builtin_FILE(), const char *function = __builtin_FUNCTION(), \
    int line = __builtin_LINE()

namespace emulation {

/// What memory holds may change while a thread waits.
inline void fence() { asm volatile("" ::: "memory"); }

template <typename T>
inline uint64_t bits_of(T x) {
    constexpr bool MOVES = std::is_trivially_copyable_v<T> && (sizeof(T) == 4 || sizeof(T) == 8);
    static_assert(MOVES, "shuffles move 4 or 8 bytes");
    uint64_t bits = 0;
    memcpy(&bits, &x, sizeof(T));
    return bits;
}

template <typename T>
inline T from_lane(unsigned mask, T x, int source, Place place) {
    const uint64_t bits = wait_for_lanes(Wait::shuffle, mask, bits_of(x), source, place);
    memcpy(&x, &bits, sizeof(T));
    return x;
}

}  // namespace emulation

inline void __syncthreads(EMULATION_HERE) {
    emulation::fence();
    emulation::wait_for_block({file, function, line});
    emulation::fence();
}

inline void __syncwarp(unsigned mask = 0xffffffffu, EMULATION_HERE) {
    emulation::fence();
    emulation::wait_for_lanes(emulation::Wait::warp, mask, 0, 0, {file, function, line});
    emulation::fence();
}

template <typename T>
inline T __shfl_sync(unsigned mask, T x, int from, int width = 32, EMULATION_HERE) {
    const int first = emulation::lane() & -width;
    return emulation::from_lane(mask, x, first + (from & (width - 1)), {file, function, line});
}

template <typename T>
inline T __shfl_xor_sync(unsigned mask, T x, int bits, int width = 32, EMULATION_HERE) {
    const int lane = emulation::lane(), end = (lane & -width) + width, from = lane ^ bits;
    return emulation::from_lane(mask, x, from < end ? from : lane, {file, function, line});
}

template <typename T>
inline T __shfl_up_sync(unsigned mask, T x, unsigned distance, int width = 32, EMULATION_HERE) {
    const int lane = emulation::lane(), from = lane - static_cast<int>(distance);
    return emulation::from_lane(mask, x, from >= (lane & -width) ? from : lane, {file, function, line});
}

template <typename T>
inline T __shfl_down_sync(unsigned mask, T x, unsigned distance, int width = 32, EMULATION_HERE) {
    const int lane = emulation::lane(), end = (lane & -width) + width;
    const int from = lane + static_cast<int>(distance);
    return emulation::from_lane(mask, x, from < end ? from : lane, {file, function, line});
}

inline unsigned __ballot_sync(unsigned mask, int x, EMULATION_HERE) {
    return static_cast<unsigned>(
        emulation::wait_for_lanes(emulation::Wait::ballot, mask, x != 0, 0, {file, function, line}));
}

// ---- small functions ------------------------------------------------------------------------------------

/// Of two numbers of one type. A NaN is passed over, as on a GPU.
template <typename T, typename = std::enable_if_t<std::is_arithmetic_v<T>>>
constexpr T min(T a, T b) { return b < a || a != a ? b : a; }

template <typename T, typename = std::enable_if_t<std::is_arithmetic_v<T>>>
constexpr T max(T a, T b) { return b > a || a != a ? b : a; }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }

// ---- memory ---------------------------------------------------------------------------------------------

inline void __threadfence() { emulation::fence(); }

template <typename T>
inline T atomicAdd(T* to, std::common_type_t<T> x) {
    static_assert(std::is_integral_v<T>, "sums of floats by atomics depend on the order of the threads");
    const T before = *to;
    using Wrapping = std::make_unsigned_t<T>;
    *to = static_cast<T>(static_cast<Wrapping>(before) + static_cast<Wrapping>(x));
    return before;
}

namespace emulation {

template <typename T>
inline void aligned(const T* address, Place place) {
    if (reinterpret_cast<uintptr_t>(address) % alignof(T) != 0) stray(address, "which is not aligned", place);
}

}  // namespace emulation

template <typename T>
inline T __ldcg(const T* from, EMULATION_HERE) {
    emulation::aligned(from, {file, function, line});
    return *from;
}

template <typename T>
inline T __ldcs(const T* from, EMULATION_HERE) {
    emulation::aligned(from, {file, function, line});
    return *from;
}

template <typename T>
inline T __ldg(const T* from, EMULATION_HERE) {
    emulation::aligned(from, {file, function, line});
    return *from;
}

template <typename T>
inline void __stcs(T* to, std::common_type_t<T> x, EMULATION_HERE) {
    emulation::aligned(to, {file, function, line});
    *to = x;
}

template <typename T>
inline void __stcg(T* to, std::common_type_t<T> x, EMULATION_HERE) {
    emulation::aligned(to, {file, function, line});
    *to = x;
}

#undef EMULATION_HERE

// ---- the host's side ------------------------------------------------------------------------------------

enum cudaError_t : int {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorInvalidDevice = 101,
    cudaErrorLaunchFailure = 719,
};

using cudaStream_t = struct CUstream_st*;

struct cudaLaunchAttribute;  // none is known here

struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
    cudaLaunchAttribute* attrs;
    unsigned numAttrs;
};

enum cudaDeviceAttr : int {
    cudaDevAttrMultiProcessorCount = 16,
    cudaDevAttrMaxThreadsPerMultiProcessor = 39,
    cudaDevAttrComputeCapabilityMajor = 75,
    cudaDevAttrComputeCapabilityMinor = 76,
};

namespace emulation {

inline cudaError_t last = cudaSuccess;

inline cudaError_t failed(cudaError_t code, const char* sentence) {
    refuse(sentence);
    return last = code;
}

}  // namespace emulation

/// Of the last launch that failed, the sentence that says what was wrong.
inline const char* cudaGetErrorString(cudaError_t code) {
    return code == cudaSuccess ? "no error" : emulation::error();
}

inline cudaError_t cudaPeekAtLastError() { return emulation::last; }
inline cudaError_t cudaGetLastError() { return std::exchange(emulation::last, cudaSuccess); }

inline cudaError_t cudaSetDevice(int device) {
    if (device == 0) return cudaSuccess;
    return emulation::failed(cudaErrorInvalidDevice, "the emulation has device 0 and no other");
}

inline cudaError_t cudaDriverGetVersion(int* version) {
    *version = 13000;
    return cudaSuccess;
}
inline cudaError_t cudaRuntimeGetVersion(int* version) { return cudaDriverGetVersion(version); }

inline cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}

inline cudaError_t cudaGetDeviceCount(int* count) {
    *count = 1;
    return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
    if (device != 0) return cudaSetDevice(device);
    switch (attribute) {
        case cudaDevAttrMultiProcessorCount: *value = 4; return cudaSuccess;
        case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; return cudaSuccess;
        case cudaDevAttrComputeCapabilityMajor: *value = 8; return cudaSuccess;
        case cudaDevAttrComputeCapabilityMinor: *value = 0; return cudaSuccess;
    }
    return emulation::failed(cudaErrorInvalidValue, "the emulation does not have this attribute of a device");
}

inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }

inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t = nullptr) {
    memset(to, value, bytes);
    return cudaSuccess;
}

template <typename... Expected, typename... Actual>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Expected...),
                               Actual&&... actual) {
    const dim3 grid = config->gridDim, block = config->blockDim;
    if (grid.x == 0 || grid.x > INT_MAX || grid.y == 0 || grid.y > 65535 || grid.z == 0 || grid.z > 65535)
        return emulation::failed(cudaErrorInvalidConfiguration,
                                 "a grid has 1 to 2^31 - 1 blocks in x and 1 to 65535 in y and in z");
    const uint64_t threads = uint64_t{block.x} * block.y * block.z;
    if (threads == 0 || threads > 1024 || block.x > 1024 || block.y > 1024 || block.z > 64)
        return emulation::failed(cudaErrorInvalidConfiguration,
                                 "a block has 1 to 1024 threads, at most 64 of them in z");
    if (config->dynamicSmemBytes != 0 || config->numAttrs != 0)
        return emulation::failed(cudaErrorInvalidValue,
                                 "the emulation has no dynamic shared memory and no attributes of launches");
    struct Call {
        void (*kernel)(Expected...);
        std::tuple<Expected...> arguments;
    } call{kernel, std::tuple<Expected...>(std::forward<Actual>(actual)...)};
    const auto run = [](void* call) {
        auto& [kernel, arguments] = *static_cast<Call*>(call);
        std::apply(kernel, arguments);
    };
    if (emulation::run_grid(grid, block, run, &call)) return cudaSuccess;
    return emulation::last = cudaErrorLaunchFailure;
}
