// What the fused loss kernels share: numbers in double, a sequence's tokens, and sums.
//
// A block walks over the tokens of its sequence or pair, in double: the sums keep their digits, and the
// arithmetic costs little beside the loads. It walks again where a coefficient depends on a sum over the
// item. Nothing of size [N] is written but the coefficients.
//
// Sequence s is row s of [S, width] where there are no offsets, else positions offsets[s] to offsets[s+1].
// Positions whose target is ignored are never loaded from a column: what stands there cannot matter. Without
// a target every position is live. Formulas, and where gradients stop, are those of fused_align/losses.

#pragma once

#include <initializer_list>

#include "maths.cuh"
#include "reduce.cuh"

namespace fused_align {

constexpr int LOSS_THREADS = 512;  // of a block; each may have 128 registers
constexpr int MOST_SUMS = 9;       // that a launch gives

// ---- numbers -------------------------------------------------------------------------------------------

template <typename T>
HOST_DEVICE T* data_of(const Array& a) {
    return static_cast<T*>(a.data);
}

HOST_DEVICE int64_t integer(const Array& a, int64_t i) {
    return a.type == Type::int32 ? data_of<const int32_t>(a)[i] : data_of<const int64_t>(a)[i];
}

/// Element i of a vector of any type.
HOST_DEVICE double number(const Array& a, int64_t i) {
    switch (a.type) {
        case Type::uint8:
            return data_of<const uint8_t>(a)[i];
        case Type::int32:
        case Type::int64:
            return static_cast<double>(integer(a, i));
        default:
            return element<double>(a, i);
    }
}

/// The same, rounded to the type of the log-probs, in which the losses take every column.
HOST_DEVICE double number_in(Type type, const Array& a, int64_t i) {
    return rounded_to(type, number(a, i));
}

// ---- tokens --------------------------------------------------------------------------------------------

/// The first position of a sequence and the one past its last.
struct Span {
    int64_t begin, end;
    HOST_DEVICE int64_t size() const { return end - begin; }
};

HOST_DEVICE Span span_of(const Array& offsets, int64_t width, int64_t s) {
    if (offsets.data) return {integer(offsets, s), integer(offsets, s + 1)};
    return {s * width, (s + 1) * width};
}

/// A log-ratio clipped by Humanline; whether it has a gradient; whether it is strictly inside the bounds.
struct Clipped {
    double value;
    bool passes, inside;
};
HOST_DEVICE Clipped clip(double log_ratio, double low, double high, bool humanline) {
    if (!humanline) return {log_ratio, true, true};
    return {clamped(log_ratio, low, high), log_ratio >= low && log_ratio <= high,
            log_ratio > low && log_ratio < high};
}

/// Columns are loaded well before they are used, so they wait as they are where all are float32.
template <bool SINGLE>
using Held = std::conditional_t<SINGLE, float, double>;

/// Tokens that a thread loads at once, so that their latencies overlap. Elsewhere each load has its branches.
template <bool SINGLE>
constexpr int STEP = SINGLE ? 4 : 1;

/// The next of a step's tokens comes to the front. Registers have no index, and the arithmetic of a token
/// written out for each of them would not fit the cache of instructions.
template <typename T, int COUNT>
HOST_DEVICE void shift(T (&x)[COUNT]) {
#pragma unroll
    for (int k = 0; k + 1 < COUNT; ++k) x[k] = x[k + 1];
}

/// The tokens of a step of a thread: `there` are in the sequence, `live` of these count.
template <bool SINGLE>
struct Places {
    int64_t at[STEP<SINGLE>];
    bool there[STEP<SINGLE>], live[STEP<SINGLE>];

    /// place(i) is the position of the i-th of `size` tokens; this thread has `first`, and every lanes-th
    /// after it.
    template <typename Place>
    __device__ __forceinline__ Places(const Array& target, int64_t first, int64_t lanes, int64_t size,
                                      Place place) {
        int64_t word[STEP<SINGLE>];  // all are on their way before one is looked at
#pragma unroll
        for (int k = 0; k < STEP<SINGLE>; ++k) {
            const int64_t i = first + k * lanes;
            there[k] = i < size;
            at[k] = place(i);
            word[k] = 0;  // without a target every position counts
            if (there[k] && target.data) word[k] = data_of<const int64_t>(target)[at[k]];
        }
#pragma unroll
        for (int k = 0; k < STEP<SINGLE>; ++k) live[k] = there[k] && word[k] != IGNORE_INDEX;
    }

    /// A column's numbers of the live tokens; 0 elsewhere, and where there is no column. `type`: of the
    /// log-probs, or Type::none for a column that is not rounded.
    __device__ __forceinline__ void load(const Array& column, Type type,
                                         Held<SINGLE> (&out)[STEP<SINGLE>]) const {
#pragma unroll
        for (int k = 0; k < STEP<SINGLE>; ++k) {
            out[k] = 0;
            if (!live[k] || !column.data) continue;
            if constexpr (SINGLE) {
                out[k] = data_of<const float>(column)[at[k]];
            } else {
                out[k] = number_in(type, column, at[k]);
            }
        }
    }

