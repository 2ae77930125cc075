// Statistics of a row of logits in one read, and its gradient: fused_align/backends/torch_logits.py has the
// formulas. logits.cu lays them out over threads.
//
// A reference is a logit as it stands in memory, before the temperature: (z - best) * scale is right to its
// last digits however large the two are, where z * scale - best * scale in one fused step would be off by the
// rounding of best * scale. scale is log2(e) / temperature: exponents are base 2.

#pragma once

#include "maths.cuh"

namespace fused_align {

/// A natural exponent whose power is 0; those below are taken for it where the exponent is also a factor.
constexpr double NOTHING = -1000.0;

template <typename W>
constexpr W LEAST_FINITE = std::numeric_limits<W>::lowest();

/// What a thread has seen of a row, the target apart: an online softmax.
template <typename W>
struct Online {
    W best;    // the largest logit, at least the lowest finite number: -inf - -inf would be NaN
    W others;  // sum of 2^x, with x = (z - best) * scale
    W moment;  // sum of 2^x x; entropy alone needs it
};

template <typename W>
HOST_DEVICE Online<W> nothing_seen() {
    return {LEAST_FINITE<W>, W(0), W(0)};
}

/// The larger of the two; NaN is passed over. It comes through by the sums.
template <typename W>
HOST_DEVICE W larger(W a, W b) {
    return static_cast<W>(fmax(a, b));
}

/// As a factor of a power of two: an exponent of -inf, and 0, would be NaN.
template <typename W>
HOST_DEVICE W as_factor(W x) {
    constexpr W LEAST = static_cast<W>(NOTHING * LOG2E);
    return larger(x, LEAST);
}

/// The same sums against a larger reference.
template <bool ENTROPY, typename W>
HOST_DEVICE Online<W> against(const Online<W>& seen, W best, W scale) {
    const W x = (seen.best - best) * scale, e = power_of_two(x);
    return {best, seen.others * e, ENTROPY ? (seen.moment + seen.others * as_factor(x)) * e : W(0)};
}

/// Adds the logits z: one maximum of all, and one change of the reference. -inf adds nothing.
template <bool ENTROPY, int COUNT, int EACH, typename W>
HOST_DEVICE void see(Online<W>& seen, const W (&z)[COUNT][EACH], W scale) {
    W best = seen.best;
#pragma unroll
    for (int i = 0; i < COUNT; ++i)
#pragma unroll
        for (int k = 0; k < EACH; ++k) best = larger(best, z[i][k]);
    seen = against<ENTROPY>(seen, best, scale);
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
        W others = W(0), moment = W(0);
#pragma unroll
        for (int k = 0; k < EACH; ++k) {
            const W x = (z[i][k] - best) * scale, e = power_of_two(x);
            others = k == 0 ? e : others + e;
            if constexpr (ENTROPY) moment = k == 0 ? e * as_factor(x) : moment + e * as_factor(x);
        }
        seen.others += others;
        if constexpr (ENTROPY) seen.moment += moment;
    }
}

/// Both together; the same bits in either order. Values are picked and not addresses, which would need a
/// stack.
template <bool ENTROPY, typename W>
HOST_DEVICE Online<W> merged(const Online<W>& a, const Online<W>& b, W scale) {
    const W best = larger(a.best, b.best);
    const bool first = a.best == best;  // the other's sums change their reference
    const Online<W> one = {first ? b.best : a.best, first ? b.others : a.others, first ? b.moment : a.moment};
    const Online<W> low = against<ENTROPY>(one, best, scale);
    return {best, (first ? a.others : b.others) + low.others, (first ? a.moment : b.moment) + low.moment};
}

/// What the forward finds of a row.
template <typename W>
struct RowStats {
    double logp, lse, entropy;
    W largest;     // logit, the target's too; not tempered
    double total;  // Z, against it
};

template <typename W>
HOST_DEVICE RowStats<W> statistics(const Online<W>& seen,
                                   bool inside,         // whether the target lies in [0, V)
                                   W z_y,               // the target's logit, -inf where there is none
                                   double temperature,  // its inverse
                                   bool entropy) {
    const W top = larger(seen.best, z_y);
    const double gap = (static_cast<double>(z_y) - top) * temperature;
    const double apart = (static_cast<double>(seen.best) - top) * temperature, e = exp(apart);
    const double others = seen.others * e;  // O
    // the target is apart from the others, so that log p of a sure token keeps its digits
    const double odds = (others == 0 ? -INFINITY : log(others)) - gap;
    const double p = inside ? exp(gap) : 0.0, Z = others + p, log_Z = log(Z);
    double found = 0;
    if (entropy) {
        const double moment = (seen.moment * LN2 + seen.others * (apart < NOTHING ? NOTHING : apart)) * e;
        found = log_Z - (moment + p * (gap < NOTHING ? NOTHING : gap)) / Z;
    }
    return {inside ? -softplus(odds) : NAN, top * temperature + log_Z, found, top, Z};
}

/// The coefficients of the gradient of a row, and what e^(z - largest) needs.
template <typename W>
struct RowSlope {
    W own;          // of the target's logit
    W slope, bend;  // of another: 2^x (slope - bend x)
    W largest, scale;
};

template <typename W>
HOST_DEVICE RowSlope<W> slopes(double c, double l, double h,  // coefficients of logp, lse and entropy
                               double logp,
                               double entropy,  // read iff h != 0
                               W largest, double total,
                               double temperature  // its inverse
) {
    const double p_y = exp(logp);
    // from logp and not from 1 - e^(z_y - largest) / Z: a sure token keeps its digits
    double own = -c * expm1(logp) + l * p_y, slope = l - c;
    if (h != 0) {
        own -= h * p_y * ((logp < NOTHING ? NOTHING : logp) + entropy);
        slope -= h * (entropy - log(total));
    }
    const double unit = temperature / total;
    const bool known = logp == logp;  // not so where the target lies outside [0, V), and the row is NaN
    return {static_cast<W>(own * temperature), static_cast<W>(known ? slope * unit : logp),
            static_cast<W>(h * unit * LN2), largest, static_cast<W>(temperature * LOG2E)};
}

/// The gradient of a logit that is not the target's.
template <bool ENTROPY, typename W>
HOST_DEVICE W gradient(W z, const RowSlope<W>& row) {
    const W x = (z - row.largest) * row.scale, e = power_of_two(x);
    return ENTROPY ? e * (row.slope - row.bend * as_factor(x)) : e * row.slope;
}

}  // namespace fused_align
