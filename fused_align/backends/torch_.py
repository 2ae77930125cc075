"""The steps in torch operations alone: the default on a CPU, and correct on any device.

`operands` has the arithmetic. Exponentials are taken in base 2, with log2(e) folded into the GEMM's scale: on
a CPU exp2 is also the fast one where most logits lie far below the target's, since exp slows down thirtyfold
on subnormal results.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..humanline import RatioClip
from ..losses.base import Loss
from ..rows import Rows
from .operands import (
    CEILING,
    FAR,
    HALF,
    LN2,
    LOWEST,
    STATS,
    STEEP,
    Chunk,
    Coefficients,
    Head,
    Scratch,
    Upstream,
    reference,
)
from .torch_logits import logit_gradient as logit_gradient
from .torch_logits import logit_stats as logit_stats

if TYPE_CHECKING:
    from ..linear.plan import Problem

GATHER_BYTES = 1 << 20  # the target rows of the weight are gathered in blocks of this size
SQUARED_COLS = 128  # columns of a tile that are squared in float64 at a time
#: the bytes per logit that passes over a tile amount to, from the logit to its exponential, for the planner
EXP_BYTES = {"cpu": 5, "cuda": 20}
SPARE = 6  # bytes per element of a CPU's 16-bit GEMM: its product, and that widened


def why_not(device: torch.device) -> str | None:
    """None: torch runs wherever the tensors are."""
    return None


def watching_is_free(device: torch.device) -> bool:
    """Whether a look at every tile for rows that leave the range costs nothing."""
    return device.type == "cpu"


def extra_tiles(capped: bool, mixed: bool) -> int:
    """Scratch tiles besides that of the logits; mixed: E is multiplied by something of its exponents."""
    return 1 * capped + mixed


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


# ---- rows --------------------------------------------------------------------------------------------


def open_rows(
    head: Head,
    x: Tensor,  # [r, H], as the GEMMs take it
    target: Tensor,  # [r], in range
    inverse: float | Tensor,  # [r], 1 / temperature
    work: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """z [r] of the targets, by gather and dot; ref [r]; slope [r], the cap's 1 - tanh^2, if there is one."""
    z, slope = _target_logit(x, head.weight, head.bias, target, head.operand).double(), None
    z = z * head.logit_scale
    if head.softcap is not None:
        tanh = torch.tanh(z / head.softcap)
        z, slope = head.softcap * tanh, (1 - tanh * tanh).to(work)
    z = (z * inverse).to(work)
    return z, reference(z), slope


def _target_logit(
    x: Tensor,  # [n, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    target: Tensor,  # [n]
    operand: torch.dtype | None,  # the weight is rounded to this first
) -> Tensor:  # [n]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    block = max(1, GATHER_BYTES // (x.shape[1] * dtype.itemsize))
    dots = [
        (rows.to(dtype) * _gather(weight, y, operand).to(dtype)).sum(1)
        for rows, y in zip(x.split(block), target.split(block), strict=True)
    ]
    logit = torch.cat(dots) if dots else x.new_zeros(0, dtype=dtype)
    return logit if bias is None else logit + bias[target].to(dtype)


def _finish(chunk: Chunk) -> tuple[Tensor, Tensor, Tensor]:
    """logp, 1 - p_y, 1/Z, [r] float64, with Z = S + 2^-offset.

    In float64: ref is near 58 while S carries the digits, and these are only [r] numbers.
    """
    total, offset = (
        chunk.total.double(),
        chunk.offset(),
    )  # what 2^-offset is to the target, E is to the others
    logp = -torch.nn.functional.softplus(total.log() + offset * LN2, threshold=700)
    inverse = 1 / (total + torch.exp2(-offset))
    return logp, total * inverse, inverse


def finish_rows(chunk: Chunk) -> Tensor:
    """What the walk was to find, [5, r] in the dtype of the logits, in the order of `STATS`; 0 where not."""
    logp, _, inverse = _finish(chunk)
    found = {"logp": logp, "lse": chunk.z.double() - logp}
    if chunk.moment is not None and chunk.pivot is not None:
        to_target = chunk.moment + (chunk.offset() - chunk.pivot) * chunk.total.double()
        found["entropy"] = -logp - inverse * LN2 * to_target
    if chunk.average is not None:
        found["average"] = chunk.average
    if chunk.squares is not None:
        found["squares"] = (chunk.squares + torch.exp2(-2 * chunk.offset())).log() + 2 * inverse.log()
    zero = torch.zeros_like(logp)
    return torch.stack([found.get(name, zero) for name in STATS]).to(chunk.z.dtype)


def lost(chunk: Chunk) -> Tensor:  # [] bool
    """Whether a walk that did not watch has left the range of float32 for some row."""
    return ~(_finish(chunk)[0] >= LOWEST).all()


