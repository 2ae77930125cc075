// The policy-gradient losses in one launch: rho -> surrogate, sampler's correction, KL -> loss, coefficients,
// metrics.

#include "policy.cuh"

namespace fused_align {
namespace {

struct PolicyLoss {
    Array logp;          // [N]
    Array old;           // [N] | null: logp itself, without gradient
    Array ref;           // [N] | null
    Array sampler;       // [N] | null
    Array advantage;     // [S], or [N] if per_token
    Array token_weight;  // [N] | null
    Array target;        // [N] int64 | null
    Array offsets;       // [S+1] | null
    Array lengths;       // [S] | null: a sequence's length is the number of its live tokens here
    const PolicyParams* params;
    Array c;  // [N] out | null
    // sums: loss, live tokens, clipped low, clipped high, KL, strictly inside Humanline's bounds
    Results out;
    int64_t width;
    unsigned pieces;  // programs of a sequence
    PolicyOptions options;
};

/// The columns of a step's tokens. A walk that does not use one does not load it: the compiler sees to that.
template <bool SINGLE>
struct PolicyColumns {
    Held<SINGLE> logp[STEP<SINGLE>], old[STEP<SINGLE>], ref[STEP<SINGLE>], sampler[STEP<SINGLE>],
        advantage[STEP<SINGLE>], weight[STEP<SINGLE>];
    bool anchored, weighted, per_token;

    __device__ __forceinline__ PolicyColumns(const PolicyLoss& a, const Places<SINGLE>& places)
        : anchored(a.old.data), weighted(a.token_weight.data), per_token(a.options.per_token) {
        places.load(a.logp, Type::none, logp);
        places.load(a.old, a.logp.type, old);
        places.load(a.ref, a.logp.type, ref);
        places.load(a.sampler, a.logp.type, sampler);
        places.load(per_token ? a.advantage : Array(), a.logp.type, advantage);
        places.load(a.token_weight, Type::none, weight);
    }

    /// The token in front; `shared` is the advantage of the sequence.
    __device__ __forceinline__ PolicyToken token(double shared) const {
        const double x = logp[0];
        return {x, anchored ? old[0] : x, static_cast<double>(ref[0]), static_cast<double>(sampler[0]),
                per_token ? advantage[0] : shared};
    }

    __device__ __forceinline__ double weighed(double factor) const {
        return weighted ? weight[0] * factor : factor;
    }

