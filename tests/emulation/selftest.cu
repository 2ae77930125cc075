// Kernels by which tests/test_emulation.py tries the emulation itself. Functions in C, for ctypes; each
// returns the code of an error, and last_error() gives its sentence.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

template <typename... Expected, typename... Given>
int launch(dim3 blocks, dim3 threads, void (*kernel)(Expected...), Given... given) {
    cudaLaunchConfig_t config = {};
    config.gridDim = blocks;
    config.blockDim = threads;
    return cudaLaunchKernelEx(&config, kernel, given...);
}

__device__ __forceinline__ float over_warp(float x) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(0xffffffffu, x, distance);
    return x;
}

// ---- sums of a block, with and without its barriers -----------------------------------------------------

template <bool BARRIER, typename T>
__global__ void __launch_bounds__(1024) sums(const T* x,  // [blocks, threads]
                                             T* out) {    // [blocks, threads]
    alignas(16) __shared__ T shared[1024];
    const int i = threadIdx.x, n = blockDim.x;
    const int64_t row = int64_t{blockIdx.x} * n;
    shared[i] = x[row + i];
    if (BARRIER) __syncthreads();
    T sum = 0;
    for (int k = 0; k < n; ++k) sum += shared[k];
    out[row + i] = sum;
}

// ---- a grid in three dimensions: who was here -----------------------------------------------------------

__global__ void places(int* counts /* [blocks, threads] */) {
    const int64_t block = (int64_t{blockIdx.z} * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    const int threads = blockDim.x * blockDim.y * blockDim.z;
    atomicAdd(&counts[block * threads + thread], 1);
}

// ---- shuffles -------------------------------------------------------------------------------------------

template <typename T>
__global__ void shuffles(const T* x /* [threads] */, T* out /* [7, threads] */) {
    const int i = threadIdx.x, n = blockDim.x;
    out[0 * n + i] = __shfl_sync(0xffffffffu, x[i], 5);
    out[1 * n + i] = __shfl_sync(0xffffffffu, x[i], i + 1, 8);
    out[2 * n + i] = __shfl_xor_sync(0xffffffffu, x[i], 3);
    out[3 * n + i] = __shfl_up_sync(0xffffffffu, x[i], 2);
    out[4 * n + i] = __shfl_down_sync(0xffffffffu, x[i], 2);
    out[5 * n + i] = __shfl_xor_sync(0xffffffffu, x[i], 16);
    __syncwarp();
    out[6 * n + i] = static_cast<T>(__popc(__ballot_sync(0xffffffffu, i % 3 == 0)));
}

/// Halves of a warp, each on its own, as often as its number says.
__global__ void halves(int* out /* [32] */) {
    const int lane = threadIdx.x, half = lane / 16;
    const unsigned mask = half == 0 ? 0xffffu : 0xffff0000u;
    int x = lane;
    for (int i = 0; i <= half; ++i) x += __shfl_xor_sync(mask, x, 1);
    __syncwarp();
    out[lane] = x;
}

// ---- last block -----------------------------------------------------------------------------------------

__global__ void total(const float* x /* [n] */, int n, float* parts /* [blocks] */, int* counter /* [1] */,
                      float* out /* [1] */) {
    __shared__ float of_warp[32];
    __shared__ bool last;
    const int i = blockIdx.x * blockDim.x + threadIdx.x, warps = blockDim.x / 32;
    const float sum = over_warp(i < n ? x[i] : 0.0f);
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        float whole = 0;
        for (int w = 0; w < warps; ++w) whole += of_warp[w];
        parts[blockIdx.x] = whole;
        __threadfence();
        last = atomicAdd(counter, 1) == static_cast<int>(gridDim.x) - 1;
    }
    __syncthreads();
    if (!last || threadIdx.x != 0) return;
    float all = 0;
    for (unsigned b = 0; b < gridDim.x; ++b) all += __ldcg(parts + b);
    *out = all;
}

// ---- what must be found ---------------------------------------------------------------------------------

enum Fault {
    NONE, ENDED, TWO_PLACES, HALF_A_WARP, TWO_SHUFFLES, NOT_NAMED, MIXED, MISALIGNED, MISALIGNED_LDCG,
    NULL_POINTER, INDEX, OVERFLOW_OF_INT
};

