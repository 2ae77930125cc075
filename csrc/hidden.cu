// Kernels over rows of size H: what goes into the gradient GEMMs, and what becomes of their results.

#include "reduce.cuh"
#include "rows.cuh"

namespace fused_align {

namespace {

/// A row of x times a number, to `out`, which may be x. All lanes of a warp take part.
template <typename X, typename O, typename W>
__device__ __forceinline__ void scale_row(const Matrix<X>& x, const Matrix<O>& out, W scale, int64_t row,
                                          int64_t hidden) {
    for_pieces_of(hidden, [&](int64_t column, int count) {
        W piece[PIECE];
        x.load(row, column, count, piece);
#pragma unroll
        for (int k = 0; k < PIECE; ++k) piece[k] *= scale;
        out.store(row, column, count, piece);
    });
}

// ---- scaled_rows ---------------------------------------------------------------------------------------

/// out = coef * x, rounded to out's type. Reads x and writes out once. At most 48 registers: 5
/// blocks of 256 threads.
template <typename X, typename O, typename W>
__global__ void __launch_bounds__(THREADS, sizeof(W) == 8 ? 2 : 4)
    scaled_rows_kernel(const Matrix<const X> x,  // [r, H]
                       const W* coef,            // [r]
                       const Matrix<O> out,      // [r, H]
                       int64_t rows, int64_t hidden) {
    const int64_t row = row_of_warp();
    if (row >= rows) return;
    scale_row(x, out, coef[row], row, hidden);
}

}  // namespace

void scaled_rows(Device on, Array x, Array coef, Array out, int64_t rows, int64_t hidden, int64_t x_stride,
                 int64_t x_step) {
    with_float("scaled_rows", x.type, [&](auto x_type) {
        with_float("scaled_rows", out.type, [&](auto out_type) {
            using X = TypeOf<decltype(x_type)>;
            using O = TypeOf<decltype(out_type)>;
            using W = Work<X>;
            launch("scaled_rows", on, blocks_of_rows(rows), THREADS, scaled_rows_kernel<X, O, W>,
                   Matrix<const X>(x, x_stride, x_step), as<W>(coef), Matrix<O>(out, hidden), rows, hidden);
        });
    });
}

// ---- close_product -------------------------------------------------------------------------------------

namespace {

/// product *= factor / Z. Reads and writes it once. At most 40 registers: 6 blocks of 256 threads.
template <typename W>
__global__ void __launch_bounds__(THREADS) close_product_kernel(const Matrix<W> product,  // [r, H] in place
                                                                const W* z,               // [r]
                                                                const W* ref,             // [r]
                                                                const W* total,           // [r]
                                                                const W* factor,          // [r]
                                                                int64_t rows, int64_t hidden) {
    const int64_t row = row_of_warp();
    if (row >= rows) return;
    const W scale = static_cast<W>(finish(z[row], ref[row], total[row]).inverse * factor[row]);
    scale_row(product, product, scale, row, hidden);
}

}  // namespace

void close_product(Device on, Array product, Array z, Array ref, Array total, Array factor, int64_t rows,
                   int64_t hidden, int64_t stride) {
    with_work("close_product", product.type, [&](auto w) {
        using W = TypeOf<decltype(w)>;
        launch("close_product", on, blocks_of_rows(rows), THREADS, close_product_kernel<W>,
               Matrix<W>(product, stride), as<W>(z), as<W>(ref), as<W>(total), as<W>(factor), rows, hidden);
    });
}

// ---- store_hidden --------------------------------------------------------------------------------------

namespace {

template <typename V, typename O, typename W>
struct StoreHidden {
    Matrix<O> out;           // [M, H]
    const int64_t* index;    // [r] | null: rows start, start + 1, ...
    Matrix<W> product;       // [r, H]; may be rows of out
    const W* scale;          // [r]
    Matrix<const V> weight;  // [V, H]
    const int64_t* target;   // [r]
    const W* coef;           // [r]
    const W* on_average;     // [r] | null
    const double* average;   // [H] | null
    int64_t start;
    Type operand;  // the weight is rounded to this first
};

/// out[index] = scale * product + coef * weight[target] + on_average * average. Reads two rows and writes
/// one. At most 64 registers: 4 blocks of 256 threads.
template <typename V, typename O, typename W>
__global__ void __launch_bounds__(THREADS, sizeof(W) == 8 ? 2 : 4)
    store_hidden_kernel(const StoreHidden<V, O, W> a, int64_t rows, int64_t hidden) {
    const int64_t row = row_of_warp();
    if (row >= rows) return;
    const int64_t y = a.target[row], place = a.index ? a.index[row] : a.start + row;
    const W scale = a.scale[row], coef = a.coef[row], on_average = a.on_average ? a.on_average[row] : W(0);
    for_pieces_of(hidden, [&](int64_t column, int count) {
        W grad[PIECE], weight[PIECE];
        a.product.load(row, column, count, grad);
        a.weight.load(y, column, count, weight);
        round_to(a.operand, weight);
#pragma unroll
        for (int k = 0; k < PIECE; ++k) grad[k] = grad[k] * scale + weight[k] * coef;
        if (a.average) {
#pragma unroll
            for (int k = 0; k < PIECE; ++k)
                if (k < count) grad[k] += static_cast<W>(a.average[column + k]) * on_average;
        }
        a.out.store(place, column, count, grad);
    });
}

}  // namespace

void store_hidden(Device on, Array out, Array index, Array product, Array scale, Array weight, Array target,
                  Array coef, Array on_average, Array average, int64_t rows, int64_t hidden, int64_t start,
                  int64_t out_stride, int64_t product_stride, int64_t weight_stride, int64_t weight_step,
                  Type operand) {
    with_float("store_hidden", weight.type, [&](auto weight_type) {
        with_float("store_hidden", out.type, [&](auto out_type) {
            using V = TypeOf<decltype(weight_type)>;
            using O = TypeOf<decltype(out_type)>;
            using W = Work<V, O>;
            const StoreHidden<V, O, W> a{Matrix<O>(out, out_stride),
                                         as<int64_t>(index),
                                         Matrix<W>(product, product_stride),
                                         as<W>(scale),
                                         Matrix<const V>(weight, weight_stride, weight_step),
                                         as<int64_t>(target),
                                         as<W>(coef),
                                         as<W>(on_average),
                                         as<double>(average),
                                         start,
                                         operand};
            launch("store_hidden", on, blocks_of_rows(rows), THREADS, store_hidden_kernel<V, O, W>, a, rows,
                   hidden);
        });
    });
}

// ---- add_rows ------------------------------------------------------------------------------------------

namespace {

template <typename X, typename W>
struct AddRows {
    Matrix<W> out;                          // [v, H] added to
    const int64_t* column;                  // [n] rising
    const int64_t* order;                   // [n]: which coefficient and row each of those has
    Array coef;                             // [n]
    Matrix<const X> x;                      // [M, H] | null: ones
    const int64_t* index;                   // [n] | null: which row of x
    int64_t count, given, columns, hidden;  // n, M, v (a column that is none of these is left out), H
    int parts;                              // blocks for a row of out
    Type operand;                           // x is rounded to this first
};

/// out[column] += coef * x, in the order of the list: the block of the first row of a column adds up all of
/// that column's, the blocks of the others end at once.
///
/// Reads n rows, reads and writes as many rows of out as there are columns. At most 64 registers: 4
/// blocks of 256 threads.
template <typename X, typename W>
__global__ void __launch_bounds__(THREADS, sizeof(W) == 8 ? 2 : 4) add_rows_kernel(const AddRows<X, W> a) {
    const int64_t first = blockIdx.x / a.parts;
    const int64_t y = a.column[first];
    if (y >= a.columns || (first > 0 && a.column[first - 1] == y)) return;
    const int64_t column = (static_cast<int64_t>(blockIdx.x % a.parts) * blockDim.x + threadIdx.x) * PIECE;
    const int count = static_cast<int>(min(a.hidden - column, static_cast<int64_t>(PIECE)));
    if (count <= 0) return;
    // how far the column reaches, in growing steps and back in halves; then loads need not wait for each
    // other
    int64_t last = first, step = 1;
    for (; last + step < a.count && a.column[last + step] == y; step *= 2) last += step;
    for (; step > 0; step /= 2)
        if (last + step < a.count && a.column[last + step] == y) last += step;
    W sums[PIECE] = {};
#pragma unroll 4
    for (int64_t place = first; place <= last; ++place) {
        const int64_t entry = a.order[place];
        const int64_t row = a.index ? a.index[entry] : entry;
        const W c = element<W>(a.coef, entry);
        W piece[PIECE];
        if (a.x.data && row < a.given) {
            a.x.load(row, column, count, piece);
        } else {  // padding points one past the end
#pragma unroll
            for (int k = 0; k < PIECE; ++k) piece[k] = a.x.data ? W(0) : W(1);
        }
        round_to(a.operand, piece);
#pragma unroll
        for (int k = 0; k < PIECE; ++k) sums[k] += piece[k] * c;
    }
    W before[PIECE];
    a.out.load(y, column, count, before);
#pragma unroll
    for (int k = 0; k < PIECE; ++k) before[k] += sums[k];
    a.out.store(y, column, count, before);
}

}  // namespace

void add_rows(Device on, Array out, Array column, Array order, Array coef, Array x, Array index,
              int64_t count, int64_t given, int64_t columns, int64_t hidden, int64_t out_stride,
              int64_t out_step, int64_t x_stride, int64_t x_step, Type operand) {
    const int64_t pieces = divided(hidden, PIECE);
    const int threads = static_cast<int>(pieces < THREADS ? divided(pieces, WARP) * WARP : THREADS);
    const int64_t parts = divided(pieces, threads);
    const Array some = x.data ? x : out;  // its type does not matter where there is none
    with_float("add_rows", some.type, [&](auto x_type) {
        with_work("add_rows", out.type, [&](auto w) {
            using X = TypeOf<decltype(x_type)>;
            using W = TypeOf<decltype(w)>;
            const AddRows<X, W> a{Matrix<W>(out, out_stride, out_step),
                                  as<int64_t>(column),
                                  as<int64_t>(order),
                                  coef,
                                  Matrix<const X>(x, x_stride, x_step),
                                  as<int64_t>(index),
                                  count,
                                  given,
                                  columns,
                                  hidden,
                                  static_cast<int>(parts),
                                  operand};
            launch("add_rows", on, count * parts, threads, add_rows_kernel<X, W>, a);
        });
    });
}

}  // namespace fused_align
