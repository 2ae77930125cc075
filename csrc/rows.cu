// Kernels over the rows of a chunk: their targets' logits, their statistics, their coefficients.

#include "reduce.cuh"
#include "rows.cuh"

namespace fused_align {

// ---- open_rows -----------------------------------------------------------------------------------------

namespace {

template <typename X, typename V>
struct OpenRows {
    Matrix<const X> x;       // [r, H]
    Matrix<const V> weight;  // [V, H]
    Array bias;              // [V] | null
    const int64_t* target;   // [r]
    Array inverse;           // [r], or [1] with a stride of 0
    int64_t inverse_stride;
    double logit_scale, softcap;
    bool cap;
    Type operand;  // the weight is rounded to this first
};

/// The targets' logits by gather and dot, and the references from them; see `torch_.open_rows`.
///
/// A warp per row, eight rows in a block; reads two rows of H elements for each. At most 64 registers: 4
/// blocks of 256 threads.
template <typename X, typename V, typename W>
__global__ void __launch_bounds__(THREADS) open_rows_kernel(const OpenRows<X, V> a,
                                                            W* z,      // [r] out, as the following
                                                            W* ref,    // [r]
                                                            W* slope,  // [r] | null
                                                            int64_t rows, int64_t hidden) {
    const int64_t row = row_of_warp();
    if (row >= rows) return;
    const int64_t y = a.target[row];
    W sum = 0;
    for_pieces_of(hidden, [&](int64_t column, int count) {
        W one[PIECE], other[PIECE], dot = 0;
        a.x.load(row, column, count, one);
        a.weight.load(y, column, count, other);
        round_to(a.operand, other);
#pragma unroll
        for (int k = 0; k < PIECE; ++k) dot += one[k] * other[k];
        sum += dot;
    });
    sum = over_warp(sum, Add());
    if (threadIdx.x % WARP != 0) return;
    if (a.bias.data) sum += element<W>(a.bias, y);
    const HeadLogit found =
        head_logit(sum, a.logit_scale, a.softcap, a.cap, element<double>(a.inverse, row * a.inverse_stride));
    const W logit = static_cast<W>(found.z);
    z[row] = logit;
    ref[row] = static_cast<W>(reference(logit));
    if (slope) slope[row] = static_cast<W>(found.slope);
}

}  // namespace

void open_rows(Device on, Array x, Array weight, Array bias, Array target, Array inverse, Array z, Array ref,
               Array slope, int64_t rows, int64_t hidden, int64_t x_stride, int64_t x_step,
               int64_t weight_stride, int64_t weight_step, int64_t inverse_stride, double logit_scale,
               std::optional<double> softcap, Type operand) {
    const auto with = [&](auto x_type, auto weight_type) {
        using X = TypeOf<decltype(x_type)>;
        using V = TypeOf<decltype(weight_type)>;
        using W = Work<X>;  // a float64 head's rows come in float64
        const OpenRows<X, V> a{Matrix<const X>(x, x_stride, x_step),
                               Matrix<const V>(weight, weight_stride, weight_step),
                               bias,
                               as<int64_t>(target),
                               inverse,
                               inverse_stride,
                               logit_scale,
                               softcap.value_or(0),
                               softcap.has_value(),
                               operand};
        launch("open_rows", on, blocks_of_rows(rows), THREADS, open_rows_kernel<X, V, W>, a, as<W>(z),
               as<W>(ref), as<W>(slope), rows, hidden);
    };
    with_float("open_rows", x.type,
               [&](auto a) { with_float("open_rows", weight.type, [&](auto b) { with(a, b); }); });
}

// ---- finish_rows ---------------------------------------------------------------------------------------

namespace {

constexpr int ROW_THREADS = 128;  // a thread per row: few rows, so that they spread

__device__ __forceinline__ int64_t row_of_thread() {
    return static_cast<int64_t>(blockIdx.x) * ROW_THREADS + threadIdx.x;
}

/// The statistics of rows, in the order of STATS; see `torch_.finish_rows`. A hundred bytes per row.
template <typename W>
__global__ void __launch_bounds__(ROW_THREADS) finish_rows_kernel(const W* z,             // [r]
                                                                  const W* ref,           // [r]
                                                                  const W* total,         // [r]
                                                                  const double* moment,   // [r] | null
                                                                  const double* pivot,    // [r] | null
                                                                  const double* average,  // [r] | null
                                                                  const double* squares,  // [r] | null
                                                                  W* out,                 // [5, r]
                                                                  int64_t rows) {
    const int64_t row = row_of_thread();
    if (row >= rows) return;
    const Finished found = finish(z[row], ref[row], total[row]);
    out[row] = static_cast<W>(found.logp);
    out[rows + row] = static_cast<W>(z[row] - found.logp);
    out[2 * rows + row] =
        moment ? static_cast<W>(entropy_of(found, total[row], moment[row], pivot[row])) : W(0);
    out[3 * rows + row] = average ? static_cast<W>(average[row]) : W(0);
    out[4 * rows + row] = squares ? static_cast<W>(collision_of(found, squares[row])) : W(0);
}

}  // namespace

void finish_rows(Device on, Array z, Array ref, Array total, Array moment, Array pivot, Array average,
                 Array squares, Array out, int64_t rows) {
    with_work("finish_rows", z.type, [&](auto w) {
        using W = TypeOf<decltype(w)>;
        launch("finish_rows", on, divided(rows, ROW_THREADS), ROW_THREADS, finish_rows_kernel<W>, as<W>(z),
               as<W>(ref), as<W>(total), as<double>(moment), as<double>(pivot), as<double>(average),
               as<double>(squares), as<W>(out), rows);
    });
}

// ---- coefficients --------------------------------------------------------------------------------------

namespace {

template <typename W>
struct CoefficientRows {
    const W *z, *ref, *total, *factor;              // [r]
    const W* slope;                                 // [r] | null
    Array by_logp;                                  // [r]
    Array by_lse, by_entropy, by_average, entropy;  // [r] | null
    W *after, *summed;        // [r] out: the reference where it is steep moves near the lse; S against that
    W *on_rows, *on_target;   // [r] out
    W *constant, *mixing;     // [r] out | null
    W *on_average, *uniform;  // [r] out | null
    int* flags;               // [r] out
};

/// Upstream gradients of the statistics -> coefficients of dz; see `torch_.coefficients`. A hundred bytes per
/// row.
template <typename W>
__global__ void __launch_bounds__(ROW_THREADS)
    coefficients_kernel(const CoefficientRows<W> a, int64_t rows, double vocab) {
    const int64_t row = row_of_thread();
    if (row >= rows) return;
    const auto given = [&](const Array& column) { return column.data ? element<double>(column, row) : 0.0; };
    const UpstreamOf up{given(a.by_logp), given(a.by_lse), given(a.by_entropy), given(a.by_average),
                        given(a.entropy)};
    const double factor = a.factor[row], slope = a.slope ? a.slope[row] : 1;
    const CoefficientsOf found = coefficients_of(a.z[row], a.ref[row], a.total[row], factor, slope, up);
    a.after[row] = static_cast<W>(found.after);
    a.summed[row] = static_cast<W>(found.summed);
    a.on_rows[row] = static_cast<W>(a.constant ? factor : found.on_rows);
    a.on_target[row] = static_cast<W>(found.on_target);
    if (a.constant) {
        a.constant[row] = static_cast<W>(found.constant);
        a.mixing[row] = static_cast<W>(found.mixing);
    }
    if (a.on_average) a.on_average[row] = static_cast<W>(up.average * factor);
    if (a.uniform) a.uniform[row] = static_cast<W>(up.average / vocab);
    a.flags[row] = found.flags;
}

}  // namespace

void coefficients(Device on, Array z, Array ref, Array total, Array factor, Array slope, Array by_logp,
                  Array by_lse, Array by_entropy, Array by_average, Array entropy, Array after, Array summed,
                  Array on_rows, Array on_target, Array constant, Array mixing, Array on_average,
                  Array uniform, Array flags, int64_t rows, int64_t vocab) {
    with_work("coefficients", z.type, [&](auto w) {
        using W = TypeOf<decltype(w)>;
        const CoefficientRows<W> a{as<W>(z),          as<W>(ref),       as<W>(total),    as<W>(factor),
                                   as<W>(slope),      by_logp,          by_lse,          by_entropy,
                                   by_average,        entropy,          as<W>(after),    as<W>(summed),
                                   as<W>(on_rows),    as<W>(on_target), as<W>(constant), as<W>(mixing),
                                   as<W>(on_average), as<W>(uniform),   as<int>(flags)};
        launch("coefficients", on, divided(rows, ROW_THREADS), ROW_THREADS, coefficients_kernel<W>, a, rows,
               static_cast<double>(vocab));
    });
}

// ---- compact -------------------------------------------------------------------------------------------

namespace {

constexpr int COMPACT_THREADS = 1024, FLAGS = 4;  // flags that a thread takes at once

/// The places of the rows that are alive, in order, and the tallies of all flags.
///
/// One block, since a place depends on all rows before it: 4096 rows at a time. Moves 12 bytes per row.
__global__ void __launch_bounds__(COMPACT_THREADS)
    compact_kernel(const int* flags,  // [r]
                   int64_t* order,    // [r] out; behind the last anything
                   int64_t* counts,   // [3] out: alive; any lost; any moved
                   int64_t rows) {
    __shared__ int of_warp[COMPACT_THREADS / WARP];
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    int64_t found = 0;
    int seen = 0;
    for (int64_t first = 0; first < rows; first += COMPACT_THREADS * FLAGS) {
        const int64_t row = first + threadIdx.x * FLAGS;
        int mine[FLAGS], alive = 0;
#pragma unroll
        for (int k = 0; k < FLAGS; ++k) {
            mine[k] = row + k < rows ? flags[row + k] : 0;
            alive += mine[k] & ALIVE;
            seen |= mine[k];
        }
        int before = alive;  // in this warp, up to this thread
#pragma unroll
        for (int distance = 1; distance < WARP; distance *= 2) {
            const int other = __shfl_up_sync(0xffffffffu, before, distance);
            if (lane >= distance) before += other;
        }
        if (lane == WARP - 1) of_warp[warp] = before;
        __syncthreads();
        int all = 0;
        for (int other = 0; other < COMPACT_THREADS / WARP; ++other) {
            if (other < warp) before += of_warp[other];
            all += of_warp[other];
        }
        int64_t place = found + before - alive;
#pragma unroll
        for (int k = 0; k < FLAGS; ++k)
            if (mine[k] & ALIVE) order[place++] = row + k;
        found += all;
        __syncthreads();  // before the next rows' counts
    }
    const int lost = over_block(seen & LOST ? 1 : 0, Most()),
              moved = over_block(seen & MOVED ? 1 : 0, Most());
    if (threadIdx.x != 0) return;
    counts[0] = found;
    counts[1] = lost;
    counts[2] = moved;
}

}  // namespace

void compact(Device on, Array flags, Array order, Array counts, int64_t rows) {
    launch("compact", on, 1, COMPACT_THREADS, compact_kernel, as<int>(flags), as<int64_t>(order),
           as<int64_t>(counts), rows);
}

}  // namespace fused_align
