// From raw logits to exponentials, number by number; fused_align/backends/operands.py has the algorithm.
//
// Nothing here knows where a logit comes from: a product with an epilogue of its own would call the same.

#pragma once

#include "maths.cuh"

namespace fused_align {

constexpr double CEILING = 58;  // the largest exponent, base 2: about e^80 above the target

/// What is the same for all logits of a row.
template <typename W>
struct ExpRow {
    W gain;   // base-2 exponent per unit of (capped) logit
    W ref;    // the reference, base 2
    W inner;  // under a cap: of the logit inside tanh
};

template <typename W>
struct Exponent {
    W x;      // of two; fused, so that every walk rounds it alike, whatever else it computes
    W logit;  // capped; times gain the logit in base 2
    W slope;  // the cap's 1 - tanh^2; 1 without a cap
};

template <bool CAP, typename W>
HOST_DEVICE Exponent<W> exponent_of(W logit, const ExpRow<W>& row) {
    W slope = 1;
    if constexpr (CAP) {
        const Capped<W> found = capped(logit * row.inner);
        logit = found.tanh;
        slope = found.slope;
    }
    return {std::fma(logit, row.gain, -row.ref), logit, slope};
}

/// The sums of a row, as one thread keeps them.
template <typename W>
struct RowSums {
    W total = 0, moment = 0, logits = 0;
    double squares = 0;  // float32 has no range for them
};

/// How a row's reference moves where exponents pass the ceiling, and what was summed before with it.
struct Moved {
    double jump, down;  // of the reference; what sums are multiplied by
};

template <typename W>
HOST_DEVICE Moved moved_by(W largest) {
    const double jump = largest > W(CEILING) ? ceil(static_cast<double>(largest)) : 0.0;
    return {jump, exp2(-jump)};
}

/// E times a + b x: what an entropy's gradient needs of an exponent x.
template <typename W>
HOST_DEVICE W mixed(W e, W x, W constant, W slope) {
    return times(e, constant + slope * x);
}

}  // namespace fused_align
