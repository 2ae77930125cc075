"""Per-token statistics of logits that exist already: one read forward, one read and one write backward.

`torch_logits` has the formulas. One pass keeps a running maximum, and the sums against it, in every column of
a block of its own: an online softmax with no reduction inside the loop. Where a new maximum comes the old
sums are scaled, else the new term is: one exponential for either.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...batch import IGNORE_INDEX
from ..kernel_steps import dense
from ..logit_steps import check_columns, check_gradient, new_stats
from ..torch_logits import NOTHING, LogitStats
from . import interpreted, on_device
from .maths import INTERPRETED, expm1, log_sigmoid, rounded

_IGNORE = tl.constexpr(IGNORE_INDEX)
_NOTHING = tl.constexpr(NOTHING)

# (rows, columns, warps) of a program, by the bytes of a logit: two loads of 16 bytes per thread and block
BLOCKS = {2: (1, 4096, 8), 4: (1, 2048, 8), 8: (1, 1024, 8)}
IN_PYTHON = (16, 256, 1)  # few programs, each slow; columns that make the tests loop


@triton.jit
def _keep_above(x, LEAST: tl.constexpr):
    """max(x, LEAST), but NaN stays NaN."""
    return tl.where(x < LEAST, LEAST, x)


@triton.jit
def _forward_kernel(
    logits,  # [M, V]
    target,  # [M]
    inverse,  # [M] | None, 1 / temperature
    logp,  # [M] out
    lse,  # [M] out
    entropy,  # [M] out | None
    largest,  # [M] out
    total,  # [M] out
    scalar,  # 1 / temperature where inverse is None
    rows,
    vocab,
    stride,  # of a row of logits
    FLOOR: tl.constexpr,  # the lowest number: from -inf on, -inf - -inf would be NaN
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    work = logp.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    known = row < rows
    y = tl.load(target + row, mask=known, other=_IGNORE)
    live = y != _IGNORE
    inside = live & (y >= 0) & (y < vocab)
    if inverse is None:
        scale = tl.full((ROWS,), 1.0, work) * scalar
    else:
        scale = tl.load(inverse + row, mask=live, other=1.0)
    start = logits + row * stride
    z_y = tl.load(start + tl.where(inside, y, 0), mask=inside, other=-float("inf")).to(work) * scale
    z_y = tl.where(live, z_y, 0.0)

    best = tl.full((ROWS, COLS), FLOOR, work)
    others = tl.zeros((ROWS, COLS), work)
    moment = tl.zeros((ROWS, COLS), work)
    lively = tl.max(live.to(tl.int32), 0)  # ignored rows read nothing
    for first in range(0, vocab * lively, COLS):
        col = first + tl.arange(0, COLS)
        here = live[:, None] & (col < vocab)[None, :]
        z = tl.load(start[:, None] + col[None, :], mask=here, other=-float("inf")).to(work) * scale[:, None]
        z = tl.where(col[None, :] == y[:, None], -float("inf"), z)
        higher = z > best
        apart = tl.where(higher, best - z, z - best)  # -|z - best|
        if entropy is not None:
            apart = _keep_above(apart, _NOTHING)
        e = tl.exp(apart)
        if entropy is not None:
            moment = tl.where(higher, (moment + others * apart) * e, moment + e * apart)
        others = tl.where(higher, others * e + 1.0, others + e)
        best = tl.where(higher, z, best)

    top = tl.maximum(tl.max(best, 1), z_y)
    gap = z_y.to(tl.float64) - top.to(tl.float64)
    apart = best - top[:, None]
    if entropy is not None:
        apart = _keep_above(apart, _NOTHING)
    e = tl.exp(apart)
    O = tl.sum(others * e, 1).to(tl.float64)  # noqa: E741
    odds = tl.where(O == 0.0, -float("inf"), tl.log(tl.where(O == 0.0, 1.0, O))) - gap
    value = log_sigmoid(-odds)
    p = tl.where(inside, tl.exp(gap), 0.0)
    Z = tl.where(live, O + p, 1.0)
    log_Z = tl.log(Z)
    tl.store(logp + row, tl.where(live, tl.where(inside, value, float("nan")), 0.0).to(work), mask=known)
    tl.store(lse + row, tl.where(live, top.to(tl.float64) + log_Z, 0.0).to(work), mask=known)
    tl.store(largest + row, tl.where(live, top, 0.0), mask=known)
    tl.store(total + row, tl.where(live, Z, 0.0).to(work), mask=known)
    if entropy is not None:
        A = tl.sum((moment + others * apart) * e, 1).to(tl.float64)
        H = log_Z - (A + p * _keep_above(gap, _NOTHING)) / Z
        tl.store(entropy + row, tl.where(live, H, 0.0).to(work), mask=known)


@triton.jit
def _backward_kernel(
    dlogp,  # [M]
    dlse,  # [M] | None
    dentropy,  # [M] | None
    logits,  # [M, V]
    target,  # [M]
    logp,  # [M]
    entropy,  # [M]; read iff dentropy is given
    largest,  # [M]
    total,  # [M]
    inverse,  # [M] | None
    out,  # [M, V] out; may be logits
    scalar,
    rows,
    vocab,
    stride,  # of a row of logits
    out_stride,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    work = logp.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    known = row < rows
    y = tl.load(target + row, mask=known, other=_IGNORE)
    live = y != _IGNORE
    c = tl.load(dlogp + row, mask=live, other=0.0).to(work)
    slope = -c  # of the logits other than the target's, over p_v
    alive = c != 0.0
    if dlse is not None:
        c_lse = tl.load(dlse + row, mask=live, other=0.0).to(work)
        slope += c_lse
        alive = alive | (c_lse != 0.0)
    if dentropy is not None:
        c_entropy = tl.load(dentropy + row, mask=live, other=0.0).to(work)
        alive = alive | (c_entropy != 0.0)
    alive = alive & live  # other rows are not read
    if inverse is None:
        scale = tl.full((ROWS,), 1.0, work) * scalar
    else:
        scale = tl.load(inverse + row, mask=alive, other=1.0)
    top = tl.load(largest + row, mask=alive, other=0.0)
    Z = tl.load(total + row, mask=alive, other=1.0)
    value = tl.load(logp + row, mask=alive, other=0.0)
    # from logp and not from 1 - e^(z_y - top) / Z: a sure token keeps its digits
    own = c * (-expm1(value.to(tl.float64))).to(work)
    p_y = tl.exp(value)
    if dlse is not None:
        own += c_lse * p_y
    if dentropy is not None:
        H = tl.load(entropy + row, mask=alive, other=0.0)
        log_Z = tl.log(Z)
        own -= c_entropy * p_y * (_keep_above(value, _NOTHING) + H)
        slope -= c_entropy * (H - log_Z)
    own = own * scale
    slope = tl.where(value == value, slope * scale / Z, value)  # of a target outside [0, V) too
    if dentropy is not None:
        bend = c_entropy * scale / Z

    start = logits + row * stride
    into = out + row * out_stride
    for first in range(0, vocab, COLS):
        col = first + tl.arange(0, COLS)
        valid = (col < vocab)[None, :]
        here = alive[:, None] & valid
        z = tl.load(start[:, None] + col[None, :], mask=here, other=-float("inf")).to(work)
        apart = z * scale[:, None] - top[:, None]
        if dentropy is None:
            grad = tl.exp(apart) * slope[:, None]
        else:
            apart = _keep_above(apart, _NOTHING)
            grad = tl.exp(apart) * (slope[:, None] - bend[:, None] * apart)
        grad = tl.where(col[None, :] == y[:, None], own[:, None], grad)
        grad = tl.where(alive[:, None], grad, 0.0)
        stored = rounded(grad, out.dtype.element_ty)
        if INTERPRETED:  # whose subnormal bfloat16 are not
            stored = tl.where(grad == 0.0, tl.zeros_like(stored), stored)
        tl.store(into[:, None] + col[None, :], stored, mask=known[:, None] & valid)


def logit_stats(
    logits: Tensor,  # [M, V], rows any stride apart
    target: Tensor,  # [M] int64
    inverse: Tensor | None,  # [M], 1 / temperature
    scalar: float,  # 1 / temperature where inverse is None
    *,
    entropy: bool = False,
) -> LogitStats:
    """logp, lse, entropy (or None), and what the backward needs besides, of every row; 0 of ignored ones.

    logits are float64, float32, bfloat16 or float16; they are read once, ignored rows not at all. A target
    outside [0, V) gives a logp of NaN.
    """
    check_columns(logits, "logits")
    stats = new_stats(logits, entropy)
    work, count = stats.logp.dtype, logits.shape[0]
    sizes: dict[str, Any] = _sizes(logits) | {"FLOOR": torch.finfo(work).min}
    if count:
        with on_device(logits.device):
            _forward_kernel[(triton.cdiv(count, sizes["ROWS"]),)](
                logits,
                target.contiguous(),
                _scale(inverse, scalar, logits, work),
                stats.logp,
                stats.lse,
                stats.entropy,
                stats.largest,
                stats.total,
                float(scalar),
                count,
                logits.shape[1],
                logits.stride(0),
                **sizes,
            )
    return stats


def logit_gradient(
    dlogp: Tensor,  # [M]
    dlse: Tensor | None,  # [M]
    dentropy: Tensor | None,  # [M]
    logits: Tensor,  # [M, V]
    target: Tensor,  # [M] int64
    stats: LogitStats,
    inverse: Tensor | None,  # [M]
    scalar: float,
    *,
    out: Tensor,  # [M, V]
) -> None:
    """Writes the gradient of the logits to out, which may be the logits themselves.

    Rows that are ignored, or whose coefficients are all 0, are not read and get zeros.
    """
    check_gradient(logits, out, dentropy, stats)
    work, count = stats.logp.dtype, logits.shape[0]
    sizes = _sizes(logits)
    if not count:
        return
    with on_device(logits.device):
        _backward_kernel[(triton.cdiv(count, sizes["ROWS"]),)](
            dlogp.contiguous(),
            dense(dlse),
            dense(dentropy),
            logits,
            target.contiguous(),
            stats.logp,
            stats.entropy,
            stats.largest,
            stats.total,
            _scale(inverse, scalar, logits, work),
            out,
            float(scalar),
            count,
            logits.shape[1],
            logits.stride(0),
            out.stride(0),
            **sizes,
        )


def _sizes(logits: Tensor) -> dict[str, Any]:
    rows, cols, warps = IN_PYTHON if interpreted() else BLOCKS[logits.dtype.itemsize]
    return {"ROWS": rows, "COLS": cols, "num_warps": warps}


def _scale(inverse: Tensor | None, scalar: float, logits: Tensor, work: torch.dtype) -> Tensor | None:
    """1 / temperature as the kernels take it. A number would reach them in float32: too short for float64."""
    if inverse is not None:
        return inverse.to(work).contiguous()
    if work == torch.float64 and scalar != 1:
        return logits.new_full((logits.shape[0],), scalar, dtype=work)
    return None
