"""The losses on scores of whole sequences: pairs (losses/preference.py), judged ones (losses/unpaired.py)."""

# pyright: reportGeneralTypeIssues=false
# (it takes a function under @triton.jit for one that never returns)

import triton
import triton.language as tl

from ..codes import Pair, Score
from .loss_kernels import add_up, clip, live_at, read, span, weight_at
from .maths import expm1, finite_exp, log_sigmoid, sigmoid

POWER = tl.constexpr(Score.POWER.value)
JS = tl.constexpr(Score.JS.value)

LOGISTIC = tl.constexpr(Pair.LOGISTIC.value)
SQUARE = tl.constexpr(Pair.SQUARE.value)
HINGE = tl.constexpr(Pair.HINGE.value)
EXO = tl.constexpr(Pair.EXO.value)
NCA = tl.constexpr(Pair.NCA.value)
BCO = tl.constexpr(Pair.BCO.value)
SPPO = tl.constexpr(Pair.SPPO.value)
APO_ZERO = tl.constexpr(Pair.APO_ZERO.value)
APO_DOWN = tl.constexpr(Pair.APO_DOWN.value)


# ---- scores of sequences -------------------------------------------------------------------------------


@triton.jit
def log_ratio_at(
    logp,  # [N]
    ref,  # [N], or None: there is no anchor
    at,  # [BLOCK] int64
    live,  # [BLOCK] bool
    bounds,  # [2] float64
    HUMANLINE: tl.constexpr,
):
    """-> log-probs; log-ratios, clipped by Humanline; whether they have a gradient; strictly inside."""
    x = read(logp, at, live, logp)
    log_ratio = x
    if ref is not None:
        log_ratio = x - read(ref, at, live, logp)
    log_ratio, passes, inside = clip(log_ratio, bounds, HUMANLINE)
    return x, log_ratio, passes, inside