__global__ void fault(int which, const float* x /* [64] */, float* out /* [64] */) {
    __shared__ float shared[64];
    const unsigned all = 0xffffffffu;
    const int i = threadIdx.x;
    float y = x[i];
    if (which == ENDED) {
        if (i == 40) return;
        __syncthreads();
    } else if (which == TWO_PLACES) {
        if (i < 32) {
            __syncthreads();
        } else {
            __syncthreads();
        }
    } else if (which == HALF_A_WARP) {
        if (i % 32 < 16) y = over_warp(y);
    } else if (which == TWO_SHUFFLES) {
        if (i % 2 == 0) {
            y = __shfl_xor_sync(all, y, 1);
        } else {
            y = __shfl_xor_sync(all, y, 2);
        }
    } else if (which == NOT_NAMED) {
        y = __shfl_xor_sync(0xffffu, y, 1);
    } else if (which == MIXED) {
        if (i < 32) __syncthreads();
        if (i == 33) __syncwarp();
    } else if (which == MISALIGNED) {
        if (i < 8) y = reinterpret_cast<const float4*>(x + 1)[i].y;
    } else if (which == MISALIGNED_LDCG) {
        if (i == 9) y = __ldcg(reinterpret_cast<const float4*>(x + 1)).y;
    } else if (which == NULL_POINTER) {
        if (i == 63) y = *reinterpret_cast<const float*>(out - out);
    } else if (which == INDEX) {
        shared[i + static_cast<int>(y)] = 1;
        __syncthreads();
        y = shared[i];
    }
    if (which == OVERFLOW_OF_INT) y = static_cast<float>((i + 1) * (1 << 25));  // from i = 63 on
    out[i] = y;
}

__global__ void copy(const float* x, float* out, int count) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) out[i] = x[i];
}

__global__ void past_shared(float* out, int at) {
    __shared__ float first[48];
    first[threadIdx.x] = 1;
    __syncthreads();
    const float* plain = first;
    out[threadIdx.x] = plain[at];
}

__global__ void left_over(float* out) {
    __shared__ float kept[32];
    out[blockIdx.x * 32 + threadIdx.x] = kept[threadIdx.x];
    kept[threadIdx.x] = 1;
}

/// Two barriers, or none.
__global__ void barriers(int count, int* out /* [blocks] */) {
    int x = threadIdx.x;
    for (int i = 0; i < count; ++i) {
        __syncthreads();
        ++x;
    }
    if (threadIdx.x == 0) out[blockIdx.x] = x;
}

__global__ void butterflies(int count, float* out /* [threads] */) {
    float x = threadIdx.x;
    for (int i = 0; i < count; ++i) x = over_warp(x);
    out[threadIdx.x] = x;
}

}  // namespace

EXPORT const char* last_error() { return cudaGetErrorString(cudaGetLastError()); }

EXPORT int run_sums(bool barrier, int blocks, int threads, const float* x, float* out) {
    return launch(blocks, threads, barrier ? sums<true, float> : sums<false, float>, x, out);
}

EXPORT int run_places(const unsigned* dims /* [6] */, int* counts) {
    return launch(dim3(dims[0], dims[1], dims[2]), dim3(dims[3], dims[4], dims[5]), places, counts);
}

EXPORT int run_shuffles(int threads, const float* x, float* out) {
    return launch(1, threads, shuffles<float>, x, out);
}

EXPORT int run_shuffles_int64(int threads, const int64_t* x, int64_t* out) {
    return launch(1, threads, shuffles<int64_t>, x, out);
}

EXPORT int run_halves(int* out) { return launch(1, 32, halves, out); }

EXPORT int run_total(int blocks, int threads, const float* x, int n, float* parts, int* counter, float* out) {
    return launch(blocks, threads, total, x, n, parts, counter, out);
}

EXPORT int run_fault(int which, const float* x, float* out) { return launch(3, 64, fault, which, x, out); }

EXPORT int run_copy(int blocks, int threads, const float* x, float* out, int count) {
    return launch(blocks, threads, copy, x, out, count);
}

EXPORT int run_past_shared(float* out, int at) { return launch(1, 48, past_shared, out, at); }

EXPORT int run_left_over(float* out) { return launch(3, 32, left_over, out); }

EXPORT int run_barriers(int blocks, int threads, int count, int* out) {
    return launch(blocks, threads, barriers, count, out);
}

EXPORT int run_butterflies(int threads, int count, float* out) {
    return launch(1, threads, butterflies, count, out);
}

EXPORT void to_bf16(const float* x, uint16_t* out, int64_t count) {
    for (int64_t i = 0; i < count; ++i) out[i] = __bfloat16_as_ushort(__float2bfloat16_rn(x[i]));
}

EXPORT void to_half(const float* x, uint16_t* out, int64_t count) {
    for (int64_t i = 0; i < count; ++i) out[i] = __half_as_ushort(__float2half_rn(x[i]));
}

EXPORT void from_bf16(const uint16_t* x, float* out, int64_t count) {
    for (int64_t i = 0; i < count; ++i) out[i] = __bfloat162float(__ushort_as_bfloat16(x[i]));
}

EXPORT void from_half(const uint16_t* x, float* out, int64_t count) {
    for (int64_t i = 0; i < count; ++i) out[i] = __half2float(__ushort_as_half(x[i]));
}