    __device__ __forceinline__ void next() {
        shift(logp);
        shift(old);
        shift(ref);
        shift(sampler);
        shift(advantage);
        shift(weight);
    }
};

/// token(places, columns) for each token of this thread.
template <bool SINGLE, typename Token>
__device__ __forceinline__ void walk(const PolicyLoss& a, Span span, Team team, Token token) {
    team.walk<SINGLE>(
        a.target, span.size(), [&](int64_t i) { return span.begin + i; },
        [&](const Places<SINGLE>& places) { return PolicyColumns<SINGLE>(a, places); }, token);
}

/// What the tokens of a sequence share, and its length.
struct WholeSequence {
    PolicySequence shared;
    double slope, length;
};

template <bool SINGLE>
__device__ __forceinline__ WholeSequence whole_sequence(const PolicyLoss& a, const PolicyParams& p, int64_t s,
                                                        Span span, Scratch& scratch) {
    const PolicyOptions& o = a.options;
    const Team block = {threadIdx.x, LOSS_THREADS};
    double length = static_cast<double>(span.size()), total = 0, away = 0;
    if (o.of_sequence()) {
        double sums[3] = {};
        walk<SINGLE>(a, span, block, [&](const auto& places, const auto& columns) {
            if (!places.live[0]) return;
            const PolicyToken t = columns.token(0.0);
            sums[0] += 1.0;
            sums[1] +=
                clip(t.logp - t.old, p.clip_low, p.clip_high, o.humanline).value * columns.weighed(1.0);
            sums[2] += t.old - t.sampler;
        });
        sum_over_block(sums, 3, scratch);
        length = sums[0];
        total = sums[1];
        away = sums[2];
    } else if (o.per_length && a.target.data && !a.lengths.data) {
        double live[1] = {};
        const int64_t* target = data_of<const int64_t>(a.target);
        for (int64_t at = span.begin + block.lane; at < span.end; at += block.lanes)
            live[0] += target[at] == IGNORE_INDEX ? 0.0 : 1.0;
        sum_over_block(live, 1, scratch);
        length = live[0];
    }
    if (a.lengths.data) length = number(a.lengths, s);
    length = length > 1.0 ? length : 1.0;
    if (o.ratio_of == RatioOf::token) return {{1.0, away}, 1.0, length};
    const double per = o.ratio_of == RatioOf::sum ? 1.0 : length;
    const FiniteExp ratio = finite_exp(total / per);
    return {{ratio.value, away}, ratio.slope / per, length};
}

/// A block per sequence, or per piece of one where no token depends on the others: then only its length is
/// found by every block. One walk; two where the sequence has one ratio, three where that has a gradient. In
/// the first each token costs 8 bytes of target, 4 of each column and 4 of c, 24 with a reference: 0.4 MB of
/// 16384 tokens, little beside the latencies, for which a thread loads STEP tokens at once. 16-byte loads
/// would need sequences that begin at multiples of 4. 512 threads with 128 registers: one block per SM.
template <bool SINGLE>
__global__ void __launch_bounds__(LOSS_THREADS, 1) policy_loss_kernel(const PolicyLoss a) {
    __shared__ Scratch scratch;
    const PolicyOptions& o = a.options;
    const PolicyParams p = *a.params;
    const int64_t s = blockIdx.x / a.pieces, piece = blockIdx.x % a.pieces;
    const Team block = {threadIdx.x, LOSS_THREADS};
    const Span span = span_of(a.offsets, a.width, s);
    const WholeSequence whole = whole_sequence<SINGLE>(a, p, s, span, scratch);
    const double share =
        1.0 / (p.per * *data_of<double>(a.out.divisor)) / (o.per_length ? whole.length : 1.0);
    const double advantage = o.per_token ? 0.0 : number_in(a.logp.type, a.advantage, s);

    double loss = 0, kl = 0, pull = 0;
    int tokens = 0, low = 0, high = 0, inside = 0;
    const Team team = {piece * LOSS_THREADS + block.lane, a.pieces * block.lanes};
    walk<SINGLE>(a, span, team, [&](const auto& places, const auto& columns) {
        double found = 0;
        if (places.live[0]) {
            const PolicyTerm term = policy_term(columns.token(advantage), whole.shared, o, p);
            const double weight = columns.weighed(share);
            loss += term.value * weight;
            pull += term.by_ratio * weight;
            found = term.by_logp * weight;
            kl += term.kl;
            tokens += 1;
            low += term.low;
            high += term.high;
            inside += term.inside;
        }
        if (a.c.data && !o.coupled) places.store(a.c, found);
    });

    double sums[] = {loss, 1.0 * tokens, 1.0 * low, 1.0 * high, kl, 1.0 * inside, pull};
    sum_over_block(sums, o.metrics || o.coupled ? 7 : 1, scratch);
    if (threadIdx.x == 0) a.out.write(sums);
    if (o.coupled && a.c.data) {
        pull = sums[6] * whole.slope;
        walk<SINGLE>(a, span, block, [&](const auto& places, const auto& columns) {
            const double found =
                coupled_coefficient(columns.token(advantage), whole.shared, pull, share, o, p);
            places.store(a.c, found * columns.weighed(1.0));
        });
    }
    a.out.add_up(scratch);
}

}  // namespace

void policy_loss(Device on, Array logp, Array old, Array ref, Array sampler, Array advantage,
                 Array token_weight, Array target, Array offsets, Array lengths, Array params, Array divisor,
                 Array c, Array partials, Array counter, Array sums, int64_t width, int64_t programs,
                 int kind, int ratio_of, int kl, bool penalised, bool corrected, int sampler_how, bool whole,
                 bool coupled, bool per_length, bool per_token, bool humanline, bool metrics, int count,
                 int64_t pieces) {
    const char* name = "policy_loss";
    const auto surrogate = static_cast<Surrogate>(kind);
    const auto how = static_cast<Sampler>(sampler_how);
    const PolicyOptions options = {surrogate,
                                   static_cast<RatioOf>(ratio_of),
                                   static_cast<Penalty>(kl),
                                   penalised,
                                   corrected,
                                   how,
                                   whole,
                                   coupled,
                                   per_length,
                                   per_token,
                                   humanline,
                                   metrics};
    check_loss(name, logp, count, metrics, 6);
    if (pieces < 1 || programs % pieces != 0 || (pieces > 1 && options.of_sequence()))
        throw std::invalid_argument(
            std::string(name) + ": programs is the number of sequences times pieces, and pieces is 1 " +
            "where a sequence has one ratio or one correction; got programs=" + std::to_string(programs) +
            ", pieces=" + std::to_string(pieces) + ".");
    const PolicyLoss a = {logp,      old,
                          ref,       sampler,
                          advantage, token_weight,
                          target,    offsets,
                          lengths,   data_of<const PolicyParams>(params),
                          c,         {divisor, partials, counter, sums, programs, count},
                          width,     static_cast<unsigned>(pieces),
                          options};
    const bool single =
        all_single({logp, old, ref, sampler, per_token ? advantage : Array(), token_weight, c});
    launch(name, on, programs, LOSS_THREADS, single ? policy_loss_kernel<true> : policy_loss_kernel<false>,
           a);
}

}  // namespace fused_align
