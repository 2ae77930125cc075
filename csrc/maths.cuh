// Functions of one number.

#pragma once

#include "device.cuh"

namespace fused_align {

constexpr double LN2 = 0.693147180559945309417232121458;
constexpr double LOG2E = 1.44269504088896340735992468100;

/// 2^x. In float32 one instruction, 2 ulp; results below 2^-126 are 0.
HOST_DEVICE float power_of_two(float x) {
#ifdef __CUDA_ARCH__
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return exp2f(x);
#endif
}
HOST_DEVICE double power_of_two(double x) {
    return exp2(x);
}

/// log2 x of a normal number. In float32 one instruction.
HOST_DEVICE float log_two(float x) {
#ifdef __CUDA_ARCH__
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return log2f(x);
#endif
}
HOST_DEVICE double log_two(double x) {
    return log2(x);
}

/// torch.clamp: NaN stays NaN.
template <typename W>
HOST_DEVICE W clamped(W x, W low, W high) {
    return x < low ? low : x > high ? high : x;
}

/// e x, where e = 0 makes 0 of an infinite x: a word that a bias of -inf forbids.
template <typename W>
HOST_DEVICE W times(W e, W x) {
    return e == W(0) ? W(0) : e * x;
}

/// The logistic function, with its relative precision on both sides.
template <typename W>
HOST_DEVICE W sigmoid(W x) {
    const W e = exp(-fabs(x));
    return (x >= W(0) ? W(1) : e) / (W(1) + e);
}

/// log(1 + e^x).
HOST_DEVICE double softplus(double x) {
    return (x > 0 ? x : 0) + log1p(exp(-fabs(x)));
}

HOST_DEVICE double log_sigmoid(double x) {
    return -softplus(-x);
}

/// losses.policy.finite_exp: exp(min(x, 60)), and its derivative, 0 above.
struct FiniteExp {
    double value, slope;
};
HOST_DEVICE FiniteExp finite_exp(double x) {
    const double y = exp(x > 60.0 ? 60.0 : x);
    return {y, x <= 60.0 ? y : 0.0};
}

/// tanh x, and 1 - tanh^2 x, both to the last digits but one.
template <typename W>
struct Capped {
    W tanh, slope;
};
template <typename W>
HOST_DEVICE Capped<W> capped(W x) {
    // near 0, where the formula by exponentials cancels, tanh is its series
    constexpr W NEAR = sizeof(W) == 8 ? W(0.02) : W(0.25);
    const W e = power_of_two(static_cast<W>(-2 * LOG2E) * static_cast<W>(fabs(x)));
    const W share = W(1) / (W(1) + e), q = x * x;  // one division: they cost more than all the rest
    const W far = W(1) - W(2) * e * share;
    const W series =
        W(1) + q * (W(-1.0 / 3) +
                    q * (W(2.0 / 15) + q * (W(-17.0 / 315) + q * (W(62.0 / 2835) - q * W(1382.0 / 155925)))));
    return {fabs(x) < NEAR ? x * series : x < W(0) ? -far : far, W(4) * e * share * share};
}

}  // namespace fused_align
