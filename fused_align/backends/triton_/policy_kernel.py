"""The policy-gradient losses in one kernel: losses/policy.py, clipped.py and weighted.py, token by token."""

# pyright: reportGeneralTypeIssues=false
# (it takes a function under @triton.jit for one that never returns)

import triton
import triton.language as tl

from ..codes import Penalty, RatioOf, Sampler, Surrogate
from .loss_kernels import add_up, clip, count_live, live_at, read, read_both, span, weight_at
from .maths import clamped, expm1, finite_exp, sigmoid

CLIPPED = tl.constexpr(Surrogate.CLIPPED.value)
CISPO = tl.constexpr(Surrogate.CISPO.value)
SAPO = tl.constexpr(Surrogate.SAPO.value)

OF_TOKEN = tl.constexpr(RatioOf.TOKEN.value)
OF_SUM = tl.constexpr(RatioOf.SUM.value)

K1, K2 = tl.constexpr(Penalty.K1.value), tl.constexpr(Penalty.K2.value)

TRUNCATE = tl.constexpr(Sampler.TRUNCATE.value)


@triton.jit
def surrogate(
    ratio,  # [BLOCK] float64, as all of these
    logp,
    log_ratio,
    advantage,
    own,  # [3] float64
    KIND: tl.constexpr,
):
    """-> the surrogate; its derivative by the ratio; by the log-ratio beside it; tokens clipped low, high."""
    none = tl.zeros_like(logp)
    if KIND == CLIPPED:
        low, high, delta = tl.load(own), tl.load(own + 1), tl.load(own + 2)
        free = tl.where(ratio > delta, delta, ratio) * advantage
        held = clamped(ratio, low, high) * advantage
        # as torch.minimum: half of the gradient each where both are the same
        share = tl.where(free == held, 0.5, tl.where(free < held, 1.0, 0.0))
        value = -tl.where(free < held, free, held)
        by_free = tl.where(ratio <= delta, share, 0.0)
        by_held = tl.where((ratio >= low) & (ratio <= high), 1.0 - share, 0.0)
        by_ratio = -(by_free + by_held) * advantage
        beside = none
        cut_low = (ratio < low) & (advantage < 0.0)
        cut_high = (ratio > high) & (advantage > 0.0)
    elif KIND == CISPO:
        most, log_most = tl.load(own), tl.load(own + 1)
        beside = -tl.where(ratio > most, most, ratio) * advantage
        value = beside * logp
        by_ratio = none
        cut_low = none > 0.0
        cut_high = (log_ratio > log_most) & (advantage > 0.0)
    elif KIND == SAPO:
        temper = tl.where(advantage > 0.0, tl.load(own), tl.load(own + 1))
        x = temper * (ratio - 1.0)
        value = -4.0 / temper * sigmoid(x) * advantage
        by_ratio = -4.0 * sigmoid(x) * sigmoid(-x) * advantage
        beside = none
        cut_low = none > 0.0
        cut_high = cut_low
    else:  # REINFORCE
        value = -advantage * logp
        by_ratio = none
        beside = -advantage
        cut_low = none > 0.0
        cut_high = cut_low
    return value, by_ratio, beside, cut_low, cut_high


@triton.jit
def penalty(
    logp,  # [BLOCK] float64
    ref,  # [BLOCK] float64
    KL: tl.constexpr,
):
    """PolicyLoss.penalty: -> the estimate of KL(pi || ref), and its derivative by logp."""
    d = ref - logp
    if KL == K1:
        value, by_logp = -d, tl.full(d.shape, 1.0, tl.float64)
    elif KL == K2:
        value, by_logp = d * d / 2.0, -d
    else:
        near = tl.where(d > 60.0, 60.0, d)
        grown = expm1(near)
        value, by_logp = grown - near, tl.where(d <= 60.0, -grown, 0.0)
    return value, by_logp


@triton.jit
def charge(
    x,  # [BLOCK] float64, log-probs
    ratio,  # [BLOCK] float64, or []
    ref,  # [N]
    at,
    live,
    logp,  # [N], for its dtype
    beta,
    most,
    KL: tl.constexpr,
    CORRECTED: tl.constexpr,
):
    """beta KL, or beta rho KL: -> its value, its derivatives by the ratio and by logp, and KL."""
    kl, by_logp = penalty(x, read(ref, at, live, logp), KL)
    if CORRECTED:
        product = ratio * kl
        value = beta * tl.where(product > most, most, product)
        by_ratio = tl.where(product <= most, beta * kl, 0.0)
        direct = tl.where(product <= most, beta * ratio * by_logp, 0.0)
    else:
        value, by_ratio, direct = beta * kl, tl.zeros_like(kl), beta * by_logp
    return value, by_ratio, direct, kl


