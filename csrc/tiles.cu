// Kernels over one tile of logits [r, v]: one read of it, and one write where something is written.

#include "exponentials.cuh"
#include "tiles.cuh"

namespace fused_align {
namespace {

struct Nothing {};  // the type of a tile that is not written

// ---- exp_tile ------------------------------------------------------------------------------------------

template <typename L, typename O, typename W>
struct ExpTile {
    const L* logits;        // [r, v] raw
    O* out;                 // [r, v] E f | null; may be the logits
    W* product;             // [r, H] scaled down where a reference moves | null
    const W* bias;          // [v] | null
    const int64_t* target;  // [r]
    const W* gain;          // [r]
    const W* ref;           // [r]
    W* moved;               // [r] out: the reference after it | null: no watching
    W* total;               // [r] added to, as the following
    double* moment;         // [r] | null
    double* pivot;          // [r] | null
    double* squares;        // [r] | null
    double* average;        // [r] | null
    double* partials;       // [r, strips, 4] | null: one strip
    int* counters;          // [r], 0 before the launch
    int64_t start;          // the tile's first column in the vocabulary
    int64_t hidden, logits_stride, out_stride, product_stride;
    double vocab;
    W inner;
};

/// The sums of the row so far, in doubles; `pivot` is what the moment is measured from.
struct Before {
    double total, moment, pivot, squares;
};

/// Watching: a first read for the largest exponent of the row. Where it passes the ceiling the reference
/// moves there. The second read finds the row in a cache.
template <bool CAP, typename L, typename O, typename W>
__device__ __forceinline__ void watch(const ExpTile<L, O, W>& a, const Strip& at, int warps, ExpRow<W>& row,
                                      Before& sums) {
    W largest = static_cast<W>(-INFINITY);
    at.for_vectors<W>(a.logits + at.row * a.logits_stride, [&](int column, auto& x, int low, int high) {
        if (a.bias) add_columns(x, a.bias, column, low, high);
#pragma unroll
        for (int k = 0; k < EACH<L>; ++k)
            if (k >= low && k < high) largest = Most()(largest, exponent_of<CAP>(x[k], row).x);
    });
    const Moved by = moved_by(over_team(largest, warps, Most()));
    row.ref += static_cast<W>(by.jump);
    if (by.jump > 0) {
        sums.moment = (sums.moment + (0.0 - sums.pivot - by.jump) * sums.total) * by.down;
        sums.pivot = 0;
        sums.total *= by.down;
        sums.squares *= by.down * by.down;
        for (int64_t h = at.lane; a.product && at.here && h < a.hidden; h += at.lanes)
            a.product[at.row * a.product_stride + h] *= static_cast<W>(by.down);
    }
    if (at.leader) a.moved[at.row] = row.ref;
    if (at.leader && a.pivot) a.pivot[at.row] = sums.pivot;
}

/// 16 bytes of logits: their exponentials, added to the sums and written.
template <bool CAP, bool MORE, typename L, typename O, typename W>
__device__ __forceinline__ void exp_vector(const ExpTile<L, O, W>& a, int64_t r, int own,
                                           const ExpRow<W>& row, W pivot, int column, W (&x)[EACH<L>],
                                           int low, int high, RowSums<W>& sums) {
    W e[EACH<L>], slope[EACH<L>];
    if (a.bias) add_columns(x, a.bias, column, low, high);
    if constexpr (MORE) only_inside(x, low, high);
#pragma unroll
    for (int k = 0; k < EACH<L>; ++k) {
        const Exponent<W> found = exponent_of<CAP>(x[k], row);
        if constexpr (MORE) sums.logits += found.logit;  // the cap of 0 is 0
        slope[k] = found.slope;
        x[k] = found.x;
        e[k] = power_of_two(found.x);
    }
    only_inside(e, low, high);
    without(e, own - column);
    W total = 0;
#pragma unroll
    for (int k = 0; k < EACH<L>; k += 2) total += e[k] + e[k + 1];
    sums.total += total;
    if constexpr (MORE) {
#pragma unroll
        for (int k = 0; k < EACH<L>; ++k) {
            sums.moment += times(e[k], x[k] + pivot);
            if (a.squares) sums.squares += static_cast<double>(e[k]) * e[k];
        }
    }
    if constexpr (!std::is_same_v<O, Nothing>) {
        if constexpr (CAP) {
#pragma unroll
            for (int k = 0; k < EACH<L>; ++k) e[k] *= slope[k];
        }
        write(a.out + r * a.out_stride + column, e, low, high);
    }
}

/// The strips of a row: whoever is last adds what all found, in order. -> whether this is the last one.
__device__ __forceinline__ bool gather_strips(double* partials, int* counters, const Strip& at, int strips,
                                              double (&found)[4]) {
    double* mine = partials + at.row * strips * 4;
    if (at.leader) {
#pragma unroll
        for (int i = 0; i < 4; ++i) mine[at.number * 4 + i] = found[i];
    }
    if (!is_last(counters + at.row, strips)) return false;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        found[i] = 0;
        for (int strip = 0; strip < strips; ++strip) found[i] += __ldcg(mine + strip * 4 + i);
    }
    return true;
}

/// E of a tile and its sums; see `torch_.exp_tile`. MORE: sums besides the total.
///
/// Moves sizeof(L) bytes per logit, and sizeof(O) where E is written. At most 80 registers without further
/// sums and a cap: 3 blocks of 256 threads, 48 KiB on their way per multiprocessor; 112 with all of them, 2
/// blocks.
template <typename L, typename O, typename W, bool CAP, bool MORE>
__global__ void __launch_bounds__(THREADS, sizeof(W) == 8 ? 1
                                           : MORE         ? 2
                                                          : 3)
    exp_tile_kernel(const ExpTile<L, O, W> a, const Share share) {
    const Strip at(share);
    const int64_t r = at.here ? at.row : 0;
    const int64_t y = a.target[r] - a.start;
    const int own = y >= 0 && y < share.cols ? static_cast<int>(y) : -PIECE;
    ExpRow<W> row{a.gain[r], a.ref[r], a.inner};
    Before before{static_cast<double>(a.total[r]), a.moment ? a.moment[r] : 0, a.pivot ? a.pivot[r] : 0,
                  a.squares ? a.squares[r] : 0};
    if (a.moved) watch<CAP>(a, at, share.warps, row, before);

    RowSums<W> sums;
    const W pivot = static_cast<W>(before.pivot);
    at.for_vectors<W>(a.logits + r * a.logits_stride, [&](int column, auto& x, int low, int high) {
        exp_vector<CAP, MORE>(a, r, own, row, pivot, column, x, low, high, sums);
    });

    double found[4] = {static_cast<double>(over_team(sums.total, share.warps, Add()))};
    if constexpr (MORE) {
        found[1] = over_team(static_cast<double>(sums.moment), share.warps, Add());
        found[2] = over_team(sums.squares, share.warps, Add());
        found[3] = over_team(static_cast<double>(sums.logits), share.warps, Add()) * row.gain;
    }
    if (share.strips > 1 && !gather_strips(a.partials, a.counters, at, share.strips, found)) return;
    if (!at.leader) return;
    a.total[r] = static_cast<W>(before.total + found[0]);
    if constexpr (MORE) {
        if (a.moment) a.moment[r] = before.moment + found[1];
        if (a.squares) a.squares[r] = before.squares + found[2];
        if (a.average) a.average[r] += found[3] * LN2 / a.vocab;
    }
}

/// kernel(Tag<logits>, Tag<out>, Tag<sums>) by their types: those that a head's plans ask for.
template <typename Body>
void with_tiles(const char* kernel, Type logits, Type out, Body body) {
    if (logits == Type::float64 && out == Type::none)
        return body(Tag<double>{}, Tag<Nothing>{}, Tag<double>{});
    if (logits == Type::float64 && out == Type::float64)
        return body(Tag<double>{}, Tag<double>{}, Tag<double>{});
    if (logits == Type::float32 && out == Type::none) return body(Tag<float>{}, Tag<Nothing>{}, Tag<float>{});
    if (logits == Type::float32 && out == Type::float32)
        return body(Tag<float>{}, Tag<float>{}, Tag<float>{});
    if (logits == Type::float32 && out == Type::bfloat16)
        return body(Tag<float>{}, Tag<bfloat16>{}, Tag<float>{});
    if (logits == Type::bfloat16 && out == Type::none)
        return body(Tag<bfloat16>{}, Tag<Nothing>{}, Tag<float>{});
    if (logits == Type::bfloat16 && out == Type::bfloat16)
        return body(Tag<bfloat16>{}, Tag<bfloat16>{}, Tag<float>{});
    throw std::invalid_argument(std::string(kernel) + ": no variant takes logits of " + name_of(logits) +
                                " and writes " + name_of(out) + ".");
}

}  // namespace