def close_product(product: Tensor, chunk: Chunk) -> None:  # [r, H]
    """(E f) @ W, times factor / Z: what a gradient of the logp or lse multiplies."""
    product.mul_((_finish(chunk)[2] * chunk.factor).to(product.dtype)[:, None])


def coefficients(
    chunk: Chunk,
    up: Upstream,
    entropy: Tensor | None = None,  # [r]; given with up.entropy
    *,
    vocab: int,
) -> Coefficients:
    """Upstream gradients of logp, lse, entropy and mean logit -> coefficients of dz. Moves steep references.

    d lse / dz_v = p_v, d mean / dz_v = 1 / V, and d entropy / dz_v = -p_v (log p_v + entropy) with
    log p_v = logp + z_v - z_y.
    """
    out_of_range, ref = lost(chunk), chunk.ref
    _tame(chunk, up.size())
    moved = (chunk.ref != ref).any()
    logp, miss, inverse = _finish(chunk)
    work, capped = chunk.z.dtype, chunk.slope is not None
    slope = chunk.factor if chunk.slope is None else chunk.factor * chunk.slope
    others = up.logp if up.lse is None else up.logp - up.lse
    p = logp.exp()  # not 1 - miss, which would lose the digits of a small p
    target = up.logp * miss if up.lse is None else up.logp * miss + up.lse * p
    average = None if up.average is None else up.average * chunk.factor
    uniform = None
    if average is not None and capped:
        assert up.average is not None
        uniform, average = (up.average / vocab).to(work), None
    rows, mix = chunk.factor, None
    if up.entropy is None and uniform is None:
        rows = (-others * inverse * chunk.factor).to(work)
    else:
        constant, mixed = -others * inverse, torch.zeros_like(inverse)
        if up.entropy is not None:
            assert entropy is not None
            shift = up.entropy * (logp + entropy)
            target = target - p * shift
            constant = constant - shift * inverse
            mixed = -up.entropy * inverse
        # z_v - z_y = ln 2 (x_v + offset): what is the same for a row is summed in float64
        mix = (constant + mixed * chunk.offset() * LN2).to(work), (mixed * LN2).to(work)
    alive = up.alive()
    counts = torch.stack([alive.sum(), out_of_range.long(), moved.long()])
    order = torch.sort(~alive, stable=True).indices
    return Coefficients(rows, (target * slope).to(work), mix, average, uniform, order, counts)


def _tame(chunk: Chunk, c: Tensor) -> None:  # [r]
    """Where c / Z is beyond STEEP the reference moves near the row's lse, so that Z becomes about 1.

    A coefficient of e^60, an importance ratio at its cap, times 1/Z = 2^58 has no float32.
    """
    inverse = _finish(chunk)[2]
    steep = c.abs() * inverse > STEEP
    if steep.device.type == "cpu" and not bool(steep.any()):
        return
    moved = (chunk.ref.double() - inverse.log2()).round().to(chunk.ref.dtype)
    ref = torch.where(steep, moved, chunk.ref)
    chunk.total = chunk.total * torch.exp2(chunk.ref - ref)
    chunk.ref = ref


# ---- tiles -------------------------------------------------------------------------------------------


def _exponents(
    head: Head, chunk: Chunk, weight: Tensor, bias: Tensor | None, tile: Tensor, scratch: Scratch
) -> Tensor | None:
    """tile <- z log2(e) - ref for one tile of the vocabulary; returns the cap's tanh^2, in scratch tile 1."""
    x, ref, gain = chunk.x, chunk.ref, chunk.gain
    assert x is not None
    square = None if head.softcap is None else scratch.tile(1, tile.shape)
    plain = square is None and bias is None and x.dtype == weight.dtype == tile.dtype
    if plain and isinstance(gain, float):
        tile.copy_(ref.neg()[:, None].expand_as(tile))
        gemm(tile, x, weight.t(), alpha=gain, beta=1.0)
        return square
    # a bias is added before the reference: near 58 it would be rounded the same way for all rows of a column
    alpha = 1.0 if head.softcap is None else head.logit_scale / head.softcap
    gemm(tile, x, weight.t(), alpha=alpha, split=not head.rounded, spare=scratch.spare)
    if bias is not None:
        tile.add_(bias.to(tile.dtype), alpha=alpha)
    if square is not None:
        torch.mul(tile.tanh_(), tile, out=square)
    if isinstance(gain, Tensor):
        torch.addcmul(ref.neg()[:, None], tile, gain[:, None], out=tile)
    else:
        torch.add(ref.neg()[:, None], tile, alpha=gain, out=tile)
    return square


