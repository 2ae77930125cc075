// How blocks of threads share out a tile of logits [r, v].

#pragma once

#include "reduce.cuh"

namespace fused_align {

/// A row is gone over by a team of `warps` warps; or it is cut into strips, with a whole block for each.
struct Share {
    int64_t rows;
    int cols, warps, strips;

    /// Teams of one warp for short rows, which then are several in a block, up to a whole block's warps.
    Share(int64_t rows, int64_t cols, int64_t strips = 1)
        : rows(rows), cols(static_cast<int>(cols)), warps(THREADS / WARP), strips(static_cast<int>(strips)) {
        if (cols > std::numeric_limits<int32_t>::max() - 64 * THREADS)  // so far a thread looks ahead
            throw std::invalid_argument("a tile has fewer than 2^31 columns; got " + std::to_string(cols) +
                                        ".");
        constexpr int64_t EACH_THREAD = 64;  // columns for which a thread is worth its while
        while (strips == 1 && warps > 1 && cols <= (warps / 2) * WARP * EACH_THREAD) warps /= 2;
    }

    int64_t blocks() const { return divided(rows, THREADS / WARP / warps) * strips; }
};

/// What this thread has to do with it.
struct Strip {
    int64_t row;
    int first, stop;    // columns; none where there is no such row: its threads come along to the barriers
    int number;         // among the strips of the row
    int lane, lanes;    // in the team
    bool here, leader;  // whether there is such a row; whether this thread writes what the team found

    __device__ explicit Strip(const Share& share) {
        const int team = threadIdx.x / (share.warps * WARP), teams = THREADS / WARP / share.warps;
        lanes = share.warps * WARP;
        lane = threadIdx.x % lanes;
        row = static_cast<int64_t>(blockIdx.x / share.strips) * teams + team;
        number = blockIdx.x % share.strips;
        // a multiple of every vector's elements, so that no two strips share a vector of a row that is
        // aligned
        const int width = ((share.cols + share.strips - 1) / share.strips + 15) / 16 * 16;
        here = row < share.rows;
        leader = here && lane == 0;
        first = min(number * width, share.cols);
        stop = here ? min(first + width, share.cols) : first;
    }

    /// body(column, x, low, high) for every 16 bytes of the row that begins at `from`: elements low to high
    /// of x are columns of the strip, element 0 stands at `column`. They are those between multiples of 16
    /// bytes, wherever the row begins. A thread has the next 64 bytes under way while it works.
    template <typename W, typename T, typename Body>
    __device__ __forceinline__ void for_vectors(const T* from, Body body) const {
        constexpr int AHEAD = 4;
        const int skew = static_cast<int>(reinterpret_cast<uintptr_t>(from) / sizeof(T) % EACH<T>);
        const int step = lanes * EACH<T>;
        int column = first - (first + skew) % EACH<T> + lane * EACH<T>;
        Vector<T> ahead[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; ++i)
            if (column + i * step < stop) ahead[i] = vector_at(from, column + i * step);
        while (true) {
#pragma unroll
            for (int i = 0; i < AHEAD; ++i, column += step) {
                if (column >= stop) return;
                W x[EACH<T>];
                ahead[i].widen(x);
                const int next = column + AHEAD * step;
                if (next < stop) ahead[i] = vector_at(from, next);
                body(column, x, max(first - column, 0), min(stop - column, EACH<T>));
            }
        }
    }

private:
    template <typename T>
    __device__ __forceinline__ Vector<T> vector_at(const T* from, int column) const {
        const int low = max(first - column, 0), high = min(stop - column, EACH<T>);
        return low == 0 && high == EACH<T> ? Vector<T>(from + column) : Vector<T>(from + column, low, high);
    }
};

/// Sets what lies outside of low to high to 0: a branch that few threads take, not a test of each element.
template <int COUNT, typename W>
__device__ __forceinline__ void only_inside(W (&x)[COUNT], int low, int high) {
    if (low == 0 && high == COUNT) return;
#pragma unroll
    for (int k = 0; k < COUNT; ++k)
        if (k < low || k >= high) x[k] = 0;
}

/// Sets element `at` to 0, if it is one of them.
template <int COUNT, typename W>
__device__ __forceinline__ void without(W (&x)[COUNT], int at) {
    if (static_cast<unsigned>(at) >= COUNT) return;
#pragma unroll
    for (int k = 0; k < COUNT; ++k)
        if (k == at) x[k] = 0;
}

/// Adds a vector's elements that stand at these columns. (No 16-byte loads: it is in the L1 cache, and may
/// begin anywhere.)
template <int COUNT, typename W>
__device__ __forceinline__ void add_columns(W (&x)[COUNT], const W* vector, int column, int low, int high) {
#pragma unroll
    for (int k = 0; k < COUNT; ++k)
        if (k >= low && k < high) x[k] += vector[column + k];
}

/// Writes elements low to high to `to`, where element 0 goes.
template <int COUNT, typename T, typename W>
__device__ __forceinline__ void write(T* to, const W (&x)[COUNT], int low, int high) {
    constexpr int BYTES = COUNT * sizeof(T);
    if (low == 0 && high == COUNT && reinterpret_cast<uintptr_t>(to) % (BYTES < 16 ? BYTES : 16) == 0) {
        store_together(to, x);
    } else {
#pragma unroll
        for (int k = 0; k < COUNT; ++k)
            if (k >= low && k < high) to[k] = rounded<T>(x[k]);
    }
}

}  // namespace fused_align