void exp_tile(Device on, Array logits, Array out, Array product, Array bias, Array target, Array gain,
              Array ref, Array moved, Array total, Array moment, Array pivot, Array squares, Array average,
              int64_t rows, int64_t cols, int64_t start, int64_t hidden, int64_t vocab, int64_t logits_stride,
              int64_t out_stride, int64_t product_stride, std::optional<double> inner, Array partials,
              Array counters, int64_t strips) {
    const Share share(rows, cols, strips);
    with_tiles("exp_tile", logits.type, out.type, [&](auto l, auto o, auto w) {
        using L = TypeOf<decltype(l)>;
        using O = TypeOf<decltype(o)>;
        using W = TypeOf<decltype(w)>;
        const ExpTile<L, O, W> a{as<L>(logits),
                                 as<O>(out),
                                 as<W>(product),
                                 as<W>(bias),
                                 as<int64_t>(target),
                                 as<W>(gain),
                                 as<W>(ref),
                                 as<W>(moved),
                                 as<W>(total),
                                 as<double>(moment),
                                 as<double>(pivot),
                                 as<double>(squares),
                                 as<double>(average),
                                 as<double>(partials),
                                 as<int>(counters),
                                 start,
                                 hidden,
                                 logits_stride,
                                 out_stride,
                                 product_stride,
                                 static_cast<double>(vocab),
                                 static_cast<W>(inner.value_or(0))};
        const bool more = moment.data || squares.data || average.data;
        auto* kernel =
            inner ? (more ? exp_tile_kernel<L, O, W, true, true> : exp_tile_kernel<L, O, W, true, false>)
                  : (more ? exp_tile_kernel<L, O, W, false, true> : exp_tile_kernel<L, O, W, false, false>);
        launch("exp_tile", on, share.blocks(), THREADS, kernel, a, share);
    });
}