    /// The coefficient of the token in front; 0 where it does not count.
    __device__ __forceinline__ void store(const Array& c, double x) const {
        if (!there[0]) return;
        if (SINGLE || c.type == Type::float32) {
            data_of<float>(c)[at[0]] = static_cast<float>(live[0] ? x : 0.0);
        } else {
            data_of<double>(c)[at[0]] = live[0] ? x : 0.0;
        }
    }

    __device__ __forceinline__ void next() {
        shift(at);
        shift(there);
        shift(live);
    }
};

/// The threads that walk over the tokens of an item together, and which of them this is.
struct Team {
    int64_t lane, lanes;

    /// token(places, columns) for each of this thread's tokens, which then stands in front;
    /// columns_at(places) loads a step's.
    template <bool SINGLE, typename Place, typename ColumnsAt, typename Token>
    __device__ __forceinline__ void walk(const Array& target, int64_t size, Place place, ColumnsAt columns_at,
                                         Token token) const {
        for (int64_t first = lane; first < size; first += STEP<SINGLE> * lanes) {
            Places<SINGLE> places(target, first, lanes, size, place);
            auto columns = columns_at(places);
#pragma unroll 1
            for (int k = 0; k < STEP<SINGLE>; ++k, places.next(), columns.next()) token(places, columns);
        }
    }
};

// ---- sums ----------------------------------------------------------------------------------------------

using Scratch = double[MOST_SUMS][LOSS_THREADS];

/// What the first `count` of a thread's numbers add up to over the block, in a fixed order; each thread gets
/// all. Through shared memory, a warp per sum: shuffles of every warp for every sum would take longer.
template <int K>
__device__ __forceinline__ void sum_over_block(double (&x)[K], int count, Scratch& of_thread) {
    static_assert(K <= MOST_SUMS);
    __shared__ double of_block[K];
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int k = 0; k < K; ++k)
        if (k < count) of_thread[k][threadIdx.x] = x[k];
    __syncthreads();
    static_assert(K <= LOSS_THREADS / WARP);
    if (const int k = threadIdx.x / WARP; k < count) {
        double sum = 0;
#pragma unroll
        for (int i = 0; i < LOSS_THREADS; i += WARP) sum += of_thread[k][i + lane];
        sum = over_warp(sum, Add());
        if (lane == 0) of_block[k] = sum;
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < K; ++k)
        if (k < count) x[k] = of_block[k];
}

/// Where the sums of a launch go.
struct Results {
    Array divisor;   // [] double
    Array partials;  // [count, programs] double
    Array counter;   // [] int32, 0 before the launch
    Array sums;      // [count] double
    int64_t programs;
    int count;

    /// A program's own, by one thread.
    template <int K>
    __device__ __forceinline__ void write(const double (&own)[K]) const {
#pragma unroll
        for (int k = 0; k < K; ++k)
            if (k < count) data_of<double>(partials)[k * programs + blockIdx.x] = own[k];
    }

    /// The block that finishes last adds what all have written, in a fixed order: the same bits every time.
    __device__ __forceinline__ void add_up(Scratch& of_thread) const {
        if (!is_last(data_of<int>(counter), static_cast<int>(gridDim.x))) return;
        double total[MOST_SUMS] = {};
        for (int64_t program = threadIdx.x; program < programs; program += LOSS_THREADS) {
#pragma unroll
            for (int k = 0; k < MOST_SUMS; ++k)
                if (k < count) total[k] += __ldcg(data_of<double>(partials) + k * programs + program);
        }
        sum_over_block(total, count, of_thread);
#pragma unroll
        for (int k = 0; k < MOST_SUMS; ++k)
            if (k < count && threadIdx.x == 0) data_of<double>(sums)[k] = total[k];
    }
};

// ---- launches ------------------------------------------------------------------------------------------

/// Whether all columns that are there are float32, as they are in training: then their types are not looked
/// at.
inline bool all_single(std::initializer_list<Array> columns) {
    for (const Array& column : columns)
        if (column.data && column.type != Type::float32) return false;
    return true;
}

inline void check_loss(const char* kernel, const Array& logp, int count, bool metrics, int most) {
    if (logp.type != Type::float32 && logp.type != Type::float64)
        throw std::invalid_argument(std::string(kernel) + ": logp is float32 or float64; got " +
                                    name_of(logp.type) + ".");
    if (count != (metrics ? most : 1))
        throw std::invalid_argument(std::string(kernel) + ": K, the number of sums, is " +
                                    std::to_string(most) + " with METRICS and 1 without; got " +
                                    std::to_string(count) + ".");
}

}  // namespace fused_align
