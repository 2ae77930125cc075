// The losses on scores of whole sequences: pairs (fused_align/losses/preference.py) and judged ones
// (unpaired.py).

#pragma once

#include "losses.cuh"

namespace fused_align {

// The numbers are those of fused_align/backends.
/// The score of a sequence from its sum or mean x: x; (e^(power x) - 1) / power; log 2 + log s(x).
enum class Score : int { plain, power, js };
enum class Pair : int { logistic, square, hinge, exo, nca, bco, sppo, apo_zero, apo_down, disco };

struct PairParams {
    double scale;  // beta
    double power;
    double clip_low, clip_high;  // Humanline's bounds
    double log_2;
    const double* own;  // of the loss; as many as it has
};

HOST_DEVICE PairParams pair_params(const double* x) {
    return {x[0], x[1], x[2], x[3], x[4], x + 5};
}

/// `params` of judged sequences, as it lies in memory.
struct JudgedParams {
    double beta, desirable_weight, clip_low, clip_high, undesirable_weight;
};

// ---- scores --------------------------------------------------------------------------------------------

struct Scored {
    double value;
    double slope;  // its derivative by the sum of the log-ratios
};

/// PairLoss.score.
HOST_DEVICE Scored score_of(double total, double count, bool mean, Score score, const PairParams& p) {
    const double length = mean && count > 1.0 ? count : 1.0, x = total / length;
    if (score == Score::plain) return {x, 1.0 / length};
    if (score == Score::js) return {p.log_2 + log_sigmoid(x), sigmoid(-x) / length};
    const double y = p.power * x;
    return {expm1(y > 60.0 ? 60.0 : y) / p.power, finite_exp(y).slope / length};
}

// ---- pairs ---------------------------------------------------------------------------------------------

/// MADPO.weight of the margin h by a reward model. own[4..8]: c_min, c_max - c_min, lam, tau, steepness.
HOST_DEVICE double adaptive_weight(double h, const double* own) {
    const double tau = own[7];
    const double x = (own[4] + own[5] * sigmoid(-(own[6] * (fabs(h) - tau) + own[8]))) * h;
    return h > -tau ? exp(log_sigmoid(x) - log_sigmoid(h)) : 1.0;
}

struct PairTerm {
    double value;
    double by_chosen, by_rejected;  // derivatives by the scores
};

/// -w (right log s(m) + wrong log s(-m)), m = beta (D - lam max(0, -chosen)) - gamma.
/// DPO, robust or not, SigmoidNorm, SimPO and CPO (lam 0); DPOP; MADPO (w). own: right, wrong, gamma, lam.
HOST_DEVICE PairTerm logistic(double chosen, double rejected, double scale, double weight,
                              const double* own) {
    const double right = own[0], wrong = own[1], gamma = own[2], lam = own[3];
    const bool fallen = chosen < 0.0;
    const double m = scale * (chosen - rejected - lam * (fallen ? -chosen : 0.0)) - gamma;
    const double against = wrong == 0.0 ? 0.0 : wrong * log_sigmoid(-m);  // of an infinite margin, too
    const double by_margin = -weight * scale * (right * sigmoid(-m) - wrong * sigmoid(m));
    return {-weight * (right * log_sigmoid(m) + against), by_margin * (fallen ? 1.0 + lam : 1.0), -by_margin};
}

HOST_DEVICE PairTerm scaled(double scale, double value, double dx, double dy) {
    return {value, scale * dx, scale * dy};
}

/// DiscoPOP. tau: own[0].
HOST_DEVICE PairTerm disco(double m, double scale, double tau) {
    // one exponential of m / tau's log s and of -m: for m << 0 it is 0, where e^-m is inf
    const double blended = exp(log_sigmoid(m / tau) - m), with = sigmoid(m / tau),
                 without = sigmoid(-m / tau);
    const double log_s = log_sigmoid(m);
    const double dx = blended * (without / tau - 1.0) - without * sigmoid(-m) + with * without / tau * log_s;
    return scaled(scale, blended - without * log_s, dx, -dx);
}

/// The `pair` of the losses on pairs; scale: beta; weight: of MADPO.
HOST_DEVICE PairTerm pair_term(double chosen, double rejected, double scale, double weight, Pair kind,
                               const double* own) {
    const double x = scale * chosen, y = scale * rejected, m = scale * (chosen - rejected);
    switch (kind) {
        case Pair::logistic:
            return logistic(chosen, rejected, scale, weight, own);
        case Pair::square: {  // own: aim
            const double away = chosen - rejected - own[0];
            return {away * away, 2.0 * away, -2.0 * away};
        }
        case Pair::hinge: {
            const bool closed = m >= 1.0;  // NaN stays NaN
            return scaled(scale, closed ? 0.0 : 1.0 - m, closed ? 0.0 : -1.0, closed ? 0.0 : 1.0);
        }
        case Pair::exo: {  // own: log(1 - eps), log eps
            const double p = sigmoid(m), q = sigmoid(-m), dx = p * q * (m - own[0] + own[1]);
            return scaled(scale, p * (log_sigmoid(m) - own[0]) + q * (log_sigmoid(-m) - own[1]), dx, -dx);
        }
        case Pair::nca:
            return scaled(scale, -log_sigmoid(x) - 0.5 * log_sigmoid(-x) - 0.5 * log_sigmoid(-y),
                          0.5 * sigmoid(x) - sigmoid(-x), 0.5 * sigmoid(y));
        case Pair::bco:
            return scaled(scale, -log_sigmoid(x) - log_sigmoid(-y), -sigmoid(-x), sigmoid(y));
        case Pair::sppo: {  // own: aim
            const double dx = chosen - own[0], dy = rejected + own[0];
            return scaled(2.0, dx * dx + dy * dy, dx, dy);
        }
        case Pair::apo_zero:
            return scaled(scale, sigmoid(-x) + sigmoid(y), -sigmoid(x) * sigmoid(-x),
                          sigmoid(y) * sigmoid(-y));
        case Pair::apo_down: {
            const double dy = sigmoid(m) * sigmoid(-m);
            return scaled(scale, sigmoid(x) + sigmoid(-m), sigmoid(x) * sigmoid(-x) - dy, dy);
        }
        default:
            return disco(m, scale, own[0]);
    }
}

// ---- judged sequences ----------------------------------------------------------------------------------

struct JudgedTerm {
    double value;
    double by_reward;  // derivative
};

/// w (1 - s(x)) = w s(-x), x the reward's distance from the reference point, or its negative of an
/// undesirable one.
HOST_DEVICE JudgedTerm judged_term(double distance, bool desirable, double weight) {
    const double x = desirable ? distance : -distance, by_x = weight * sigmoid(x) * sigmoid(-x);
    return {weight * sigmoid(-x), desirable ? -by_x : by_x};
}

}  // namespace fused_align