@triton.jit
def sampler_factor(
    log,  # log old - log sampler, float64
    bounds,  # [2] float64, logarithms
    SAMPLER: tl.constexpr,
):
    """PolicyLoss.correction, its exponential."""
    low, high = tl.load(bounds), tl.load(bounds + 1)
    if SAMPLER == TRUNCATE:
        factor, _ = finite_exp(clamped(log, low, high))
    else:
        factor, _ = finite_exp(log)
        factor = tl.where((log >= low) & (log <= high), factor, 0.0)
    return factor


@triton.jit
def corrected(value, by_ratio, beside, factor, most):  # [BLOCK] float64 each
    """The surrogate and its derivatives times the sampler's factor, within +-most."""
    value = value * factor
    within = tl.abs(value) <= most
    return (
        clamped(value, -most, most),
        tl.where(within, by_ratio * factor, 0.0),
        tl.where(within, beside * factor, 0.0),
    )


@triton.jit
def sequence_sums(
    logp,  # [N]
    old,  # [N], or None: logp
    sampler,  # [N], or None
    token_weight,  # [N], or None
    target,  # [N], or None
    begin,
    end,
    bounds,  # [2] float64, Humanline's
    HUMANLINE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """-> live tokens; the weighted sum of the clipped log-ratios; the sum of log old - log sampler."""
    count, total = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    away = tl.zeros([BLOCK], tl.float64)
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        live = live_at(target, at, end)
        x, y = read_both(logp, old, at, live)
        log_ratio, _, _ = clip(x - y, bounds, HUMANLINE)
        count += tl.where(live, 1.0, 0.0)
        total += tl.where(live, log_ratio * weight_at(token_weight, at, live, 1.0, BLOCK), 0.0)
        if sampler is not None:
            away += tl.where(live, y - read(sampler, at, live, logp), 0.0)
    return tl.sum(count), tl.sum(total), tl.sum(away)


@triton.jit
def write_coupled(
    logp,  # [N]
    old,  # [N], or None: logp
    ref,  # [N], or None
    token_weight,  # [N], or None
    target,  # [N], or None
    c,  # [N]
    begin,
    end,
    params,  # as of policy_loss
    ratio,  # [] float64, of the sequence
    pull,  # [] float64: dloss/d(log-ratio) of a token of weight 1
    share,  # [] float64
    KL: tl.constexpr,
    PENALISED: tl.constexpr,
    CORRECTED: tl.constexpr,
    HUMANLINE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The coefficients of a sequence whose tokens share one ratio, once all of them have pulled at it."""
    beta, most = tl.load(params), tl.load(params + 6)
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        live = live_at(target, at, end)
        x, y = read_both(logp, old, at, live)
        _, passes, _ = clip(x - y, params + 2, HUMANLINE)
        found = tl.where(passes, pull, 0.0)
        if PENALISED:
            _, _, direct, _ = charge(x, ratio, ref, at, live, logp, beta, most, KL, CORRECTED)
            found += share * direct
        found = tl.where(live, found * weight_at(token_weight, at, live, 1.0, BLOCK), 0.0)
        tl.store(c + at, found.to(c.dtype.element_ty), mask=at < end)


@triton.jit(do_not_specialize=["width", "programs"])
def policy_loss(
    logp,  # [N]
    old,  # [N], or None: logp itself, without gradient
    ref,  # [N], or None
    sampler,  # [N], or None
    advantage,  # [S], or [N] if PER_TOKEN
    token_weight,  # [N], or None
    target,  # [N], or None
    offsets,  # [S+1], or None
    lengths,  # [S], or None: a sequence's length is the number of its live tokens here
    params,  # [10]: beta, what a sequence is divided by, Humanline's bounds, the sampler's, MAX_ITEM, own
    divisor,  # []
    c,  # [N], or None
    partials,  # [K, S]
    counter,  # []
    sums,  # [K]: loss, live tokens, clipped low, clipped high, KL, strictly inside Humanline's bounds
    width,
    programs,
    KIND: tl.constexpr,
    RATIO: tl.constexpr,
    KL: tl.constexpr,  # of the penalty or of the metric
    PENALISED: tl.constexpr,
    CORRECTED: tl.constexpr,
    SAMPLER: tl.constexpr,
    WHOLE: tl.constexpr,  # the sampler's correction is the sequence's
    COUPLED: tl.constexpr,  # the tokens' ratio is one, with a gradient to all of them
    PER_LENGTH: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    HUMANLINE: tl.constexpr,
    METRICS: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    s = tl.program_id(0).to(tl.int64)
    begin, end = span(s, offsets, width)
    beta, most = tl.load(params), tl.load(params + 6)
    share = 1.0 / (tl.load(params + 1) * tl.load(divisor))
    length = (end - begin).to(tl.float64)
    total, away = length * 0.0, length * 0.0
    if RATIO != OF_TOKEN or WHOLE:
        length, total, away = sequence_sums(
            logp, old, sampler, token_weight, target, begin, end, params + 2, HUMANLINE, BLOCK
        )
    elif PER_LENGTH and target is not None:
        length = count_live(target, begin, end, BLOCK)
    if lengths is not None:
        length = tl.load(lengths + s).to(tl.float64)
    length = tl.where(length > 1.0, length, 1.0)
    share = share / length if PER_LENGTH else share
    whole, slope_of_whole = finite_exp(total if RATIO == OF_SUM else total / length)

    none = tl.zeros([BLOCK], tl.float64)
    loss, tokens, low, high, kls, insides, pull = none, none, none, none, none, none, none
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        live = live_at(target, at, end)
        x, y = read_both(logp, old, at, live)
        log_ratio, passes, inside = clip(x - y, params + 2, HUMANLINE)
        gain = read(advantage, at, live, logp) if PER_TOKEN else none + read(advantage, s, s >= 0, logp)
        weight = weight_at(token_weight, at, live, share, BLOCK)
        ratio, slope = none + whole, none + whole
        if RATIO == OF_TOKEN:
            ratio, slope = finite_exp(log_ratio)
        value, by_ratio, beside, cut_low, cut_high = surrogate(ratio, x, log_ratio, gain, params + 7, KIND)
        if SAMPLER != 0:
            log = none + away if WHOLE else y - read(sampler, at, live, logp)
            factor = sampler_factor(log, params + 4, SAMPLER)
            value, by_ratio, beside = corrected(value, by_ratio, beside, factor, most)
        direct = none
        if KL != 0:
            cost, cost_by_ratio, cost_direct, kl = charge(
                x, ratio, ref, at, live, logp, beta, most, KL, CORRECTED
            )
            kls += tl.where(live, kl, 0.0)
            if PENALISED:
                value, by_ratio, direct = value + cost, by_ratio + cost_by_ratio, cost_direct
        loss += tl.where(live, value * weight, 0.0)
        if c is not None:
            if COUPLED:
                pull += tl.where(live, by_ratio * weight, 0.0)
            else:
                found = tl.where(passes, by_ratio * slope + beside, 0.0) + direct
                found = tl.where(live, found * weight, 0.0)
                tl.store(c + at, found.to(c.dtype.element_ty), mask=at < end)
        if METRICS:
            tokens += tl.where(live, 1.0, 0.0)
            low += tl.where(live & cut_low, 1.0, 0.0)
            high += tl.where(live & cut_high, 1.0, 0.0)
            if HUMANLINE:
                insides += tl.where(live & inside, 1.0, 0.0)
    if COUPLED and c is not None:
        whole_pull = tl.sum(pull) * slope_of_whole
        write_coupled(
            logp, old, ref, token_weight, target, c, begin, end, params, whole,
            whole_pull if RATIO == OF_SUM else whole_pull / length, share,
            KL, PENALISED, CORRECTED, HUMANLINE, BLOCK,
        )  # fmt: skip
    out = partials + s
    tl.store(out, tl.sum(loss))
    if METRICS:
        tl.store(out + programs, tl.sum(tokens))
        tl.store(out + 2 * programs, tl.sum(low))
        tl.store(out + 3 * programs, tl.sum(high))
        tl.store(out + 4 * programs, tl.sum(kls))
        tl.store(out + 5 * programs, tl.sum(insides))
    add_up(partials, counter, sums, programs, K, ROWS)
