"""The steps in torch operations alone: the default on a CPU, and correct on any device.

Exponentials are taken in base 2, with log2(e) folded into the GEMM's scale, and against a row reference known
before the first tile:  E_tv = 2^(z_tv log2 e - ref_t).  On a CPU exp2 is also the fast one where most logits
lie far below the target's: exp slows down thirtyfold on subnormal results.

Every tensor argument is one tile or one vector of rows; `fused_align.linear.passes` does the looping.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LOG2E = 1 / math.log(2)
LN2 = math.log(2)
GATHER_BYTES = 1 << 20  # the target rows of the weight are gathered in blocks of this size


def why_not(device: torch.device) -> str | None:
    """None: torch runs wherever the tensors are."""
    return None


def gemm(out: Tensor, a: Tensor, b: Tensor, *, alpha: float = 1.0, beta: float = 0.0, rounded: bool = False):
    """out [m, n] <- beta*out + alpha * a [m, k] @ b [k, n], accumulated in out's dtype.

    16-bit operands: exact products with sums in out's dtype. CUDA has such a GEMM; a CPU upcasts them.
    rounded=True instead takes the GEMM's own 16-bit output, which is faster on a CPU.
    """
    if a.dtype == b.dtype == out.dtype:
        torch.addmm(out, a, b, alpha=alpha, beta=beta, out=out)
        return
    half = next((t.dtype for t in (a, b) if t.dtype in (torch.bfloat16, torch.float16)), None)
    # float16 lacks the range of the exponentials' tile, so it is paired with float32 by upcasting instead
    if half is not None and a.dtype != b.dtype and half == torch.bfloat16 and (rounded or out.is_cuda):
        a, b = a.to(half), b.to(half)
    if a.dtype == b.dtype == half and (rounded or out.is_cuda):
        product = torch.mm(a, b) if rounded else torch.mm(a, b, out_dtype=out.dtype)
        out.mul_(beta).add_(product, alpha=alpha) if beta else torch.mul(product, alpha, out=out)
        return
    torch.addmm(out, a.to(out.dtype), b.to(out.dtype), alpha=alpha, beta=beta, out=out)


def target_logit(
    x: Tensor,  # [n, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    target: Tensor,  # [n], in range
    operand: torch.dtype | None,  # the weight is rounded to this first
) -> Tensor:
    """h.W[y] + b, [n], by gather and dot."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    block = max(1, GATHER_BYTES // (x.shape[1] * dtype.itemsize))
    dots = [
        (rows.to(dtype) * _gather(weight, y, operand).to(dtype)).sum(1)
        for rows, y in zip(x.split(block), target.split(block), strict=True)
    ]
    logit = torch.cat(dots) if dots else x.new_zeros(0, dtype=dtype)
    return logit if bias is None else logit + bias[target].to(dtype)


def exponents(
    tile: Tensor,  # [n, v] out
    x: Tensor,  # [n, H]
    weight: Tensor,  # [v, H]
    bias: Tensor | None,  # [v]
    ref: Tensor | None,  # [n]
    *,
    inner: float,  # factor of the logit inside tanh; used iff capped
    gain: float | Tensor,  # [n]; base-2 exponent per unit of (capped) logit
    square: Tensor | None,  # [n, v] out: tanh^2; given iff capped
    rounded: bool,
) -> None:
    """tile <- z log2(e) - ref for one tile of the vocabulary; ref=None means 0."""
    capped = square is not None
    alpha = inner if capped else gain if isinstance(gain, float) else 1.0
    start = not capped and isinstance(gain, float) and ref is not None
    if start and ref is not None:
        tile.copy_(ref.neg()[:, None].expand_as(tile))
    if x.dtype != weight.dtype:  # neither operand is rounded to the other's dtype
        x, weight = x.to(tile.dtype), weight.to(tile.dtype)
    gemm(tile, x, weight.t(), alpha=alpha, beta=1.0 if start else 0.0, rounded=rounded)
    if bias is not None:
        tile.add_(bias.to(tile.dtype), alpha=alpha)
    if capped:
        tile.tanh_()
        torch.mul(tile, tile, out=square)
    if capped or not isinstance(gain, float):
        tile.mul_(gain[:, None] if isinstance(gain, Tensor) else gain)
        if ref is not None:
            tile.sub_(ref[:, None])


def exp_tile(tile: Tensor, target: Tensor) -> None:
    """Exponents -> E in place, the target's column (target [n], relative to the tile; may lie outside) 0."""
    tile.exp2_()
    column = target.clamp(0, tile.shape[1] - 1)[:, None]
    inside = ((target >= 0) & (target < tile.shape[1]))[:, None]
    tile.scatter_(1, column, torch.where(inside, 0.0, tile.gather(1, column)))


def finish_rows(z: Tensor, ref: Tensor, total: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """z, ref, S [n] -> logp, lse, 1 - p_y, 1/Z [n] float64, with Z = S + 2^(z log2 e - ref).

    In float64: ref is near 58 while S carries the digits, and these are only [n] numbers.
    """
    offset = ref.double() - z.double() * LOG2E  # what 2^-offset is to the target, E is to the others
    log_odds = total.double().log() + offset * LN2
    logp = -torch.nn.functional.softplus(log_odds, threshold=700)
    inverse = 1 / (total.double() + torch.exp2(-offset))
    return logp, z.double() - logp, total.double() * inverse, inverse


def add_target_rows(
    out: Tensor, weight: Tensor, target: Tensor, coef: Tensor, operand: torch.dtype | None
) -> None:
    """out [n, H] += coef [n] * weight[target]: the exact target term of dhidden."""
    block = max(1, GATHER_BYTES // (out.shape[1] * out.element_size()))
    for rows, y, c in zip(out.split(block), target.split(block), coef.split(block), strict=True):
        rows.addcmul_(_gather(weight, y, operand).to(out.dtype), c[:, None])


def add_hidden_rows(out: Tensor, column: Tensor, x: Tensor, rows: Tensor, coef: Tensor) -> None:
    """out[column] += coef * x[rows]: the target term of dweight. out [v, H], x [n, H], the others [k]."""
    block = max(1, GATHER_BYTES // (out.shape[1] * out.element_size()))
    for c, r, k in zip(column.split(block), rows.split(block), coef.split(block), strict=True):
        out.index_add_(0, c, x[r].to(out.dtype) * k[:, None])


def _gather(weight: Tensor, index: Tensor, operand: torch.dtype | None) -> Tensor:
    rows = weight[index]
    return rows if operand is None else rows.to(operand)
