// Statistics of logits that exist already, and their gradient. The arithmetic stands in online.cuh.
//
// Rows begin anywhere in memory (V may be odd), and loads of 16 bytes at multiples of 16 only. The forward
// gives columns to threads by their number and not by their address, so that the sums of a row have the same
// order, and the same bits, wherever it lies: where the two disagree a thread loads both vectors that its own
// lies in, the second from the L1 cache, and shifts. The backward sums nothing, so it follows the addresses
// that it writes.

#include <cstring>

#include "online.cuh"
#include "reduce.cuh"

namespace fused_align {
namespace {

/// Vectors that a thread has in flight. Of float64 two: its powers of two want registers.
template <typename T>
constexpr int VECTORS = sizeof(T) == 8 ? 2 : 4;

/// 16 bytes as elements.
template <typename T>
struct alignas(16) Elements {
    T x[EACH<T>];
};

// ---- a row, in vectors -----------------------------------------------------------------------------------

HOST_DEVICE int beyond_16(const void* address) {
    return static_cast<int>(reinterpret_cast<uintptr_t>(address) % 16);
}

HOST_DEVICE uint32_t funnel(uint32_t low, uint32_t high, int bits) {
#ifdef __CUDA_ARCH__
    return __funnelshift_r(low, high, bits);
#else
    return static_cast<uint32_t>(((static_cast<uint64_t>(high) << 32) | low) >> bits);
#endif
}

/// 16 bytes in registers. Not as elements: those of 16 bits would each take a register across a branch.
struct Words {
    uint32_t w[4];
};

template <typename T>
HOST_DEVICE Words words(Elements<T> v) {
    Words out;
    memcpy(&out, &v, 16);
    return out;
}

/// 16 of the 32 bytes of both, from byte `shift` on, a multiple of the size of an element.
template <int SIZE>
HOST_DEVICE Words shifted(Words low, Words high, int shift) {
    uint32_t w[8];
#pragma unroll
    for (int i = 0; i < 4; ++i) w[i] = low.w[i], w[i + 4] = high.w[i];
#pragma unroll
    for (int i = 0; i < 6; ++i) w[i] = shift & 8 ? w[i + 2] : w[i];
    if constexpr (SIZE <= 4) {
#pragma unroll
        for (int i = 0; i < 5; ++i) w[i] = shift & 4 ? w[i + 1] : w[i];
    }
    if constexpr (SIZE <= 2) {
#pragma unroll
        for (int i = 0; i < 4; ++i) w[i] = funnel(w[i], w[i + 1], (shift & 2) * 8);
    }
    return {{w[0], w[1], w[2], w[3]}};
}

/// Row of logits, of which a thread takes vectors at columns `step` apart.
template <typename T>
struct Row {
    static constexpr int EACH = fused_align::EACH<T>, COUNT = VECTORS<T>;

    const T* at;
    int vocab;
    int shift;  // bytes by which a vector begins behind a multiple of 16

    /// Its vectors begin at columns first + EACH i.
    HOST_DEVICE Row(const T* at, int first, int vocab) : at(at), vocab(vocab), shift(beyond_16(at + first)) {}

    /// Whether aligned loads for the vectors from one column to another, inclusive, stay inside the row.
    HOST_DEVICE bool holds(int first, int last) const {
        const int before = shift / static_cast<int>(sizeof(T));
        return first >= before && last - before + (shift == 0 ? EACH : 2 * EACH) <= vocab;
    }

    HOST_DEVICE const Elements<T>* aligned(int column) const {
        return reinterpret_cast<const Elements<T>*>(reinterpret_cast<const char*>(at + column) - shift);
    }

    /// Those at first + step i, -inf from column `end` on.
    template <typename W>
    HOST_DEVICE void load(int first, int step, int end, W (&z)[COUNT][EACH]) const {
        const int last = first + (COUNT - 1) * step;
        Words v[COUNT];
        if (last + EACH <= end && holds(first, last)) {
#pragma unroll
            for (int i = 0; i < COUNT; ++i) v[i] = words(*aligned(first + i * step));
            if (shift != 0) {
                Words next[COUNT];
#pragma unroll
                for (int i = 0; i < COUNT; ++i) next[i] = words(aligned(first + i * step)[1]);
#pragma unroll
                for (int i = 0; i < COUNT; ++i) v[i] = shifted<sizeof(T)>(v[i], next[i], shift);
            }
        } else {
#pragma unroll
            for (int i = 0; i < COUNT; ++i) v[i] = at_edge(first + i * step, end);
        }
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            Elements<T> elements;
            memcpy(&elements, &v[i], 16);
#pragma unroll
            for (int k = 0; k < EACH; ++k) z[i][k] = widened<W>(elements.x[k]);
        }
    }

private:
    HOST_DEVICE Words at_edge(int column, int end) const {
        if (column + EACH <= end && holds(column, column)) {
            const Elements<T>* from = aligned(column);
            const Words v = words(from[0]);
            return shift == 0 ? v : shifted<sizeof(T)>(v, words(from[1]), shift);
        }
        Elements<T> v;
#pragma unroll
        for (int k = 0; k < EACH; ++k) v.x[k] = column + k < end ? at[column + k] : rounded<T>(-INFINITY);
        return words(v);
    }
};

/// How the columns of a row are divided. By V alone: a row's result does not depend on how many others there
/// are.
struct Division {
    int warps;  // of a team, which takes a row, or a part of one
    int parts;  // blocks that share a row
    int span;   // columns of a part, a multiple of what its block loads at once