def exp_tile(
    head: Head,
    chunk: Chunk,
    weight: Tensor,  # [v, H]
    bias: Tensor | None,  # [v]
    start: int,  # the tile's first column in the vocabulary
    tile: Tensor,  # [r, v], for the logits
    out: Tensor
    | None,  # [r, v]: E f, f the cap's 1 - tanh^2 (S is summed before); may be tile; None: only sums
    product: Tensor | None,  # [r, H]: what other tiles gave, to be scaled down where a reference moves
    scratch: Scratch,
    *,
    watch: bool,  # look for rows that leave the range, and move their reference
    static: bool,  # nothing may be read back from an accelerator
) -> None:
    """Logits of a tile -> E, and what is summed of it: S, and as the chunk asks moment, squares, average."""
    square = _exponents(head, chunk, weight, bias, tile, scratch)
    if chunk.average is not None and square is not None:
        logits = tile.sum(1).double() + tile.shape[1] * chunk.ref.double()
        chunk.average.add_(logits, alpha=LN2 / head.weight.shape[0])
    if watch and _jump(chunk, tile, product, static and tile.device.type != "cpu"):
        square = _exponents(head, chunk, weight, bias, tile, scratch)  # with all digits
    distance = None
    if chunk.moment is not None and chunk.pivot is not None:
        distance = scratch.tile(1 if square is None else 2, tile.shape)
        torch.add(tile, chunk.pivot.to(tile.dtype)[:, None], out=distance)
        distance.clamp_(min=-FAR)  # of a word that a bias of -inf forbids: it is multiplied by E = 0
    _exponentiate(tile, chunk.target - start)
    chunk.total.add_(tile.sum(1))
    if chunk.squares is not None:
        _add_squares(chunk.squares, tile)
    if distance is not None and chunk.moment is not None:
        chunk.moment.add_(distance.mul_(tile).sum(1))
    if out is None:
        return
    if square is not None:
        tile.addcmul_(tile, square, value=-1)
    if out is not tile:
        out.copy_(tile)


def _jump(chunk: Chunk, tile: Tensor, product: Tensor | None, static: bool) -> bool:
    """Moves the reference of rows whose exponents in this tile are beyond CEILING to their maximum.

    Returns whether the tile is to be made again. Where the host may not look it is corrected instead, at
    the cost of the digits that large exponents did not have.
    """
    top = tile.amax(1)
    beyond = top > CEILING
    if not static and not bool(beyond.any()):
        return False
    jump = torch.where(beyond, top.ceil(), 0.0)
    if static:
        tile.sub_(jump[:, None])
    chunk.ref = chunk.ref + jump
    down = torch.exp2(-jump)
    if chunk.moment is not None and chunk.pivot is not None:
        pivot = torch.where(beyond, 0.0, chunk.pivot)
        chunk.moment += (pivot - chunk.pivot - jump) * chunk.total.double()
        chunk.moment.mul_(down)
        chunk.pivot = pivot
    chunk.total.mul_(down)
    if chunk.squares is not None:
        chunk.squares.mul_(down.double().square())
    if product is not None:
        product.mul_(down[:, None])
    return not static


def _exponentiate(tile: Tensor, target: Tensor) -> None:
    """Exponents -> E in place, the target's column (target [n], relative to the tile; may lie outside) 0."""
    tile.exp2_()
    column = target.clamp(0, tile.shape[1] - 1)[:, None]
    inside = ((target >= 0) & (target < tile.shape[1]))[:, None]
    tile.scatter_(1, column, torch.where(inside, 0.0, tile.gather(1, column)))


def _add_squares(total: Tensor, tile: Tensor) -> None:
    """total [n] float64 += sum_v E_v^2, in float64: float32 has no range for the squares."""
    for block in tile.split(SQUARED_COLS, dim=1):
        wide = block.double()
        total += torch.linalg.vecdot(wide, wide)


def grad_tile(
    head: Head,
    chunk: Chunk,
    coef: Coefficients,
    weight: Tensor,  # [v, H]
    bias: Tensor | None,  # [v]
    start: int,
    tile: Tensor,  # [r, v], for the logits
    out: Tensor,  # [r, v]; may be tile
    scratch: Scratch,
) -> None:
    """Logits of a tile -> out = E f, mixed as the coefficients say: all the gradient GEMMs need."""
    square = _exponents(head, chunk, weight, bias, tile, scratch)
    mix = None
    if coef.mix is not None:
        tile.clamp_(min=-FAR)
        mix = _mix(coef.mix, tile, scratch, 1 + (square is not None))
    _exponentiate(tile, chunk.target - start)
    if mix is not None:
        tile.mul_(mix)
    if coef.uniform is not None and square is not None:
        tile.add_(coef.uniform[:, None])
    if square is not None:
        tile.addcmul_(tile, square, value=-1)
    if out is not tile:
        out.copy_(tile)


