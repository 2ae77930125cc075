// What is worked out per row: row vectors are a millionth of a tile, so all of it is in double.

#pragma once

#include "maths.cuh"

namespace fused_align {

constexpr double SHIFT = 58;                   // references stand so far above their targets, base 2
constexpr double LOWEST = -80;                 // log-prob below which Z may have left 2^-58 .. 2^58
constexpr double STEEP = 0x1p64;               // the largest c / Z
constexpr int ALIVE = 1, LOST = 2, MOVED = 4;  // flags of a row

/// The head's part of a logit, after the product: cap(logit_scale * a) / temperature.
struct HeadLogit {
    double z, slope;
};
HOST_DEVICE HeadLogit head_logit(double dot, double logit_scale, double softcap, bool cap, double inverse) {
    double z = dot * logit_scale, slope = 1;
    if (cap) {
        const Capped<double> found = capped(z / softcap);
        z = found.tanh * softcap;
        slope = found.slope;
    }
    return {z * inverse, slope};
}

/// Where the exponentials of a row are measured from, by its target's logit; a whole number.
HOST_DEVICE double reference(double z) {
    return floor(z * LOG2E + SHIFT + 0.5);
}

/// What a row's sums say. offset turns an exponent into (z_v - z_y) log2 e: what 2^-offset is to the target,
/// E is to the others.
struct Finished {
    double logp, miss, inverse, offset;
};  // miss: 1 - p_y; inverse: 1 / Z
HOST_DEVICE Finished finish(double z, double ref, double total) {
    const double offset = ref - z * LOG2E;
    const double inverse = 1 / (total + exp2(-offset));
    return {-softplus(log(total) + offset * LN2), total * inverse, inverse, offset};
}

/// H of the softmax, from the moment sum_v E_v (x_v + pivot) of the exponents x.
HOST_DEVICE double entropy_of(const Finished& row, double total, double moment, double pivot) {
    return -row.logp - row.inverse * LN2 * (moment + (row.offset - pivot) * total);
}

/// log sum_v p_v^2.
HOST_DEVICE double collision_of(const Finished& row, double squares) {
    return log(squares + exp2(-2 * row.offset)) + 2 * log(row.inverse);
}

/// Upstream gradients of a row's statistics, and its entropy.
struct UpstreamOf {
    double logp, lse, entropy, average, found_entropy;
};

/// What multiplies a row in the gradient GEMMs; see `Coefficients` of fused_align/backends/operands.py.
struct CoefficientsOf {
    double after, summed;       // the reference, moved near the lse where it is steep; S against that
    double on_rows, on_target;  // on E f where nothing is mixed in; on the target's column
    double constant, mixing;    // where E is first multiplied by constant + mixing x
    int flags;
};

/// d lse / dz_v = p_v, d mean / dz_v = 1 / V, and d entropy / dz_v = -p_v (log p_v + entropy).
HOST_DEVICE CoefficientsOf coefficients_of(double z, double ref, double total, double factor, double slope,
                                           const UpstreamOf& up) {
    Finished row = finish(z, ref, total);
    const double p = exp(row.logp);  // not 1 - miss, which would lose the digits of a small p
    const double shift = up.entropy == 0 ? 0 : up.entropy * (row.logp + up.found_entropy);
    const double others = up.logp - up.lse;
    const double size = fabs(up.logp) + fabs(up.lse) + fabs(up.entropy) + fabs(up.average);
    const bool alive = !(up.logp == 0 && up.lse == 0 && up.entropy == 0 && up.average == 0);
    CoefficientsOf out;
    // a coefficient of e^60, a ratio at its cap, times 1/Z = 2^58 has no float32
    out.after = size * row.inverse > STEEP ? floor(ref - log2(row.inverse) + 0.5) : ref;
    const double away = exp2(out.after - ref), offset = row.offset + (out.after - ref);
    const double inverse = row.inverse * away;
    out.summed = total / away;
    out.on_rows = -others * inverse * factor;
    out.on_target = (up.logp * row.miss + up.lse * p - p * shift) * factor * slope;
    // z_v - z_y = ln 2 (x_v + offset): what is the same for a row is summed here
    out.mixing = -up.entropy * inverse * LN2;
    out.constant = -(others + shift) * inverse + out.mixing * offset;
    out.flags = (alive ? ALIVE : 0) | (row.logp >= LOWEST ? 0 : LOST) | (out.after != ref ? MOVED : 0);
    return out;
}

}  // namespace fused_align
