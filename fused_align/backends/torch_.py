"""The steps in torch operations alone: the default on a CPU, and correct on any device.

Exponentials are taken in base 2, with log2(e) folded into the GEMM's scale, and against a row reference known
before the first tile:  E_tv = 2^(z_tv log2 e - ref_t).  On a CPU exp2 is also the fast one where most logits
lie far below the target's: exp slows down thirtyfold on subnormal results.

Every tensor argument is one tile or one vector of rows; `fused_align.linear.passes` does the looping.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

LOG2E = 1 / math.log(2)
LN2 = math.log(2)
GATHER_BYTES = 1 << 20  # the target rows of the weight are gathered in blocks of this size
SQUARED_COLS = 128  # columns of a tile that are squared in float64 at a time
HALF = (torch.bfloat16, torch.float16)
SPARE = 6  # bytes per element of a CPU's 16-bit GEMM: its product, and that widened


def why_not(device: torch.device) -> str | None:
    """None: torch runs wherever the tensors are."""
    return None


def gemm(
    out: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    alpha: float = 1.0,  # with beta=1 and 16-bit operands: 1
    beta: float = 0.0,  # 0 or 1
    split: bool = False,
    spare: Tensor | None = None,
) -> None:
    """out [m, n] <- beta*out + alpha * a [m, k] @ b [k, n], summed in out's dtype.

    Two bfloat16 operands are multiplied as they are. CUDA gives the sums in float32. A CPU rounds them to
    bfloat16; with `split` (and beta=0) what that lost is formed by a second product and added. All other
    pairs are cast to out's dtype first, but for float16 on CUDA where the result is not added to.
    spare: flat bytes for a CPU's 16-bit products, `SPARE` per element of out.
    """
    on_cpu = out.device.type == "cpu"
    if a.dtype != b.dtype or a.dtype not in ((torch.bfloat16,) if on_cpu or beta else HALF):
        torch.addmm(out, a.to(out.dtype), b.to(out.dtype), alpha=alpha, beta=beta, out=out)
        return
    if on_cpu:
        assert spare is not None
        _gemm_in_parts(out, a, b, bool(beta), split, spare)
    elif not beta:
        torch.ops.aten.mm.dtype_out(a, b, out.dtype, out=out)
    elif _adds_in_float32(out.device):
        torch.ops.aten.addmm.dtype_out(out, a, b, out.dtype, out=out)
    else:
        out.add_(torch.mm(a, b, out_dtype=out.dtype))
    if alpha != 1:
        out.mul_(alpha)


def _gemm_in_parts(out: Tensor, a: Tensor, b: Tensor, add: bool, split: bool, spare: Tensor) -> None:
    """bfloat16 on a CPU. Sums of two dtypes would make a copy of one of them, so they are widened first."""
    count = out.numel()
    first = spare[: 2 * count].view(a.dtype).view(out.shape)
    rest = spare[-(-2 * count // 64) * 64 :]
    wide = rest[: 4 * count].view(out.dtype).view(out.shape)
    if split:
        high = rest[: 2 * count].view(a.dtype).view(out.shape)
        torch.mm(a, b, out=high)
        torch.addmm(high, a, b, beta=-1, out=first)
        out.copy_(high)
    else:
        torch.mm(a, b, out=first)
    if split or add:
        out.add_(wide.copy_(first))
    else:
        out.copy_(first)


@cache
def _adds_in_float32(device: torch.device) -> bool:
    """Whether this torch's addmm takes 16-bit factors with a float32 sum; some releases do, some refuse."""
    half, whole = (
        torch.zeros(16, 16, dtype=dtype, device=device) for dtype in (torch.bfloat16, torch.float32)
    )
    try:
        torch.ops.aten.addmm.dtype_out(whole, half, half, whole.dtype, out=whole)
    except RuntimeError:
        return False
    return True


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
    ref: Tensor,  # [n]
    *,
    inner: float,  # factor of the logit inside tanh; used iff capped
    gain: float | Tensor,  # [n]; base-2 exponent per unit of (capped) logit
    square: Tensor | None,  # [n, v] out: tanh^2; given iff capped
    split: bool,
    spare: Tensor | None,
) -> None:
    """tile <- z log2(e) - ref for one tile of the vocabulary."""
    plain = square is None and bias is None and x.dtype == weight.dtype == tile.dtype
    if plain and isinstance(gain, float):
        tile.copy_(ref.neg()[:, None].expand_as(tile))
        gemm(tile, x, weight.t(), alpha=gain, beta=1.0)
        return
    # a bias is added before the reference: near 58 it would be rounded the same way for all rows of a column
    alpha = 1.0 if square is None else inner
    gemm(tile, x, weight.t(), alpha=alpha, split=split, spare=spare)
    if bias is not None:
        tile.add_(bias.to(tile.dtype), alpha=alpha)
    if square is not None:
        torch.mul(tile.tanh_(), tile, out=square)
    if isinstance(gain, Tensor):
        torch.addcmul(ref.neg()[:, None], tile, gain[:, None], out=tile)
    else:
        torch.add(ref.neg()[:, None], tile, alpha=gain, out=tile)


def exp_tile(tile: Tensor, target: Tensor) -> None:
    """Exponents -> E in place, the target's column (target [n], relative to the tile; may lie outside) 0."""
    tile.exp2_()
    column = target.clamp(0, tile.shape[1] - 1)[:, None]
    inside = ((target >= 0) & (target < tile.shape[1]))[:, None]
    tile.scatter_(1, column, torch.where(inside, 0.0, tile.gather(1, column)))


def add_squares(total: Tensor, tile: Tensor) -> None:
    """total [n] float64 += sum_v E_v^2, in float64: float32 has no range for the squares."""
    for block in tile.split(SQUARED_COLS, dim=1):
        wide = block.double()
        total += torch.linalg.vecdot(wide, wide)


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


def add_hidden_rows(out: Tensor, column: Tensor, x: Tensor, coef: Tensor) -> None:
    """out[column] += coef * x: the target term of dweight. out [v, H], x [n, H], column and coef [n]."""
    block = max(1, GATHER_BYTES // (out.shape[1] * out.element_size()))
    for c, rows, k in zip(column.split(block), x.split(block), coef.split(block), strict=True):
        out.index_add_(0, c, rows.to(out.dtype) * k[:, None])


def _gather(weight: Tensor, index: Tensor, operand: torch.dtype | None) -> Tensor:
    rows = weight[index]
    return rows if operand is None else rows.to(operand)
