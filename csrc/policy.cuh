// The policy-gradient losses token by token: fused_align/losses/policy.py, clipped.py and weighted.py.

#pragma once

#include "losses.cuh"

namespace fused_align {

// The numbers are those of fused_align/backends.
enum class Surrogate : int { clipped, cispo, sapo, reinforce };
/// What the ratio is the exponential of. mean_stopped is GSPO-token: the sequence's ratio, the token's
/// gradient.
enum class RatioOf : int { token, mean, mean_stopped, sum };
enum class Penalty : int { none, k1, k2, k3 };
enum class Sampler : int { none, truncate, mask };

struct PolicyOptions {
    Surrogate kind;
    RatioOf ratio_of;
    Penalty kl;      // of the penalty or of the metric
    bool penalised;  // beta KL is added
    bool corrected;  // and is beta rho KL
    Sampler sampler;
    bool whole;       // the sampler's correction is the sequence's
    bool coupled;     // the tokens' ratio is one, with a gradient to all of them
    bool per_length;  // a sequence's tokens are divided by their number
    bool per_token;   // the advantage is a token's
    bool humanline;
    bool metrics;

    /// Whether a token's item depends on other tokens of its sequence, their number apart.
    HOST_DEVICE bool of_sequence() const { return ratio_of != RatioOf::token || whole; }
};

/// `params` as it lies in memory.
struct PolicyParams {
    double beta;
    double per;                        // what a sequence is divided by
    double clip_low, clip_high;        // Humanline's bounds
    double sampler_low, sampler_high;  // logarithms
    double most;                       // MAX_ITEM
    double own[3];                     // of the surrogate
};

/// What stands in the columns for one token.
struct PolicyToken {
    double logp, old, ref, sampler, advantage;
};

/// What the tokens of a sequence share.
struct PolicySequence {
    double ratio;
    double away;  // sum of log old - log sampler
};

// ---- surrogates ----------------------------------------------------------------------------------------

struct Gain {
    double value;
    double by_ratio;  // derivative
    double beside;    // by the log-ratio, not through the ratio
    bool low, high;   // clipped
};

/// own: 1 - eps_low, 1 + eps_high, delta.
HOST_DEVICE Gain clipped_gain(double ratio, double advantage, const double (&own)[3]) {
    const double low = own[0], high = own[1], delta = own[2];
    const double free = (ratio > delta ? delta : ratio) * advantage;
    const double held = clamped(ratio, low, high) * advantage;
    // as torch.minimum: half of the gradient each where both are the same
    const double share = free == held ? 0.5 : free < held ? 1.0 : 0.0;
    const double by_free = ratio <= delta ? share : 0.0;
    const double by_held = ratio >= low && ratio <= high ? 1.0 - share : 0.0;
    const bool cut_low = ratio < low && advantage < 0.0;
    const bool cut_high = ratio > high && advantage > 0.0;
    return {-(free < held ? free : held), -(by_free + by_held) * advantage, 0.0, cut_low, cut_high};
}

HOST_DEVICE Gain gain_of(double ratio, double log_ratio, const PolicyToken& t, Surrogate kind,
                         const double (&own)[3]) {
    const double advantage = t.advantage;
    if (kind == Surrogate::clipped) return clipped_gain(ratio, advantage, own);
    if (kind == Surrogate::cispo) {  // own: eps_high, log eps_high
        const double beside = -(ratio > own[0] ? own[0] : ratio) * advantage;
        return {beside * t.logp, 0.0, beside, false, log_ratio > own[1] && advantage > 0.0};
    }
    if (kind == Surrogate::sapo) {  // own: t_pos, t_neg
        const double temper = advantage > 0.0 ? own[0] : own[1], x = temper * (ratio - 1.0);
        const double e = exp(-fabs(x)), above = 1.0 / (1.0 + e), below = e * above;  // s(|x|), s(-|x|)
        return {-4.0 / temper * (x >= 0.0 ? above : below) * advantage, -4.0 * above * below * advantage, 0.0,
                false, false};
    }
    return {-advantage * t.logp, 0.0, -advantage, false, false};
}

/// The surrogate and its derivatives times the sampler's factor, within +-most.
HOST_DEVICE void correct(Gain& gain, double factor, double most) {
    const double value = gain.value * factor;
    const bool within = fabs(value) <= most;
    gain.value = clamped(value, -most, most);
    gain.by_ratio = within ? gain.by_ratio * factor : 0.0;
    gain.beside = within ? gain.beside * factor : 0.0;
}

/// PolicyLoss.correction, its exponential, of log old - log sampler.
HOST_DEVICE double sampler_factor(double log, double low, double high, Sampler sampler) {
    const double factor = finite_exp(sampler == Sampler::truncate ? clamped(log, low, high) : log).value;
    return sampler == Sampler::truncate || (log >= low && log <= high) ? factor : 0.0;
}

// ---- the KL penalty ------------------------------------------------------------------------------------

struct Cost {
    double value;
    double by_ratio, by_logp;  // derivatives
    double kl;
};

/// PolicyLoss.penalty: the estimate of KL(pi || ref); beta KL, or beta rho KL.
HOST_DEVICE Cost cost_of(double ratio, const PolicyToken& t, const PolicyOptions& o, const PolicyParams& p) {
    const double d = t.ref - t.logp;
    double kl = -d, by_logp = 1.0;
    if (o.kl == Penalty::k2) {
        kl = d * d / 2.0;
        by_logp = -d;
    } else if (o.kl == Penalty::k3) {
        const double near = d > 60.0 ? 60.0 : d, grown = expm1(near);
        kl = grown - near;
        by_logp = d <= 60.0 ? -grown : 0.0;
    }
    if (!o.corrected) return {p.beta * kl, 0.0, p.beta * by_logp, kl};
    const double product = ratio * kl;
    const bool within = product <= p.most;
    return {p.beta * (product > p.most ? p.most : product), within ? p.beta * kl : 0.0,
            within ? p.beta * ratio * by_logp : 0.0, kl};
}

// ---- a token -------------------------------------------------------------------------------------------

struct PolicyTerm {
    double value;     // the token's item, before its weight, as the derivatives are
    double by_logp;   // all of it where no ratio is shared
    double by_ratio;  // that all tokens of a sequence share
    double kl;
    bool low, high, inside;
};

HOST_DEVICE PolicyTerm policy_term(const PolicyToken& t, const PolicySequence& s, const PolicyOptions& o,
                                   const PolicyParams& p) {
    const Clipped log_ratio = clip(t.logp - t.old, p.clip_low, p.clip_high, o.humanline);
    FiniteExp ratio = {s.ratio, s.ratio};
    if (o.ratio_of == RatioOf::token && (o.kind != Surrogate::reinforce || o.corrected))
        ratio = finite_exp(log_ratio.value);
    Gain gain = gain_of(ratio.value, log_ratio.value, t, o.kind, p.own);
    if (o.sampler != Sampler::none) {
        const double log = o.whole ? s.away : t.old - t.sampler;
        correct(gain, sampler_factor(log, p.sampler_low, p.sampler_high, o.sampler), p.most);
    }
    Cost cost = {};
    if (o.kl != Penalty::none) cost = cost_of(ratio.value, t, o, p);
    if (o.penalised) {
        gain.value += cost.value;
        gain.by_ratio += cost.by_ratio;
    }
    const double through = log_ratio.passes ? gain.by_ratio * ratio.slope + gain.beside : 0.0;
    const double by_logp = through + (o.penalised ? cost.by_logp : 0.0);
    return {gain.value, by_logp, gain.by_ratio, cost.kl, gain.low, gain.high, log_ratio.inside};
}

/// The coefficient of a token, before its weight, whose sequence has one ratio: `pull` is dloss/d(log-ratio)
/// of a token of weight 1, once all tokens have pulled at the ratio; `share` is what the loss gives each
/// token.
HOST_DEVICE double coupled_coefficient(const PolicyToken& t, const PolicySequence& s, double pull,
                                       double share, const PolicyOptions& o, const PolicyParams& p) {
    const double found = clip(t.logp - t.old, p.clip_low, p.clip_high, o.humanline).passes ? pull : 0.0;
    return o.penalised ? found + share * cost_of(s.ratio, t, o, p).by_logp : found;
}

}  // namespace fused_align
