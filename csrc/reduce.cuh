// Sums and maxima over threads, in an order that is always the same.

#pragma once

#include "device.cuh"

namespace fused_align {

struct Add {
    template <typename T>
    HOST_DEVICE T operator()(T a, T b) const {
        return a + b;
    }
};

struct Most {  // NaN is passed over
    template <typename T>
    HOST_DEVICE T operator()(T a, T b) const {
        return a > b || b != b ? a : b;
    }
};

/// Over the lanes of a warp, all of which take part; each lane gets the result, and the same bits.
template <typename T, typename Op>
__device__ __forceinline__ T over_warp(T x, Op op) {
#pragma unroll
    for (int distance = WARP / 2; distance > 0; distance /= 2)
        x = op(x, __shfl_xor_sync(0xffffffffu, x, distance));
    return x;
}

/// Over teams of `warps` neighbouring warps of a block; each thread gets its team's. All threads of the block
/// take part, and `warps` divides the number of warps in it.
template <typename T, typename Op>
__device__ __forceinline__ T over_team(T x, int warps, Op op) {
    __shared__ T of_warp[WARP];
    x = over_warp(x, op);
    if (warps == 1) return x;
    const int warp = threadIdx.x / WARP, first = warp / warps * warps;
    if (threadIdx.x % WARP == 0) of_warp[warp] = x;
    __syncthreads();
    x = of_warp[first];
    for (int other = 1; other < warps; ++other) x = op(x, of_warp[first + other]);
    __syncthreads();  // before another reduction writes there
    return x;
}

/// Over a block.
template <typename T, typename Op>
__device__ __forceinline__ T over_block(T x, Op op) {
    return over_team(x, blockDim.x / WARP, op);
}

/// Whether this block is the last of `blocks` to come here: it then sees what thread 0 of each wrote before.
/// Each block adds itself once to *counter, 0 before the launch. Read what they wrote by __ldcg: lines of the
/// L1 cache may be older.
__device__ __forceinline__ bool is_last(int* counter, int blocks) {
    __shared__ bool last;
    if (threadIdx.x == 0) {
        __threadfence();  // its writes before its block is counted
        last = atomicAdd(counter, 1) == blocks - 1;
        __threadfence();
    }
    __syncthreads();
    return last;
}

}  // namespace fused_align