// ---- grad_tile -----------------------------------------------------------------------------------------

namespace {

template <typename L, typename O, typename W>
struct GradTile {
    const L* logits;        // [r, v] raw
    O* out;                 // [r, v]; may be the logits
    const W* bias;          // [v] | null
    const int64_t* target;  // [r]
    const W* gain;          // [r]
    const W* ref;           // [r]
    const W* constant;      // [r] | null
    const W* mixing;        // [r] | null
    const W* uniform;       // [r] | null
    int64_t start, logits_stride, out_stride;
    W inner;
};

/// What the gradient GEMMs take of a tile; see `torch_.grad_tile`.
///
/// Moves sizeof(L) + sizeof(O) bytes per logit. At most 80 registers, 96 with a cap: 3 blocks of 256 threads,
/// or 2, and 48 KiB, or 32, on their way per multiprocessor.
template <typename L, typename O, typename W, bool CAP>
__global__ void __launch_bounds__(THREADS, sizeof(W) == 8 ? 1 : 2)
    grad_tile_kernel(const GradTile<L, O, W> a, const Share share) {
    const Strip at(share);
    if (!at.here) return;
    const int64_t r = at.row, y = a.target[r] - a.start;
    const int own = y >= 0 && y < share.cols ? static_cast<int>(y) : -PIECE;
    const ExpRow<W> row{a.gain[r], a.ref[r], a.inner};
    const W constant = a.constant ? a.constant[r] : W(1), mixing = a.constant ? a.mixing[r] : W(0);
    const W uniform = a.uniform ? a.uniform[r] : W(0);
    at.for_vectors<W>(a.logits + r * a.logits_stride, [&](int column, auto& x, int low, int high) {
        W e[EACH<L>], slope[EACH<L>];
        if (a.bias) add_columns(x, a.bias, column, low, high);
#pragma unroll
        for (int k = 0; k < EACH<L>; ++k) {
            const Exponent<W> found = exponent_of<CAP>(x[k], row);
            slope[k] = found.slope;
            x[k] = found.x;
            e[k] = power_of_two(found.x);
        }
        without(e, own - column);
        if (a.constant) {
#pragma unroll
            for (int k = 0; k < EACH<L>; ++k) e[k] = mixed(e[k], x[k], constant, mixing);
        }
        if constexpr (CAP) {
#pragma unroll
            for (int k = 0; k < EACH<L>; ++k) e[k] = (e[k] + uniform) * slope[k];
        }
        write(a.out + r * a.out_stride + column, e, low, high);
    });
}

}  // namespace

