// The losses on scores of whole sequences in one launch: their sums -> scores, loss, coefficients and
// metrics.

#include "preference.cuh"

namespace fused_align {
namespace {

/// Sequences whose sums a block finds: both sides of a pair, or one that is judged.
struct Sides {
    Span first, second;
    HOST_DEVICE int64_t size() const { return first.size() + second.size(); }
    HOST_DEVICE bool in_first(int64_t at) const { return at >= first.begin && at < first.end; }
};

/// The columns of both families.
struct Tokens {
    Array logp;          // [N]
    Array ref;           // [N] | null: there is no anchor
    Array token_weight;  // [N] | null
    Array target;        // [N] int64 | null
    Array offsets;       // [S+1] | null
    Array c;             // [N] out | null
    int64_t width;
    bool humanline, metrics;
};

template <bool SINGLE>
struct SideColumns {
    Held<SINGLE> logp[STEP<SINGLE>], ref[STEP<SINGLE>], weight[STEP<SINGLE>];
    bool anchored, weighted;

    /// ratios: whether log-ratios are asked for, or weights alone.
    __device__ __forceinline__ SideColumns(const Tokens& a, const Places<SINGLE>& places, bool ratios)
        : anchored(a.ref.data), weighted(a.token_weight.data) {
        places.load(ratios ? a.logp : Array(), Type::none, logp);
        places.load(ratios ? a.ref : Array(), a.logp.type, ref);
        places.load(a.token_weight, Type::none, weight);
    }

    __device__ __forceinline__ double log_ratio() const {
        const double x = logp[0];
        return anchored ? x - ref[0] : x;
    }

    __device__ __forceinline__ double weighed(double x) const { return weighted ? weight[0] * x : x; }