    /// once: columns that a block loads at once.
    Division(const char* kernel, int64_t vocab, int64_t parts_wanted, int once) {
        if (vocab < 1 || vocab > (1 << 30))
            throw std::invalid_argument(std::string(kernel) + ": a row has 1 to 2^30 logits; got " +
                                        std::to_string(vocab) + ".");
        const int wanted = vocab <= 2048 ? 1 : vocab <= 4096 ? 2 : vocab <= 8192 ? 4 : THREADS / WARP;
        warps = parts_wanted > 1 ? THREADS / WARP : wanted;
        span = static_cast<int>(divided(divided(vocab, parts_wanted), once) * once);
        parts = static_cast<int>(parts_wanted);  // the last may be empty
    }

    int64_t blocks(int64_t rows) const { return divided(rows, THREADS / WARP / warps) * parts; }

    /// Row, part, and the thread's number in its team, which has warps * WARP.
    __device__ int64_t row() const {
        return static_cast<int64_t>(blockIdx.x / parts) * (THREADS / WARP / warps) +
               threadIdx.x / (warps * WARP);
    }
    __device__ int part() const { return blockIdx.x % parts; }
    __device__ int begin() const { return part() * span; }
    __device__ int end(int vocab) const { return vocab - begin() < span ? vocab : begin() + span; }
    __device__ int thread() const { return threadIdx.x % (warps * WARP); }
};

// ---- forward ---------------------------------------------------------------------------------------------

/// Over a team of warps, once in a kernel; the team's first thread gets the result.
template <bool ENTROPY, typename W>
__device__ __forceinline__ Online<W> merged_over_team(Online<W> seen, int warps, W scale) {
    __shared__ Online<W> of_warp[THREADS / WARP];
#pragma unroll
    for (int distance = WARP / 2; distance > 0; distance /= 2) {
        Online<W> other = {};
        other.best = __shfl_xor_sync(0xffffffffu, seen.best, distance);
        other.others = __shfl_xor_sync(0xffffffffu, seen.others, distance);
        if constexpr (ENTROPY) other.moment = __shfl_xor_sync(0xffffffffu, seen.moment, distance);
        seen = merged<ENTROPY>(seen, other, scale);
    }
    if (warps == 1) return seen;
    const int warp = threadIdx.x / WARP;
    if (threadIdx.x % WARP == 0) of_warp[warp] = seen;
    __syncthreads();
    if (threadIdx.x % (warps * WARP) == 0)
        for (int other = 1; other < warps; ++other)
            seen = merged<ENTROPY>(seen, of_warp[warp + other], scale);
    return seen;
}

/// Reads rows * vocab elements once, ignored rows not at all, and writes 4 or 5 numbers per row. Of 16-bit
/// logits a thread does some 8 instructions per element (10 with the entropy, 2 more where rows begin between
/// multiples of 16 bytes) and has 64 bytes in flight. At most 80 registers: 3 blocks, 768 threads and 48 KB
/// in flight per multiprocessor, where the latency of an H200's memory times its bandwidth asks for about 25.
template <typename T, bool ENTROPY>
__global__ void __launch_bounds__(THREADS, 3)
    stats_kernel(const T* __restrict__ logits,        // [rows, vocab]
                 const int64_t* __restrict__ target,  // [rows]
                 Array inverse,                       // [rows] | none, 1 / temperature
                 Work<T>* __restrict__ logp,          // [rows] out
                 Work<T>* __restrict__ lse,           // [rows] out
                 Work<T>* __restrict__ entropy,       // [rows] out
                 Work<T>* __restrict__ largest,       // [rows] out
                 Work<T>* __restrict__ total,         // [rows] out
                 Online<Work<T>>* partial,            // [rows, parts], where there is more than one
                 int* arrived,                        // [rows], 0
                 double scalar, Division by, int64_t rows, int vocab, int64_t stride) {
    using W = Work<T>;
    constexpr int EACH = fused_align::EACH<T>, COUNT = VECTORS<T>;
    const int64_t row = by.row();
    const int64_t y = row < rows ? target[row] : IGNORE_INDEX;
    const bool live = y != IGNORE_INDEX;
    const int own = live && y >= 0 && y < vocab ? static_cast<int>(y) : -1;
    const auto temperature = [&] {
        return live && inverse.data != nullptr ? element<double>(inverse, row) : scalar;
    };
    const W scale = static_cast<W>(temperature() * LOG2E);
    const T* from = logits + row * stride;

    Online<W> seen = nothing_seen<W>();
    if (live) {
        const Row<T> z_row(from, 0, vocab);
        const int step = by.warps * WARP * EACH;
        const int begin = by.begin(), end = by.end(vocab);
        for (int first = begin; first < end; first += COUNT * step) {
            const int mine = first + by.thread() * EACH;
            W z[COUNT][EACH];
            z_row.load(mine, step, end, z);
            if (own >= first && own < first + COUNT * step) {  // the target is apart
#pragma unroll
                for (int i = 0; i < COUNT; ++i)
#pragma unroll
                    for (int k = 0; k < EACH; ++k)
                        if (mine + i * step + k == own) z[i][k] = -INFINITY;
            }
            see<ENTROPY>(seen, z, scale);
        }
    }
    seen = merged_over_team<ENTROPY>(seen, by.warps, scale);

    if (by.parts > 1) {
        if (threadIdx.x == 0) partial[row * by.parts + by.part()] = seen;
        if (!is_last(arrived + row, by.parts)) return;
        seen = nothing_seen<W>();
        for (int part = 0; part < by.parts && threadIdx.x == 0; ++part) {
            const Online<W>* one = partial + row * by.parts + part;
            const W best = __ldcg(&one->best), others = __ldcg(&one->others), moment = __ldcg(&one->moment);
            seen = merged<ENTROPY>(seen, Online<W>{best, others, moment}, scale);
        }
    }
    if (by.thread() != 0 || row >= rows) return;
    RowStats<W> found = {};
    if (live) {
        const W z_y = own >= 0 ? widened<W>(from[own]) : -INFINITY;
        found = statistics(seen, own >= 0, z_y, temperature(), ENTROPY);
    }
    logp[row] = static_cast<W>(found.logp);
    lse[row] = static_cast<W>(found.lse);
    if constexpr (ENTROPY) entropy[row] = static_cast<W>(found.entropy);
    largest[row] = found.largest;
    total[row] = static_cast<W>(found.total);
}

// ---- backward --------------------------------------------------------------------------------------------

/// Reads rows with a coefficient once, others not at all, and writes all: 2 * rows * vocab elements moved. A
/// team's first thread finds the coefficients of its row in double. Of 16-bit logits 10 instructions per
/// element; at most 80 registers: 3 blocks, 768 threads and 48 KB in flight per multiprocessor.
template <typename T, bool ENTROPY>
__global__ void __launch_bounds__(THREADS, 3)
    gradient_kernel(Array dlogp, Array dlse, Array dentropy,  // [rows]; the last two | none
                    const T* logits,                          // [rows, vocab]
                    const int64_t* __restrict__ target,       // [rows]
                    const Work<T>* __restrict__ logp,         // [rows]
                    const Work<T>* __restrict__ entropy,      // [rows]
                    const Work<T>* __restrict__ largest,      // [rows]
                    const Work<T>* __restrict__ total,        // [rows]
                    Array inverse,                            // [rows] | none
                    T* out,                                   // [rows, vocab] out; may be logits
                    double scalar, Division by, int64_t rows, int vocab,
                    int64_t stride,  // of a row of logits
                    int64_t out_stride) {
    using W = Work<T>;
    constexpr int EACH = fused_align::EACH<T>, COUNT = VECTORS<T>;
    __shared__ RowSlope<W> slope_of[THREADS / WARP];
    __shared__ bool alive_of[THREADS / WARP];
    const int64_t row = by.row();
    const int threads = by.warps * WARP, team = threadIdx.x / threads, thread = by.thread();
    const int64_t y = row < rows ? target[row] : IGNORE_INDEX;
    if (thread == 0) {
        double c = 0, l = 0, h = 0;
        if (y != IGNORE_INDEX) {
            c = element<double>(dlogp, row);
            if (dlse.data != nullptr) l = element<double>(dlse, row);
            if constexpr (ENTROPY) h = element<double>(dentropy, row);
        }
        const bool alive = c != 0 || l != 0 || h != 0;
        if (alive) {
            const double temperature = inverse.data != nullptr ? element<double>(inverse, row) : scalar;
            double found = 0;
            if constexpr (ENTROPY) found = entropy[row];
            slope_of[team] = slopes<W>(c, l, h, logp[row], found, largest[row], total[row], temperature);
        }
        alive_of[team] = alive;
    }
    __syncthreads();
    if (row >= rows) return;
    const bool alive = alive_of[team];
    const RowSlope<W> slope = alive ? slope_of[team] : RowSlope<W>{};

    // whole vectors from the first multiple of 16 bytes on; what is before and behind them, one by one
    const int begin = by.begin(), end = by.end(vocab);
    if (begin >= end) return;
    const T* from = logits + row * stride;
    T* to = out + row * out_stride;
    const int aligned = begin + (16 - beyond_16(to + begin)) % 16 / static_cast<int>(sizeof(T));
    const int inner = aligned < end ? aligned : end, outer = end - (end - inner) % EACH;
    const int own = y >= 0 && y < vocab ? static_cast<int>(y) : -1;

    const int edge = begin + thread < inner ? begin + thread : outer + begin + thread - inner;
    if (edge < end) {
        const W other = alive ? gradient<ENTROPY>(widened<W>(from[edge]), slope) : W(0);
        to[edge] = rounded<T>(edge == own ? slope.own : other);
    }
    const Row<T> z_row(from, inner, vocab);
    const int step = threads * EACH;
    for (int first = inner + thread * EACH; first < outer; first += COUNT * step) {
        W z[COUNT][EACH] = {};
        if (alive) {
            z_row.load(first, step, outer, z);
#pragma unroll
            for (int i = 0; i < COUNT; ++i)
#pragma unroll
                for (int k = 0; k < EACH; ++k) z[i][k] = gradient<ENTROPY>(z[i][k], slope);
        }
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            Elements<T> v;
#pragma unroll
            for (int k = 0; k < EACH; ++k) v.x[k] = rounded<T>(z[i][k]);
            const int column = first + i * step;
            if (column < outer) *reinterpret_cast<Elements<T>*>(to + column) = v;
            if (own >= column && own < column + EACH && own < outer) to[own] = rounded<T>(slope.own);
        }
    }
}

}  // namespace