void grad_tile(Device on, Array logits, Array out, Array bias, Array target, Array gain, Array ref,
               Array constant, Array mixing, Array uniform, int64_t rows, int64_t cols, int64_t start,
               int64_t logits_stride, int64_t out_stride, std::optional<double> inner, int64_t strips) {
    const Share share(rows, cols, strips);
    with_tiles("grad_tile", logits.type, out.type, [&](auto l, auto o, auto w) {
        using L = TypeOf<decltype(l)>;
        using O = TypeOf<decltype(o)>;
        using W = TypeOf<decltype(w)>;
        if constexpr (!std::is_same_v<O, Nothing>) {
            const GradTile<L, O, W> a{as<L>(logits),
                                      as<O>(out),
                                      as<W>(bias),
                                      as<int64_t>(target),
                                      as<W>(gain),
                                      as<W>(ref),
                                      as<W>(constant),
                                      as<W>(mixing),
                                      as<W>(uniform),
                                      start,
                                      logits_stride,
                                      out_stride,
                                      static_cast<W>(inner.value_or(0))};
            launch("grad_tile", on, share.blocks(), THREADS,
                   inner ? grad_tile_kernel<L, O, W, true> : grad_tile_kernel<L, O, W, false>, a, share);
        }
    });
}

// ---- kept_tile -----------------------------------------------------------------------------------------

namespace {

template <typename T, typename W>
struct KeptTile {
    const T* kept;        // [r', v]
    T* out;               // [r, v]
    const int64_t* live;  // [r] | null: all
    const W* before;      // [r] | null: references did not move
    const W* after;       // [r] | null
    const W* constant;    // [r] | null
    const W* mixing;      // [r] | null
    int64_t kept_stride, out_stride;
    W tiny;  // the smallest normal number
};

/// The same of a tile that was kept; see `torch_.kept_tile`.
///
/// Moves 2 sizeof(T) bytes per element. At most 64 registers: 4 blocks of 256 threads, 64 KiB on their way
/// per multiprocessor.
template <typename T, typename W>
__global__ void __launch_bounds__(THREADS, sizeof(W) == 8 ? 1 : 2)
    kept_tile_kernel(const KeptTile<T, W> a, const Share share) {
    const Strip at(share);
    if (!at.here) return;
    const int64_t r = at.row, place = a.live ? a.live[r] : r;
    const W down = a.before ? power_of_two(a.before[r] - a.after[r]) : W(1);
    const W constant = a.constant ? a.constant[r] : W(1), mixing = a.constant ? a.mixing[r] : W(0);
    at.for_vectors<W>(a.kept + place * a.kept_stride, [&](int column, auto& e, int low, int high) {
#pragma unroll
        for (int k = 0; k < EACH<T>; ++k) {
            e[k] *= down;
            if (a.constant) e[k] = mixed(e[k], log_two(e[k] > a.tiny ? e[k] : a.tiny), constant, mixing);
        }
        write(a.out + r * a.out_stride + column, e, low, high);
    });
}

}  // namespace