@triton.jit
def read_side(
    logp,  # [N]
    ref,  # [N], or None
    token_weight,  # [N], or None
    target,  # [N], or None
    begin,
    end,
    bounds,  # [2] float64
    HUMANLINE: tl.constexpr,
    METRICS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """-> live tokens; weighted sums of log-ratios and of log-probs; tokens strictly inside the bounds."""
    none = tl.zeros([BLOCK], tl.float64)
    count, total, logps, insides = none, none, none, none
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        live = live_at(target, at, end)
        x, log_ratio, _, inside = log_ratio_at(logp, ref, at, live, bounds, HUMANLINE)
        weight = weight_at(token_weight, at, live, 1.0, BLOCK)
        count += tl.where(live, 1.0, 0.0)
        total += tl.where(live, log_ratio * weight, 0.0)
        if METRICS:
            logps += tl.where(live, x * weight, 0.0)
            if HUMANLINE:
                insides += tl.where(live & inside, 1.0, 0.0)
    return tl.sum(count), tl.sum(total), tl.sum(logps), tl.sum(insides)


@triton.jit
def write_side(
    coefficient,  # [] float64: dloss/d(weighted sum of the log-ratios)
    logp,  # [N]
    ref,  # [N], or None
    token_weight,  # [N], or None
    target,  # [N], or None
    c,  # [N]
    begin,
    end,
    bounds,  # [2] float64
    HUMANLINE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The coefficients of the tokens of a sequence."""
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        live = live_at(target, at, end)
        passes = live
        if HUMANLINE:
            _, _, passes, _ = log_ratio_at(logp, ref, at, live, bounds, HUMANLINE)
        weight = weight_at(token_weight, at, live, coefficient, BLOCK)
        found = tl.where(live & passes, weight, 0.0)
        tl.store(c + at, found.to(c.dtype.element_ty), mask=at < end)


@triton.jit
def score_of(
    total,  # [] float64, the sum of a sequence's log-ratios
    count,  # [] float64
    params,
    MEAN: tl.constexpr,
    SCORE: tl.constexpr,
):
    """PairLoss.score: -> the score, and its derivative by the sum."""
    length = tl.where(count > 1.0, count, 1.0)
    x = total / length if MEAN else total
    score, slope = x, tl.full((), 1.0, tl.float64)
    if SCORE == POWER:
        power = tl.load(params + 1)
        score = expm1(tl.where(power * x > 60.0, 60.0, power * x)) / power
        _, slope = finite_exp(power * x)
    elif SCORE == JS:
        score, slope = tl.load(params + 4) + log_sigmoid(x), sigmoid(-x)
    return score, slope / length if MEAN else slope


# ---- pairs ---------------------------------------------------------------------------------------------


@triton.jit
def adaptive_weight(
    h,  # [] float64, the margin by a reward model
    own,  # [5] float64
):
    """MADPO.weight."""
    least, above, lam, tau, steepness = (
        tl.load(own), tl.load(own + 1), tl.load(own + 2), tl.load(own + 3), tl.load(own + 4)
    )  # fmt: skip
    x = (least + above * sigmoid(-(lam * (tl.abs(h) - tau) + steepness))) * h
    return tl.where(h > -tau, tl.exp(log_sigmoid(x) - log_sigmoid(h)), 1.0)


@triton.jit
def logistic(
    chosen,  # [] float64, as all of these
    rejected,
    scale,
    weight,
    own,  # [4] float64
):
    """-w (right log s(m) + wrong log s(-m)), m = beta (D - lam max(0, -chosen)) - gamma, and its slopes.

    DPO, robust or not, SigmoidNorm, SimPO and CPO (lam 0); DPOP; MADPO (w).
    """
    right, wrong, gamma, lam = tl.load(own), tl.load(own + 1), tl.load(own + 2), tl.load(own + 3)
    fallen = chosen < 0.0
    m = scale * (chosen - rejected - lam * tl.where(fallen, -chosen, 0.0)) - gamma
    against = tl.where(wrong == 0.0, 0.0, wrong * log_sigmoid(-m))  # of an infinite margin, too
    value = -weight * (right * log_sigmoid(m) + against)
    by_margin = -weight * scale * (right * sigmoid(-m) - wrong * sigmoid(m))
    return value, by_margin * tl.where(fallen, 1.0 + lam, 1.0), -by_margin


@triton.jit
def pair_terms(
    chosen,  # [] float64, scores
    rejected,
    scale,  # beta
    own,  # [9] float64
    weight,  # of MADPO
    KIND: tl.constexpr,
):
    """The `pair` of the losses on pairs: -> value, its derivatives by both scores."""
    x, y = scale * chosen, scale * rejected
    m = scale * (chosen - rejected)
    if KIND == LOGISTIC:
        value, dx, dy = logistic(chosen, rejected, scale, weight, own)
        scale = 1.0
    elif KIND == SQUARE:
        away = chosen - rejected - tl.load(own)
        value, dx, dy, scale = away * away, 2.0 * away, -2.0 * away, 1.0
    elif KIND == HINGE:
        closed = m >= 1.0  # NaN stays NaN
        value, dx = tl.where(closed, 0.0, 1.0 - m), tl.where(closed, 0.0, -1.0)
        dy = -dx
    elif KIND == EXO:
        right, wrong = tl.load(own), tl.load(own + 1)
        value = sigmoid(m) * (log_sigmoid(m) - right) + sigmoid(-m) * (log_sigmoid(-m) - wrong)
        dx = sigmoid(m) * sigmoid(-m) * (m - right + wrong)
        dy = -dx
    elif KIND == NCA:
        value = -log_sigmoid(x) - 0.5 * log_sigmoid(-x) - 0.5 * log_sigmoid(-y)
        dx, dy = 0.5 * sigmoid(x) - sigmoid(-x), 0.5 * sigmoid(y)
    elif KIND == BCO:
        value = -log_sigmoid(x) - log_sigmoid(-y)
        dx, dy = -sigmoid(-x), sigmoid(y)
    elif KIND == SPPO:
        aim = tl.load(own)
        dx, dy, scale = chosen - aim, rejected + aim, 2.0
        value = dx * dx + dy * dy
    elif KIND == APO_ZERO:
        value = sigmoid(-x) + sigmoid(y)
        dx, dy = -sigmoid(x) * sigmoid(-x), sigmoid(y) * sigmoid(-y)
    elif KIND == APO_DOWN:
        value = sigmoid(x) + sigmoid(-m)
        dy = sigmoid(m) * sigmoid(-m)
        dx = sigmoid(x) * sigmoid(-x) - dy
    else:  # DISCO
        tau = tl.load(own)
        # one exponential of m / tau's log s and of -m: for m << 0 it is 0, where e^-m is inf
        blended = tl.exp(log_sigmoid(m / tau) - m)
        value = blended - sigmoid(-m / tau) * log_sigmoid(m)
        dx = blended * (sigmoid(-m / tau) / tau - 1.0) - sigmoid(-m / tau) * sigmoid(-m)
        dx += sigmoid(m / tau) * sigmoid(-m / tau) / tau * log_sigmoid(m)
        dy = -dx
    return value, scale * dx, scale * dy


@triton.jit(do_not_specialize=["width", "programs"])
def preference_loss(
    logp,  # [N]
    ref,  # [N], or None: the log-ratio is logp
    token_weight,  # [N], or None
    margin,  # [P], or None
    target,  # [N], or None
    offsets,  # [S+1], or None
    params,  # [14]: scale, power, Humanline's bounds, log 2, own
    divisor,  # []
    c,  # [N], or None
    partials,  # [K, P]
    counter,  # []
    sums,  # [K]: loss, live tokens, strictly inside; both sides' log-probs, and rewards; accuracies, margins
    width,
    programs,
    KIND: tl.constexpr,
    SCORE: tl.constexpr,
    MEAN: tl.constexpr,
    HUMANLINE: tl.constexpr,
    METRICS: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    p = tl.program_id(0).to(tl.int64)
    begin, end = span(p, offsets, width)
    other_begin, other_end = span(p + programs, offsets, width)
    scale, bounds = tl.load(params), params + 2
    count, total, logps, inside = read_side(
        logp, ref, token_weight, target, begin, end, bounds, HUMANLINE, METRICS, BLOCK
    )
    other_count, other_total, other_logps, other_inside = read_side(
        logp, ref, token_weight, target, other_begin, other_end, bounds, HUMANLINE, METRICS, BLOCK
    )
    out = partials + p
    if METRICS:
        tl.store(out + programs, count + other_count)
        tl.store(out + 2 * programs, inside + other_inside)
        tl.store(out + 3 * programs, logps)
        tl.store(out + 4 * programs, other_logps)
    chosen, slope = score_of(total, count, params, MEAN, SCORE)
    rejected, other_slope = score_of(other_total, other_count, params, MEAN, SCORE)
    if METRICS:
        reward, other_reward = scale * chosen, scale * rejected
        tl.store(out + 5 * programs, reward)
        tl.store(out + 6 * programs, other_reward)
        tl.store(out + 7 * programs, tl.where(reward > other_reward, 1.0, 0.0))
        tl.store(out + 8 * programs, reward - other_reward)
    weight = scale * 0.0 + 1.0
    if margin is not None:
        weight = adaptive_weight(read(margin, p, p >= 0, logp), params + 9)
    value, by_chosen, by_rejected = pair_terms(chosen, rejected, scale, params + 5, weight, KIND)
    share = 1.0 / tl.load(divisor)
    tl.store(out, value * share)
    if c is not None:
        by_chosen, by_rejected = share * by_chosen * slope, share * by_rejected * other_slope
        write_side(by_chosen, logp, ref, token_weight, target, c, begin, end, bounds, HUMANLINE, BLOCK)
        write_side(
            by_rejected, logp, ref, token_weight, target, c, other_begin, other_end, bounds, HUMANLINE, BLOCK
        )
    add_up(partials, counter, sums, programs, K, ROWS)


# ---- judged sequences ----------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["width", "programs"])
def judged_loss(
    logp,  # [N]
    ref,  # [N]
    token_weight,  # [N], or None
    desirable,  # [S] uint8
    kl,  # [], or None: 0
    target,  # [N], or None
    offsets,  # [S+1], or None
    params,  # [5]: beta, the weight of desirable ones, Humanline's bounds, the weight of the others
    divisor,  # []
    c,  # [N], or None
    partials,  # [K, S]
    counter,  # []
    sums,  # [K]: loss, live tokens, strictly inside; desirable ones; both kinds' log-probs, and rewards
    width,
    programs,
    HUMANLINE: tl.constexpr,
    METRICS: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    s = tl.program_id(0).to(tl.int64)
    begin, end = span(s, offsets, width)
    beta, bounds = tl.load(params), params + 2
    count, total, logps, inside = read_side(
        logp, ref, token_weight, target, begin, end, bounds, HUMANLINE, METRICS, BLOCK
    )
    good = tl.load(desirable + s) != 0
    reward = beta * total
    out = partials + s
    if METRICS:
        tl.store(out + programs, count)
        tl.store(out + 2 * programs, inside)
        tl.store(out + 3 * programs, tl.where(good, 1.0, 0.0))
        tl.store(out + 4 * programs, tl.where(good, logps, 0.0))
        tl.store(out + 5 * programs, tl.where(good, 0.0, logps))
        tl.store(out + 6 * programs, tl.where(good, reward, 0.0))
        tl.store(out + 7 * programs, tl.where(good, 0.0, reward))
    distance = reward
    if kl is not None:
        distance = reward - beta * read(kl, s * 0, s >= 0, logp)
    # w (1 - s(x)) = w s(-x), x the distance of a desirable one, or its negative
    x = tl.where(good, distance, -distance)
    weight = tl.where(good, tl.load(params + 1), tl.load(params + 4)) / tl.load(divisor)
    tl.store(out, weight * sigmoid(-x))
    if c is not None:
        by_total = weight * beta * sigmoid(x) * sigmoid(-x)
        write_side(
            tl.where(good, -by_total, by_total),
            logp, ref, token_weight, target, c, begin, end, bounds, HUMANLINE, BLOCK,
        )  # fmt: skip
    add_up(partials, counter, sums, programs, K, ROWS)