    __device__ __forceinline__ void next() {
        shift(logp);
        shift(ref);
        shift(weight);
    }
};

/// token(places, columns) for each of this thread's tokens of both sides, one behind the other.
template <bool SINGLE, typename Token>
__device__ __forceinline__ void walk(const Tokens& a, const Sides& sides, bool ratios, Token token) {
    const int64_t first = sides.first.size();
    const Team block = {threadIdx.x, LOSS_THREADS};
    block.walk<SINGLE>(
        a.target, sides.size(),
        [&](int64_t i) { return i < first ? sides.first.begin + i : sides.second.begin + (i - first); },
        [&](const Places<SINGLE>& places) { return SideColumns<SINGLE>(a, places, ratios); }, token);
}

struct SideSums {
    double total, count, logps;  // weighted sums of log-ratios and of log-probs; live tokens
};

/// Sums of both sides; -> tokens strictly inside Humanline's bounds.
template <bool SINGLE>
__device__ __forceinline__ double read_sides(const Tokens& a, const Sides& sides, double low, double high,
                                             SideSums& first, SideSums& second, Scratch& scratch) {
    double sums[7] = {};
    int count = 0, other = 0, inside = 0;
    walk<SINGLE>(a, sides, true, [&](const auto& places, const auto& columns) {
        if (!places.live[0]) return;
        const Clipped log_ratio = clip(columns.log_ratio(), low, high, a.humanline);
        const double x = columns.weighed(log_ratio.value), logp = columns.weighed(columns.logp[0]);
        if (sides.in_first(places.at[0])) {
            sums[0] += x;
            sums[4] += logp;
            count += 1;
        } else {
            sums[1] += x;
            sums[5] += logp;
            other += 1;
        }
        inside += log_ratio.inside;
    });
    sums[2] = count;
    sums[3] = other;
    sums[6] = inside;
    sum_over_block(sums, a.metrics ? 7 : 4, scratch);
    first = {sums[0], sums[2], sums[4]};
    second = {sums[1], sums[3], sums[5]};
    return sums[6];
}

/// The coefficients of the tokens; by_first and by_second: dloss/d(weighted sum of the log-ratios).
template <bool SINGLE>
__device__ __forceinline__ void write_sides(const Tokens& a, const Sides& sides, double low, double high,
                                            double by_first, double by_second) {
    walk<SINGLE>(a, sides, a.humanline, [&](const auto& places, const auto& columns) {
        const bool passes = !a.humanline || clip(columns.log_ratio(), low, high, true).passes;
        const double by = sides.in_first(places.at[0]) ? by_first : by_second;
        places.store(a.c, passes ? columns.weighed(by) : 0.0);
    });
}

// ---- pairs ---------------------------------------------------------------------------------------------

struct Pairs {
    Tokens tokens;
    Array margin;  // [P] | null
    const double* params;
    // sums: loss, live tokens, strictly inside; both sides' log-probs, and rewards; accuracies, margins
    Results out;
    Pair kind;
    Score score;
    bool mean;
};

/// The loss of a pair, by one thread; -> its derivatives by the sums of both sides.
__device__ __forceinline__ PairTerm evaluate_pair(const Pairs& a, const PairParams& p, const SideSums& first,
                                                  const SideSums& second, double inside) {
    const Scored chosen = score_of(first.total, first.count, a.mean, a.score, p);
    const Scored rejected = score_of(second.total, second.count, a.mean, a.score, p);
    double weight = 1.0;
    if (a.margin.data) weight = adaptive_weight(number_in(a.tokens.logp.type, a.margin, blockIdx.x), p.own);
    const PairTerm term = pair_term(chosen.value, rejected.value, p.scale, weight, a.kind, p.own);
    const double share = 1.0 / *data_of<double>(a.out.divisor);
    const double reward = p.scale * chosen.value, other = p.scale * rejected.value;
    const double own[] = {term.value * share,
                          first.count + second.count,
                          inside,
                          first.logps,
                          second.logps,
                          reward,
                          other,
                          reward > other ? 1.0 : 0.0,
                          reward - other};
    a.out.write(own);
    return {term.value, share * term.by_chosen * chosen.slope, share * term.by_rejected * rejected.slope};
}

/// A block per pair. Both sides are one walk, so that their lengths need not be alike; a second one writes
/// the coefficients, and reads log-probs only where Humanline decides by them. Each token costs 8 bytes of
/// target, 4 of each column and 4 of c, 20 with a reference; the second walk finds them in a cache. Loads set
/// the time: a thread has STEP of them on their way, and 512 threads fill an SM that has one block, since
/// there are fewer pairs than SMs.
template <bool SINGLE>
__global__ void __launch_bounds__(LOSS_THREADS, 1) preference_loss_kernel(const Pairs a) {
    __shared__ Scratch scratch;
    __shared__ PairTerm term;
    const PairParams p = pair_params(a.params);
    const double low = p.clip_low, high = p.clip_high;
    const int64_t pair = blockIdx.x;
    const Sides sides = {span_of(a.tokens.offsets, a.tokens.width, pair),
                         span_of(a.tokens.offsets, a.tokens.width, pair + a.out.programs)};
    SideSums first, second;
    const double inside = read_sides<SINGLE>(a.tokens, sides, low, high, first, second, scratch);
    if (threadIdx.x == 0) term = evaluate_pair(a, p, first, second, inside);
    __syncthreads();
    if (a.tokens.c.data) write_sides<SINGLE>(a.tokens, sides, low, high, term.by_chosen, term.by_rejected);
    a.out.add_up(scratch);
}

// ---- judged sequences ----------------------------------------------------------------------------------

struct Judged {
    Tokens tokens;
    Array desirable;  // [S] uint8
    Array kl;         // [] | null: 0
    const JudgedParams* params;
    // sums: loss, live tokens, strictly inside; desirable ones; both kinds' log-probs, and rewards
    Results out;
};

/// The loss of a sequence, by one thread; -> its derivative by the sum of the log-ratios.
__device__ __forceinline__ double evaluate_judged(const Judged& a, const JudgedParams& p,
                                                  const SideSums& sums, double inside) {
    const bool good = number(a.desirable, blockIdx.x) != 0.0;
    const double reward = p.beta * sums.total;
    const double z0 = a.kl.data ? p.beta * number_in(a.tokens.logp.type, a.kl, 0) : 0.0;
    const double weight =
        (good ? p.desirable_weight : p.undesirable_weight) / *data_of<double>(a.out.divisor);
    const JudgedTerm term = judged_term(reward - z0, good, weight);
    const double own[] = {term.value,
                          sums.count,
                          inside,
                          good ? 1.0 : 0.0,
                          good ? sums.logps : 0.0,
                          good ? 0.0 : sums.logps,
                          good ? reward : 0.0,
                          good ? 0.0 : reward};
    a.out.write(own);
    return p.beta * term.by_reward;
}

/// A block per sequence; all else as in preference_loss_kernel.
template <bool SINGLE>
__global__ void __launch_bounds__(LOSS_THREADS, 1) judged_loss_kernel(const Judged a) {
    __shared__ Scratch scratch;
    __shared__ double by_total;
    const double low = a.params->clip_low, high = a.params->clip_high;
    const Sides sides = {span_of(a.tokens.offsets, a.tokens.width, blockIdx.x), {0, 0}};
    SideSums sums, none;
    const double inside = read_sides<SINGLE>(a.tokens, sides, low, high, sums, none, scratch);
    if (threadIdx.x == 0) by_total = evaluate_judged(a, *a.params, sums, inside);
    __syncthreads();
    if (a.tokens.c.data) write_sides<SINGLE>(a.tokens, sides, low, high, by_total, 0.0);
    a.out.add_up(scratch);
}

}  // namespace

void preference_loss(Device on, Array logp, Array ref, Array token_weight, Array margin, Array target,
                     Array offsets, Array params, Array divisor, Array c, Array partials, Array counter,
                     Array sums, int64_t width, int64_t programs, int kind, int score, bool mean,
                     bool humanline, bool metrics, int count) {
    check_loss("preference_loss", logp, count, metrics, 9);
    const Pairs a = {{logp, ref, token_weight, target, offsets, c, width, humanline, metrics},
                     margin,
                     data_of<const double>(params),
                     {divisor, partials, counter, sums, programs, count},
                     static_cast<Pair>(kind),
                     static_cast<Score>(score),
                     mean};
    const bool single = all_single({logp, ref, token_weight, c});
    launch("preference_loss", on, programs, LOSS_THREADS,
           single ? preference_loss_kernel<true> : preference_loss_kernel<false>, a);
}

void judged_loss(Device on, Array logp, Array ref, Array token_weight, Array desirable, Array kl,
                 Array target, Array offsets, Array params, Array divisor, Array c, Array partials,
                 Array counter, Array sums, int64_t width, int64_t programs, bool humanline, bool metrics,
                 int count) {
    check_loss("judged_loss", logp, count, metrics, 8);
    const Judged a = {{logp, ref, token_weight, target, offsets, c, width, humanline, metrics},
                      desirable,
                      kl,
                      data_of<const JudgedParams>(params),
                      {divisor, partials, counter, sums, programs, count}};
    const bool single = all_single({logp, ref, token_weight, c});
    launch("judged_loss", on, programs, LOSS_THREADS,
           single ? judged_loss_kernel<true> : judged_loss_kernel<false>, a);
}

}  // namespace fused_align
