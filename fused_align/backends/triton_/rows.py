"""Kernels over the rows of a chunk: their targets' logits, their statistics, their coefficients.

Row vectors are a millionth of a tile, so what is summed over a vocabulary is worked on in float64.
"""

# pyright: reportGeneralTypeIssues=false
# (it takes a function under @triton.jit for one that never returns)

import triton
import triton.language as tl

from ..operands import LOWEST as LOWEST_
from ..operands import SHIFT as SHIFT_
from ..operands import STEEP as STEEP_
from .maths import LN2, LOG2E, capped, finish, rounded

LOWEST = tl.constexpr(LOWEST_)
SHIFT = tl.constexpr(SHIFT_)
STEEP = tl.constexpr(STEEP_)
ALIVE = tl.constexpr(1)
LOST = tl.constexpr(2)
MOVED = tl.constexpr(4)


@triton.jit(do_not_specialize=["rows"])
def open_rows(
    x,  # [r, H]
    weight,  # [V, H]
    bias,  # [V] | None
    target,  # [r]
    inverse,  # [r] | [1]
    z,  # [r] out, as the following
    ref,  # [r]
    slope,  # [r] | None
    rows,
    hidden,  # H
    x_stride,
    x_step,
    weight_stride,
    weight_step,
    inverse_stride,  # 0: one temperature for all
    SCALE: tl.constexpr,  # logit_scale
    CAP: tl.constexpr,  # softcap | None
    OPERAND: tl.constexpr,  # the weight is rounded to this first | None
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """The targets' logits by gather and dot, and the references from them; see `torch_.open_rows`."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    live = row < rows
    y = tl.load(target + row, mask=live, other=0)
    WORK: tl.constexpr = z.dtype.element_ty
    sums = tl.zeros((ROWS, COLS), WORK)
    for first in range(0, hidden, COLS):
        column = first + tl.arange(0, COLS).to(tl.int64)  # a column step may be as large
        inside = live[:, None] & (column < hidden)[None, :]
        a = tl.load(x + row[:, None] * x_stride + column[None, :] * x_step, mask=inside, other=0)
        w = tl.load(weight + y[:, None] * weight_stride + column[None, :] * weight_step, mask=inside, other=0)
        if OPERAND is not None:
            w = rounded(w, OPERAND)
        sums += a.to(WORK) * w.to(WORK)
    dot = tl.sum(sums, 1)
    if bias is not None:
        dot += tl.load(bias + y, mask=live, other=0).to(WORK)
    logit = dot.to(tl.float64) * SCALE
    if CAP is not None:
        tanh, steepness = capped(logit / CAP)
        logit = tanh * CAP
        tl.store(slope + row, steepness.to(WORK), mask=live)
    logit = (logit * tl.load(inverse + row * inverse_stride, mask=live, other=1)).to(WORK)
    tl.store(z + row, logit, mask=live)
    tl.store(ref + row, tl.floor(logit.to(tl.float64) * LOG2E + SHIFT + 0.5).to(WORK), mask=live)


@triton.jit
def row_sums(z, ref, total, row, live):
    """The vectors of some rows, float64; harmless numbers past the last row."""
    zs = tl.load(z + row, mask=live, other=0).to(tl.float64)
    refs = tl.load(ref + row, mask=live, other=0).to(tl.float64)
    return zs, refs, tl.load(total + row, mask=live, other=1).to(tl.float64)


@triton.jit(do_not_specialize=["rows"])
def finish_rows(
    z,  # [r]
    ref,  # [r]
    total,  # [r]
    moment,  # [r] float64 | None
    pivot,  # [r] float64 | None
    average,  # [r] float64 | None
    squares,  # [r] float64 | None
    out,  # [5, r]
    rows,
    ROWS: tl.constexpr,
):
    """The statistics of rows, in the order of STATS; see `torch_.finish_rows`."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    live = row < rows
    zs, refs, totals = row_sums(z, ref, total, row, live)
    logp, _, inverse, offset = finish(zs, refs, totals)
    WORK: tl.constexpr = out.dtype.element_ty
    tl.store(out + row, logp.to(WORK), mask=live)
    tl.store(out + rows + row, (zs - logp).to(WORK), mask=live)
    entropy = tl.zeros((ROWS,), tl.float64)
    mean = tl.zeros((ROWS,), tl.float64)
    collision = tl.zeros((ROWS,), tl.float64)
    if moment is not None:
        distance = offset - tl.load(pivot + row, mask=live, other=0)
        to_target = tl.load(moment + row, mask=live, other=0) + distance * totals
        entropy = -logp - inverse * LN2 * to_target
    if average is not None:
        mean = tl.load(average + row, mask=live, other=0)
    if squares is not None:
        summed = tl.load(squares + row, mask=live, other=0) + tl.exp2(-2 * offset)
        collision = tl.log(summed) + 2 * tl.log(inverse)
    tl.store(out + 2 * rows + row, entropy.to(WORK), mask=live)
    tl.store(out + 3 * rows + row, mean.to(WORK), mask=live)
    tl.store(out + 4 * rows + row, collision.to(WORK), mask=live)


@triton.jit(do_not_specialize=["rows"])
def coefficients(
    z,  # [r]
    ref,  # [r]
    total,  # [r]
    factor,  # [r]
    slope,  # [r] | None
    by_logp,  # [r]
    by_lse,  # [r] | None
    by_entropy,  # [r] | None
    by_average,  # [r] | None
    entropy,  # [r] | None
    after,  # [r] out, as the following: the reference where it is steep moves near the lse
    summed,  # [r] S against that
    on_rows,  # [r]
    on_target,  # [r]
    constant,  # [r] | None
    mixing,  # [r] | None
    on_average,  # [r] | None
    uniform,  # [r] | None
    flags,  # [r] int32
    rows,
    vocab,
    ROWS: tl.constexpr,
):
    """Upstream gradients of the statistics -> coefficients of dz; see `torch_.coefficients`."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    live = row < rows
    zs, refs, totals = row_sums(z, ref, total, row, live)
    logp, miss, inverse, offset = finish(zs, refs, totals)
    WORK: tl.constexpr = on_rows.dtype.element_ty
    c = tl.load(by_logp + row, mask=live, other=0).to(tl.float64)
    size, alive = tl.abs(c), c != 0
    others, on_y = c, c * miss
    p = tl.exp(logp)  # not 1 - miss, which would lose the digits of a small p
    if by_lse is not None:
        c = tl.load(by_lse + row, mask=live, other=0).to(tl.float64)
        size, alive = size + tl.abs(c), alive | (c != 0)
        others, on_y = others - c, on_y + c * p
    mean = tl.zeros((ROWS,), tl.float64)
    if by_average is not None:
        mean = tl.load(by_average + row, mask=live, other=0).to(tl.float64)
        size, alive = size + tl.abs(mean), alive | (mean != 0)
    shift = tl.zeros((ROWS,), tl.float64)
    bonus = tl.zeros((ROWS,), tl.float64)
    if by_entropy is not None:
        bonus = tl.load(by_entropy + row, mask=live, other=0).to(tl.float64)
        size, alive = size + tl.abs(bonus), alive | (bonus != 0)
        shift = bonus * (logp + tl.load(entropy + row, mask=live, other=0).to(tl.float64))
        on_y -= p * shift
    # a coefficient of e^60, a ratio at its cap, times 1/Z = 2^58 has no float32
    steep = size * inverse > STEEP
    moved = tl.where(steep, tl.floor(refs - tl.log2(inverse) + 0.5), refs)
    away = tl.exp2(moved - refs)
    inverse *= away
    offset += moved - refs
    tl.store(after + row, moved.to(WORK), mask=live)
    tl.store(summed + row, (totals / away).to(WORK), mask=live)
    factors = tl.load(factor + row, mask=live, other=0).to(tl.float64)
    on_y *= factors
    if slope is not None:
        on_y *= tl.load(slope + row, mask=live, other=0).to(tl.float64)
    tl.store(on_target + row, on_y.to(WORK), mask=live)
    if constant is not None:
        # z_v - z_y = ln 2 (x_v + offset): what is the same for a row is summed in float64
        slopes = -bonus * inverse * LN2
        tl.store(constant + row, (-(others + shift) * inverse + slopes * offset).to(WORK), mask=live)
        tl.store(mixing + row, slopes.to(WORK), mask=live)
        tl.store(on_rows + row, factors.to(WORK), mask=live)
    else:
        tl.store(on_rows + row, (-others * inverse * factors).to(WORK), mask=live)
    if on_average is not None:
        tl.store(on_average + row, (mean * factors).to(WORK), mask=live)
    if uniform is not None:
        tl.store(uniform + row, (mean / vocab).to(WORK), mask=live)
    flag = tl.where(alive, ALIVE, 0) | tl.where(logp >= LOWEST, 0, LOST) | tl.where(moved != refs, MOVED, 0)
    tl.store(flags + row, flag, mask=live)


@triton.jit(do_not_specialize=["rows"])
def compact(
    flags,  # [r] int32
    order,  # [r] int64 out: places of the rows that are alive, in order; behind them anything
    counts,  # [3] int64 out: how many those are; whether any was lost; whether any moved
    rows,
    ROWS: tl.constexpr,
):
    """One program: a running count places the rows of each block behind those of the blocks before."""
    found = tl.zeros((), tl.int64)
    seen = tl.zeros((ROWS,), tl.int32)
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)
        flag = tl.load(flags + row, mask=row < rows, other=0)
        alive = flag & ALIVE
        place = found + tl.cumsum(alive, 0) - alive
        tl.store(order + place, row.to(tl.int64), mask=alive == 1)
        found += tl.sum(alive, 0)
        seen |= flag
    tl.store(counts, found)
    tl.store(counts + 1, tl.max(seen & LOST, 0) // LOST)
    tl.store(counts + 2, tl.max(seen & MOVED, 0) // MOVED)