def kept_tile(
    chunk: Chunk,
    coef: Coefficients,
    ref: Tensor,  # [r], the reference that the tile was made with
    kept: Tensor,  # [r', v], E f of a tile
    live: Tensor | None,  # [r] which rows of kept; None: all
    out: Tensor,  # [r, v], of kept's dtype
    scratch: Scratch,
) -> None:
    """The same of a tile that was kept: its live rows, against their present reference, mixed."""
    if live is None:
        out.copy_(kept)
    else:
        torch.index_select(kept, 0, live, out=out)
    if ref is not chunk.ref:
        out.mul_(torch.exp2(ref - chunk.ref)[:, None])
    if coef.mix is not None:
        tiny = torch.finfo(scratch.work).tiny
        exponent = scratch.tile(1, out.shape)
        torch.clamp(out, min=tiny, out=exponent).log2_()
        out.mul_(_mix(coef.mix, exponent, scratch, 1))


def _mix(mix: tuple[Tensor, Tensor], exponent: Tensor, scratch: Scratch, number: int) -> Tensor:
    """a + b x of exponents x, in scratch tile `number` (which may be the exponents' own)."""
    out = scratch.tile(number, exponent.shape)
    return torch.addcmul(mix[0][:, None], exponent, mix[1][:, None], out=out)


def fused_score(head: Head, chunk: Chunk) -> None:
    """What walking with `exp_tile` sums, where that is one kernel; see `why_not_fused`."""
    raise NotImplementedError("torch has no kernel of this kind")


def why_not_fused(problem: Problem) -> str | None:
    return "fused is a kernel of the backend triton"


def fused_bytes(problem: Problem, rows: int) -> int:
    """What `fused_score` takes for a chunk of rows."""
    return 0


# ---- gradients ---------------------------------------------------------------------------------------


def scaled_rows(x: Tensor, coef: Tensor, dtype: torch.dtype) -> Tensor:  # [r, H], [r] -> [r, H]
    return (x * coef[:, None]).to(dtype)


def store_hidden(
    out: Tensor,  # [M, H]
    index: slice | Tensor,  # [r] its rows
    product: Tensor,  # [r, H], overwritten; may be those rows themselves
    scale: Tensor,  # [r]
    head: Head,
    target: Tensor,  # [r]
    coef: Coefficients,
    average: Tensor | None,  # [H] mean row of weight
) -> None:
    """out[index] = scale * product + what does not come through E: the target's row, the mean row."""
    product.mul_(scale[:, None])
    block = max(1, GATHER_BYTES // (product.shape[1] * product.element_size()))
    for rows, y, c in zip(product.split(block), target.split(block), coef.target.split(block), strict=True):
        rows.addcmul_(_gather(head.weight, y, head.operand).to(rows.dtype), c[:, None])
    if coef.average is not None and average is not None:
        product.addr_(coef.average.to(product.dtype), average.to(product.dtype))
    if not (isinstance(index, slice) and out[index].data_ptr() == product.data_ptr()):
        out[index] = product.to(out.dtype)


def add_hidden_rows(
    out: Tensor,  # [v, H]
    column: Tensor,  # [n]; v and above: left out
    x: Tensor | None,  # [n, H], or [M, H] with rows; None: ones
    coef: Tensor,  # [n]
    rows: Rows | None = None,  # n of M
    head: Head | None = None,  # given with rows: x is hidden as it came
) -> None:
    """out[column] += coef * x: the target term of dweight, and of dbias with H = 1."""
    inside = column < out.shape[0]
    column, coef = torch.where(inside, column, 0), torch.where(inside, coef, 0.0)
    if x is None:
        out.index_add_(0, column, coef[:, None])
        return
    block = max(1, GATHER_BYTES // (out.shape[1] * out.element_size()))
    for start in range(0, column.numel(), block):
        part = slice(start, start + block)
        some = x[part] if rows is None or head is None else head.operands(rows[part].take(x))
        out.index_add_(0, column[part], some.to(out.dtype) * coef[part, None])


def add_products(out: Tensor, tile: Tensor, coef: Tensor) -> None:
    """out [v] += coef [r] @ tile [r, v], in out's dtype whatever the tile's: dbias."""
    block = tile.shape[0] if tile.dtype == out.dtype else max(1, GATHER_BYTES // (4 * tile.shape[1]))
    for part, c in zip(tile.split(block), coef.split(block), strict=True):
        out.addmv_(part.t().to(out.dtype), c)


def loss_kernel(loss: Loss, humanline: RatioClip | None) -> None:
    """The kernel of a loss: there is none here, and losses go through autograd on [n]-sized vectors."""


def _gather(weight: Tensor, index: Tensor, operand: torch.dtype | None) -> Tensor:
    rows = weight[index]
    return rows if operand is None else rows.to(operand)
