// The launch functions, as bindings.cpp hands them to Python. No CUDA type crosses here.
//
// Arrays may be absent; then their data is null. Shapes stand beside each: N tokens, r rows, v columns of a
// tile of the vocabulary, V the vocabulary, H the hidden size. What each computes stands at its kernel.

#pragma once

#include <cstdint>
#include <optional>
#include <string>

namespace fused_align {

/// Of the launch functions: one more for every change of them or of what their arguments mean.
/// fused_align/backends/cuda_ has the same number, and refuses a module with another.
constexpr int INTERFACE = 1;

/// Types of elements; fused_align/backends/cuda_ has the same numbers.
enum class Type : int { none, float64, float32, bfloat16, float16, int64, int32, uint8 };

constexpr const char* name_of(Type type) {
    constexpr const char* NAMES[] = {"nothing", "float64", "float32", "bfloat16",
                                     "float16", "int64",   "int32",   "uint8"};
    return NAMES[static_cast<int>(type)];
}

struct Array {
    void* data = nullptr;
    Type type = Type::none;
};

struct Device {
    int index;     // of the GPU
    void* stream;  // cudaStream_t
};

/// Nothing, or a sentence why this machine's driver does not serve the CUDA runtime in the module. Where
/// there is no driver nothing: then there is no GPU either.
std::optional<std::string> unserved();

// A tile of logits: r rows of v columns, which begin at `start` in the vocabulary.

void exp_tile(Device on, Array logits, Array out, Array product, Array bias, Array target, Array gain,
              Array ref, Array moved, Array total, Array moment, Array pivot, Array squares, Array average,
              int64_t rows, int64_t cols, int64_t start, int64_t hidden, int64_t vocab, int64_t logits_stride,
              int64_t out_stride, int64_t product_stride, std::optional<double> inner, Array partials,
              Array counters, int64_t strips);

void grad_tile(Device on, Array logits, Array out, Array bias, Array target, Array gain, Array ref,
               Array constant, Array mixing, Array uniform, int64_t rows, int64_t cols, int64_t start,
               int64_t logits_stride, int64_t out_stride, std::optional<double> inner, int64_t strips);

void kept_tile(Device on, Array kept, Array out, Array live, Array before, Array after, Array constant,
               Array mixing, int64_t rows, int64_t cols, int64_t kept_stride, int64_t out_stride, double tiny,
               int64_t strips);

void add_products(Device on, Array out, Array tile, Array coef, int64_t rows, int64_t cols,
                  int64_t tile_stride);

// The rows of a chunk.

void open_rows(Device on, Array x, Array weight, Array bias, Array target, Array inverse, Array z, Array ref,
               Array slope, int64_t rows, int64_t hidden, int64_t x_stride, int64_t x_step,
               int64_t weight_stride, int64_t weight_step, int64_t inverse_stride, double logit_scale,
               std::optional<double> softcap, Type operand);

void finish_rows(Device on, Array z, Array ref, Array total, Array moment, Array pivot, Array average,
                 Array squares, Array out, int64_t rows);

void coefficients(Device on, Array z, Array ref, Array total, Array factor, Array slope, Array by_logp,
                  Array by_lse, Array by_entropy, Array by_average, Array entropy, Array after, Array summed,
                  Array on_rows, Array on_target, Array constant, Array mixing, Array on_average,
                  Array uniform, Array flags, int64_t rows, int64_t vocab);

void compact(Device on, Array flags, Array order, Array counts, int64_t rows);

// Rows of size H.

void scaled_rows(Device on, Array x, Array coef, Array out, int64_t rows, int64_t hidden, int64_t x_stride,
                 int64_t x_step);

void close_product(Device on, Array product, Array z, Array ref, Array total, Array factor, int64_t rows,
                   int64_t hidden, int64_t stride);

void store_hidden(Device on, Array out, Array index, Array product, Array scale, Array weight, Array target,
                  Array coef, Array on_average, Array average, int64_t rows, int64_t hidden, int64_t start,
                  int64_t out_stride, int64_t product_stride, int64_t weight_stride, int64_t weight_step,
                  Type operand);

void add_rows(Device on, Array out, Array column, Array order, Array coef, Array x, Array index,
              int64_t count, int64_t given, int64_t columns, int64_t hidden, int64_t out_stride,
              int64_t out_step, int64_t x_stride, int64_t x_step, Type operand);

// The fused loss kernels: S sequences, P pairs, K sums. The numbers of kinds are those of policy.cuh,
// preference.cuh.

void policy_loss(Device on, Array logp, Array old, Array ref, Array sampler, Array advantage,
                 Array token_weight, Array target, Array offsets, Array lengths, Array params, Array divisor,
                 Array c, Array partials, Array counter, Array sums, int64_t width, int64_t programs,
                 int kind, int ratio_of, int kl, bool penalised, bool corrected, int sampler_how, bool whole,
                 bool coupled, bool per_length, bool per_token, bool humanline, bool metrics, int count,
                 int64_t pieces);

void preference_loss(Device on, Array logp, Array ref, Array token_weight, Array margin, Array target,
                     Array offsets, Array params, Array divisor, Array c, Array partials, Array counter,
                     Array sums, int64_t width, int64_t programs, int kind, int score, bool mean,
                     bool humanline, bool metrics, int count);

void judged_loss(Device on, Array logp, Array ref, Array token_weight, Array desirable, Array kl,
                 Array target, Array offsets, Array params, Array divisor, Array c, Array partials,
                 Array counter, Array sums, int64_t width, int64_t programs, bool humanline, bool metrics,
                 int count);

// Logits that exist already: M rows, `stride` apart, of V adjacent columns.

void logit_stats(Device on, Array logits, Array target, Array inverse, Array logp, Array lse, Array entropy,
                 Array largest, Array total, Array partial, Array arrived, double scalar, int64_t rows,
                 int64_t vocab, int64_t stride, int64_t parts);

void logit_gradient(Device on, Array dlogp, Array dlse, Array dentropy, Array logits, Array target,
                    Array logp, Array entropy, Array largest, Array total, Array inverse, Array out,
                    double scalar, int64_t rows, int64_t vocab, int64_t stride, int64_t out_stride,
                    int64_t parts);

}  // namespace fused_align
