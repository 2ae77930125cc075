"""Kernels over one tile of logits [r, v]: one read of it, and one write where something is written.

A program takes ROWS rows and goes over their columns in blocks of COLS, so that sums need no second kernel
and no atomics: the order of additions is fixed. Sums are kept per column of a block and added up at the end.
"""

# pyright: reportGeneralTypeIssues=false
# (it takes a function under @triton.jit for one that never returns)

import triton
import triton.language as tl

from ..operands import CEILING as CEILING_
from .maths import INF, LN2, capped, rounded

CEILING = tl.constexpr(CEILING_)


@triton.jit
def exponents(
    logits,  # [r, v] a block of raw logits, in the dtype of the sums
    bias,  # [v] | None
    column,  # [v]
    inside,  # [v]
    gain,  # [r]
    INNER: tl.constexpr,  # of the logit inside tanh; None: no cap
):
    """Raw logits -> z log2(e), and the cap's 1 - tanh^2 (1 without a cap)."""
    if bias is not None:
        logits += tl.load(bias + column, mask=inside, other=0).to(logits.dtype)[None, :]
    slope = 1.0
    if INNER is not None:
        logits, slope = capped(logits * INNER)
    return logits * gain[:, None], slope


@triton.jit(do_not_specialize=["rows", "start"])
def exp_tile(
    logits,  # [r, v] raw
    out,  # [r, v] | None
    product,  # [r, H] | None
    bias,  # [v] | None
    target,  # [r]
    gain,  # [r]
    ref,  # [r]
    moved,  # [r] out: the reference after it | None: no watching
    total,  # [r] added to, as the following
    moment,  # [r] float64 | None
    pivot,  # [r] float64 | None
    squares,  # [r] float64 | None
    average,  # [r] float64 | None
    rows,
    cols,
    start,  # the tile's first column in the vocabulary
    hidden,  # H
    vocab,  # V
    logits_stride,
    out_stride,
    product_stride,
    INNER: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """E of a tile and its sums; see `torch_.exp_tile`."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    live = row < rows
    y = tl.load(target + row, mask=live, other=-1) - start
    gains = tl.load(gain + row, mask=live, other=0)
    at = tl.load(ref + row, mask=live, other=0)
    WORK: tl.constexpr = at.dtype
    s = tl.load(total + row, mask=live, other=0)
    m = s.to(tl.float64)
    pivots = s.to(tl.float64)
    q = s.to(tl.float64)
    if moment is not None:
        m = tl.load(moment + row, mask=live, other=0)
        pivots = tl.load(pivot + row, mask=live, other=0)
    if squares is not None:
        q = tl.load(squares + row, mask=live, other=0)
    if moved is not None:
        # a first read for the largest exponent; the second finds the rows in the cache
        top = tl.full((ROWS, COLS), -INF, WORK)
        for first in range(0, cols, COLS):
            column = first + tl.arange(0, COLS)
            inside = live[:, None] & (column < cols)[None, :]
            a = tl.load(logits + row[:, None] * logits_stride + column[None, :], mask=inside, other=0)
            x, _ = exponents(a.to(WORK), bias, column, column < cols, gains, INNER)
            top = tl.maximum(top, tl.where(inside, x - at[:, None], -INF))
        most = tl.max(top, 1)
        jump = tl.where(most > CEILING, tl.ceil(most), 0.0)
        at += jump
        tl.store(moved + row, at, mask=live)
        down = tl.exp2(-jump)
        if moment is not None:
            after = tl.where(jump > 0, 0.0, pivots)
            m = (m + (after - pivots - jump) * s) * down
            pivots = after
            tl.store(pivot + row, pivots, mask=live)
        s *= down
        q *= down.to(tl.float64) * down.to(tl.float64)
        if product is not None:  # noqa: SIM102  (known to the compiler, unlike the next)
            if tl.max(jump, 0) > 0:
                for first in range(0, hidden, COLS):
                    column = first + tl.arange(0, COLS)
                    where = product + row[:, None] * product_stride + column[None, :]
                    inside = live[:, None] & (column < hidden)[None, :]
                    tl.store(where, tl.load(where, mask=inside, other=0) * down[:, None], mask=inside)
    sums = tl.zeros((ROWS, COLS), WORK)
    moments = tl.zeros((ROWS, COLS), WORK)
    logit = tl.zeros((ROWS, COLS), WORK)
    for first in range(0, cols, COLS):
        column = first + tl.arange(0, COLS)
        inside = live[:, None] & (column < cols)[None, :]
        a = tl.load(logits + row[:, None] * logits_stride + column[None, :], mask=inside, other=0)
        z, slope = exponents(a.to(WORK), bias, column, column < cols, gains, INNER)
        x = z - at[:, None]
        e = tl.where(inside & (column[None, :] != y[:, None]), tl.exp2(x), 0)
        sums += e
        if moment is not None:
            moments += times(e, x + pivots.to(WORK)[:, None])
        if squares is not None:
            wide = e.to(tl.float64)  # float32 has no range for the squares
            q += tl.sum(wide * wide, 1)
        if average is not None:
            logit += tl.where(inside, z, 0)
        if out is not None:
            e = rounded(e * slope, out.dtype.element_ty)
            tl.store(out + row[:, None] * out_stride + column[None, :], e, mask=inside)
    tl.store(total + row, s + tl.sum(sums, 1), mask=live)
    if moment is not None:
        tl.store(moment + row, m + tl.sum(moments, 1), mask=live)
    if squares is not None:
        tl.store(squares + row, q, mask=live)
    if average is not None:
        before = tl.load(average + row, mask=live, other=0)
        tl.store(average + row, before + tl.sum(logit, 1).to(tl.float64) * LN2 / vocab, mask=live)


@triton.jit(do_not_specialize=["rows", "start"])
def grad_tile(
    logits,  # [r, v] raw
    out,  # [r, v]
    bias,  # [v] | None
    target,  # [r]
    gain,  # [r]
    ref,  # [r]
    constant,  # [r] | None
    slope_of,  # [r] | None
    uniform,  # [r] | None
    rows,
    cols,
    start,
    logits_stride,
    out_stride,
    INNER: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """What the gradient GEMMs take of a tile; see `torch_.grad_tile`."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    live = row < rows
    y = tl.load(target + row, mask=live, other=-1) - start
    gains = tl.load(gain + row, mask=live, other=0)
    at = tl.load(ref + row, mask=live, other=0)
    column = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = live[:, None] & (column < cols)[None, :]
    a = tl.load(logits + row[:, None] * logits_stride + column[None, :], mask=inside, other=0)
    z, slope = exponents(a.to(at.dtype), bias, column, column < cols, gains, INNER)
    x = z - at[:, None]
    e = tl.where(column[None, :] != y[:, None], tl.exp2(x), 0)
    if constant is not None:
        e = mixed(e, x, constant, slope_of, row, live)
    if uniform is not None:
        e += tl.load(uniform + row, mask=live, other=0)[:, None]
    e = rounded(e * slope, out.dtype.element_ty)
    tl.store(out + row[:, None] * out_stride + column[None, :], e, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def kept_tile(
    kept,  # [r', v]
    out,  # [r, v]
    live,  # [r] | None
    before,  # [r] | None
    after,  # [r] | None
    constant,  # [r] | None
    slope_of,  # [r] | None
    rows,
    cols,
    kept_stride,
    out_stride,
    TINY: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """The same of a tile that was kept; see `torch_.kept_tile`."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    here = row < rows
    place = row
    if live is not None:
        place = tl.load(live + row, mask=here, other=0)
    column = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = here[:, None] & (column < cols)[None, :]
    e = tl.load(kept + place[:, None] * kept_stride + column[None, :], mask=inside, other=0)
    if before is not None:
        shift = tl.load(before + row, mask=here, other=0) - tl.load(after + row, mask=here, other=0)
        e = e.to(shift.dtype) * tl.exp2(shift)[:, None]
    if constant is not None:
        e = mixed(e, tl.log2(tl.maximum(e, TINY)), constant, slope_of, row, here)
    tl.store(out + row[:, None] * out_stride + column[None, :], rounded(e, out.dtype.element_ty), mask=inside)


@triton.jit
def mixed(e, x, constant, slope_of, row, live):
    """E times a + b x."""
    a = tl.load(constant + row, mask=live, other=0)[:, None]
    b = tl.load(slope_of + row, mask=live, other=0)[:, None]
    return times(e, a + b * x)


@triton.jit
def times(e, x):
    """e x, where e = 0 makes 0 of an infinite x: a word that a bias of -inf forbids."""
    return tl.where(e == 0, 0.0, e * x)


@triton.jit(do_not_specialize=["rows"])
def add_products(
    out,  # [v] added to
    tile,  # [r, v]
    coef,  # [r]
    rows,
    cols,
    tile_stride,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """out += coef @ tile."""
    column = tl.program_id(0) * COLS + tl.arange(0, COLS)
    inside = column < cols
    sums = tl.zeros((ROWS, COLS), out.dtype.element_ty)
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS).to(tl.int64)
        live = row < rows
        c = tl.load(coef + row, mask=live, other=0)
        where = tile + row[:, None] * tile_stride + column[None, :]
        sums += c[:, None] * tl.load(where, mask=live[:, None] & inside[None, :], other=0).to(sums.dtype)
    tl.store(out + column, tl.load(out + column, mask=inside) + tl.sum(sums, 0), mask=inside)