void kept_tile(Device on, Array kept, Array out, Array live, Array before, Array after, Array constant,
               Array mixing, int64_t rows, int64_t cols, int64_t kept_stride, int64_t out_stride, double tiny,
               int64_t strips) {
    const Share share(rows, cols, strips);
    const auto with = [&](auto t, auto w) {
        using T = TypeOf<decltype(t)>;
        using W = TypeOf<decltype(w)>;
        const KeptTile<T, W> a{as<T>(kept),  as<T>(out),          as<int64_t>(live), as<W>(before),
                               as<W>(after), as<W>(constant),     as<W>(mixing),     kept_stride,
                               out_stride,   static_cast<W>(tiny)};
        launch("kept_tile", on, share.blocks(), THREADS, kept_tile_kernel<T, W>, a, share);
    };
    if (kept.type == Type::bfloat16) return with(Tag<bfloat16>{}, Tag<float>{});
    with_work("kept_tile", kept.type, [&](auto w) { with(w, w); });
}

// ---- add_products --------------------------------------------------------------------------------------

namespace {

constexpr int PIECES = 4, LINES = THREADS / PIECES;  // a block: 32 columns, 64 rows at a time

/// out += coef @ tile: dbias. A block sums all rows of 32 columns, 64 bytes or more of each.
///
/// Moves sizeof(T) bytes per element. At most 48 registers, 8.3 KiB of shared memory: 5 blocks of 256
/// threads.
template <typename T, typename W>
__global__ void __launch_bounds__(THREADS)
    add_products_kernel(W* out,         // [v] added to
                        const T* tile,  // [r, v]
                        const W* coef,  // [r]
                        int64_t rows, int cols, int64_t stride,
                        bool wide) {  // rows begin at multiples of 16 bytes
    __shared__ W found[LINES][PIECES * PIECE + 1];
    const int line = threadIdx.x / PIECES, at = threadIdx.x % PIECES * PIECE;
    const int column = blockIdx.x * PIECES * PIECE + at, count = min(cols - column, PIECE);
    W sums[PIECE] = {};
#pragma unroll 4
    for (int64_t row = line; row < rows; row += LINES) {
        const T* from = tile + row * stride + column;
        const W c = coef[row];
        W piece[PIECE];
        if (count == PIECE && wide) {
            load_piece(from, piece);
        } else {
#pragma unroll
            for (int k = 0; k < PIECE; ++k) piece[k] = k < count ? widened<W>(from[k]) : W(0);
        }
#pragma unroll
        for (int k = 0; k < PIECE; ++k) sums[k] += c * piece[k];
    }
#pragma unroll
    for (int k = 0; k < PIECE; ++k) found[line][at + k] = sums[k];
    __syncthreads();
    const int mine = blockIdx.x * PIECES * PIECE + threadIdx.x;
    if (threadIdx.x >= PIECES * PIECE || mine >= cols) return;
    W sum = out[mine];
    for (int other = 0; other < LINES; ++other) sum += found[other][threadIdx.x];
    out[mine] = sum;
}

}  // namespace

void add_products(Device on, Array out, Array tile, Array coef, int64_t rows, int64_t cols,
                  int64_t tile_stride) {
    const int64_t blocks = divided(cols, PIECES * PIECE);
    with_work("add_products", out.type, [&](auto w) {
        using W = TypeOf<decltype(w)>;
        const auto with = [&](auto t) {
            using T = TypeOf<decltype(t)>;
            launch("add_products", on, blocks, THREADS, add_products_kernel<T, W>, as<W>(out), as<T>(tile),
                   as<W>(coef), rows, static_cast<int>(cols), tile_stride,
                   Matrix<const T>(tile, tile_stride).wide);
        };
        if (tile.type == Type::bfloat16) return with(Tag<bfloat16>{});
        with(w);
    });
}

}  // namespace fused_align
