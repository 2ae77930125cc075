"""What the fused loss kernels share: numbers in float64, a sequence's tokens, and the last sum.

A kernel goes from log-probs to the loss, its coefficients dloss/dlogp and the metrics' sums in one launch:

    policy_kernel.policy_loss           rho -> surrogate, sampler's correction, KL    a sequence per program
    preference_kernels.preference_loss  scores of the chosen and the rejected side    a pair
    preference_kernels.judged_loss      the score of a sequence, desirable or not     a sequence

A program walks over the tokens of its item, BLOCK at a time, in float64: the arithmetic costs nothing beside
the loads, and sums keep their digits. It walks again where a coefficient depends on a sum over the item;
nothing of size [N] is written but the coefficients.

Sequence s is row s of [S, width] where there are no `offsets`, else positions offsets[s] to offsets[s+1].
Positions whose target is ignored are never loaded from a column: what stands there cannot matter. `target` is
None where every position is live. Columns that are not given are None, which removes their code.

Formulas, and where gradients stop, are those of fused_align/losses. Hyperparameters come in `params`,
float64: Triton would round a Python float to float32.
"""

# pyright: reportGeneralTypeIssues=false
# (it takes a function under @triton.jit for one that never returns)

import triton
import triton.language as tl

from ...batch import IGNORE_INDEX
from .maths import clamped

IGNORE = tl.constexpr(IGNORE_INDEX)


# ---- tokens --------------------------------------------------------------------------------------------


@triton.jit
def span(
    s,  # [] int64, the sequence
    offsets,  # [S+1], or None
    width,
):
    """-> the first position of a sequence and the one past its last, int64."""
    if offsets is None:
        begin = s * width
        end = begin + width
    else:
        begin = tl.load(offsets + s).to(tl.int64)
        end = tl.load(offsets + s + 1).to(tl.int64)
    return begin, end


@triton.jit
def live_at(
    target,  # [N], or None
    at,  # [BLOCK] int64, positions
    end,
):
    """-> [BLOCK] bool: which positions count."""
    live = at < end
    if target is not None:
        live = live & (tl.load(target + at, mask=live, other=IGNORE) != IGNORE)
    return live


@triton.jit
def count_live(
    target,  # [N]
    begin,
    end,
    BLOCK: tl.constexpr,
):
    """-> [] float64: how many positions count."""
    count = tl.zeros([BLOCK], tl.float64)
    for start in range(begin, end, BLOCK):
        count += tl.where(live_at(target, start + tl.arange(0, BLOCK), end), 1.0, 0.0)
    return tl.sum(count)


@triton.jit
def read(
    column,  # [N]
    at,  # [BLOCK] int64
    live,  # [BLOCK] bool
    logp,  # [N], whose dtype the losses take every column in
):
    """-> [BLOCK] float64, 0 where not live."""
    x = tl.load(column + at, mask=live, other=0.0)
    return x.to(logp.dtype.element_ty).to(tl.float64)


@triton.jit
def read_both(
    logp,  # [N]
    anchor,  # [N], or None: logp itself, without gradient
    at,  # [BLOCK] int64
    live,  # [BLOCK] bool
):
    """-> log-probs and the anchor's, [BLOCK] float64, 0 where not live."""
    x = read(logp, at, live, logp)
    y = x
    if anchor is not None:
        y = read(anchor, at, live, logp)
    return x, y


@triton.jit
def weight_at(
    token_weight,  # [N], or None
    at,  # [BLOCK] int64
    live,  # [BLOCK] bool
    factor,  # [] float64
    BLOCK: tl.constexpr,
):
    """-> [BLOCK] float64: the weights of the tokens, times a factor."""
    if token_weight is None:
        weight = tl.full([BLOCK], 1.0, tl.float64) * factor
    else:
        weight = tl.load(token_weight + at, mask=live, other=0.0).to(tl.float64) * factor
    return weight


@triton.jit
def clip(
    log_ratio,  # [BLOCK] float64
    bounds,  # [2] float64
    HUMANLINE: tl.constexpr,
):
    """-> the log-ratio clipped by Humanline; whether it has a gradient; whether it is strictly inside."""
    low, high = tl.load(bounds), tl.load(bounds + 1)
    if HUMANLINE:
        passes = (log_ratio >= low) & (log_ratio <= high)
        inside = (log_ratio > low) & (log_ratio < high)
        clipped = clamped(log_ratio, low, high)
    else:
        passes = tl.full(log_ratio.shape, 1, tl.int1)
        inside = passes
        clipped = log_ratio
    return clipped, passes, inside


@triton.jit
def add_up(
    partials,  # [K, programs] float64
    counter,  # [] int32, 0 before the launch
    sums,  # [K] float64
    programs,
    K: tl.constexpr,
    ROWS: tl.constexpr,  # K or more, a power of two
):
    """The program that finishes last adds what all have written, in a fixed order: the same bits every time.

    The barrier puts the writes of all of a program's threads before its own step of the counter; the step
    releases them to the device, and acquires those of every program that stepped before. So whoever finds
    all the others' steps done sees all partial sums. They are read past the L1 cache (.cg), which is not
    coherent and might hold lines from before.
    """
    tl.debug_barrier()
    done = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
    if done == programs - 1:
        row = tl.arange(0, ROWS)[:, None]
        total = tl.zeros([ROWS, 256], tl.float64)
        for first in range(0, programs, 256):
            col = first + tl.arange(0, 256)[None, :]
            place = partials + row.to(tl.int64) * programs + col
            total += tl.load(place, mask=(row < K) & (col < programs), other=0.0, cache_modifier=".cg")
        out = tl.arange(0, ROWS)
        tl.store(sums + out, tl.sum(total, 1), mask=out < K)