// ---- launches --------------------------------------------------------------------------------------------

void logit_stats(Device on, Array logits, Array target, Array inverse, Array logp, Array lse, Array entropy,
                 Array largest, Array total, Array partial, Array arrived, double scalar, int64_t rows,
                 int64_t vocab, int64_t stride, int64_t parts) {
    with_float("logit_stats", logits.type, [&](auto tag) {
        using T = TypeOf<decltype(tag)>;
        using W = Work<T>;
        const Division by("logit_stats", vocab, parts, THREADS * fused_align::EACH<T> * VECTORS<T>);
        const auto kernel = entropy.data != nullptr ? stats_kernel<T, true> : stats_kernel<T, false>;
        launch("logit_stats", on, by.blocks(rows), THREADS, kernel, as<T>(logits), as<int64_t>(target),
               inverse, as<W>(logp), as<W>(lse), as<W>(entropy), as<W>(largest), as<W>(total),
               reinterpret_cast<Online<W>*>(as<W>(partial)), as<int>(arrived), scalar, by, rows,
               static_cast<int>(vocab), stride);
    });
}

void logit_gradient(Device on, Array dlogp, Array dlse, Array dentropy, Array logits, Array target,
                    Array logp, Array entropy, Array largest, Array total, Array inverse, Array out,
                    double scalar, int64_t rows, int64_t vocab, int64_t stride, int64_t out_stride,
                    int64_t parts) {
    with_float("logit_gradient", logits.type, [&](auto tag) {
        using T = TypeOf<decltype(tag)>;
        using W = Work<T>;
        const Division by("logit_gradient", vocab, parts, THREADS * fused_align::EACH<T> * VECTORS<T>);
        const auto kernel = dentropy.data != nullptr ? gradient_kernel<T, true> : gradient_kernel<T, false>;
        launch("logit_gradient", on, by.blocks(rows), THREADS, kernel, dlogp, dlse, dentropy, as<T>(logits),
               as<int64_t>(target), as<W>(logp), as<W>(entropy), as<W>(largest), as<W>(total), inverse,
               as<T>(out), scalar, by, rows, static_cast<int>(vocab), stride, out_stride);
    });
}

}  // namespace fused_align
