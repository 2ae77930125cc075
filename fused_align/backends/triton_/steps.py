"""The steps of `torch_` as kernel launches. Products are the vendor's, from there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton.language as tl
from torch import Tensor

from ...humanline import RatioClip
from ...losses.base import Loss
from ...rows import Rows
from .. import torch_
from ..operands import LOWEST, STATS, Chunk, Coefficients, Head, Scratch, Upstream
from . import score, tuning
from .logits import logit_gradient as logit_gradient
from .logits import logit_stats as logit_stats
from .losses import LossKernel, cover

if TYPE_CHECKING:
    from ...linear.plan import Problem

gemm = torch_.gemm

# the bytes per logit that a pass amounts to, for the planner: product written, read again, E written
EXP_BYTES = {"cpu": 5, "cuda": 8}

_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def watching_is_free(device: torch.device) -> bool:
    """A walk in trust reads each tile once; one that watches twice, the second time from a cache."""
    return False


def extra_tiles(capped: bool, mixed: bool) -> int:
    """None: a cap's slope and what mixes E are computed where E is."""
    return 0


# ---- rows ----------------------------------------------------------------------------------------------


def open_rows(
    head: Head, x: Tensor, target: Tensor, inverse: float | Tensor, work: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    count = target.numel()
    z, ref = (x.new_empty(count, dtype=work) for _ in range(2))
    slope = None if head.softcap is None else torch.empty_like(z)
    per_row = isinstance(inverse, Tensor)
    heat = inverse if per_row else torch.full((1,), inverse, dtype=torch.float64, device=x.device)
    tuning.open_rows(
        (count,), x, head.weight, _dense(head.bias), target, heat, z, ref, slope, count, x.shape[1],
        *x.stride(), *head.weight.stride(), int(per_row), SCALE=head.logit_scale, CAP=head.softcap,
        OPERAND=_rounding(head, head.weight),
    )  # fmt: skip
    return z, ref, slope


def finish_rows(chunk: Chunk) -> Tensor:
    count = chunk.target.numel()
    out = chunk.z.new_empty(len(STATS), count)
    tuning.finish_rows(
        (count,), chunk.z, chunk.ref, chunk.total, chunk.moment, chunk.pivot, chunk.average,
        chunk.squares, out, count,
    )  # fmt: skip
    return out


def lost(chunk: Chunk) -> Tensor:
    return ~(finish_rows(chunk)[0] >= LOWEST).all()


def close_product(product: Tensor, chunk: Chunk) -> None:
    count, size = product.shape
    tuning.close_product(
        (count, size), product, chunk.z, chunk.ref, chunk.total, chunk.factor, count,
        size, product.stride(0),
    )  # fmt: skip


def coefficients(chunk: Chunk, up: Upstream, entropy: Tensor | None = None, *, vocab: int) -> Coefficients:
    count, capped = chunk.target.numel(), chunk.slope is not None
    after, total, on_rows, on_target = (torch.empty_like(chunk.z) for _ in range(4))
    mixes = up.entropy is not None or (up.average is not None and capped)
    constant, mixing = (torch.empty_like(chunk.z) if mixes else None for _ in range(2))
    on_average = torch.empty_like(chunk.z) if up.average is not None and not capped else None
    uniform = torch.empty_like(chunk.z) if up.average is not None and capped else None
    flags = torch.empty(count, dtype=torch.int32, device=chunk.z.device)
    ups = map(_dense, (up.logp, up.lse, up.entropy, up.average))
    tuning.coefficients(
        (count,), chunk.z, chunk.ref, chunk.total, chunk.factor, chunk.slope, *ups,
        entropy if up.entropy is not None else None, after, total, on_rows, on_target,
        constant, mixing, on_average, uniform, flags, count, vocab,
    )  # fmt: skip
    order = torch.empty(count, dtype=torch.int64, device=chunk.z.device)
    counts = torch.empty(3, dtype=torch.int64, device=chunk.z.device)
    tuning.compact((1,), flags, order, counts, count)
    chunk.ref, chunk.total = after, total
    mix = None if constant is None or mixing is None else (constant, mixing)
    return Coefficients(on_rows, on_target, mix, on_average, uniform, order, counts)


# ---- tiles ---------------------------------------------------------------------------------------------


def exp_tile(
    head: Head,
    chunk: Chunk,
    weight: Tensor,
    bias: Tensor | None,
    start: int,
    tile: Tensor,
    out: Tensor | None,
    product: Tensor | None,
    scratch: Scratch,
    *,
    watch: bool,
    static: bool,
) -> None:
    logits = _logits(head, chunk, weight, tile, scratch)
    count, cols = logits.shape
    before, moved = chunk.ref, torch.empty_like(chunk.ref) if watch else None
    tuning.exp_tile(
        (count,), logits, out, product if watch else None, _dense(bias), chunk.target, _gain(chunk),
        before, moved, chunk.total, chunk.moment, chunk.pivot, chunk.squares,
        None if head.softcap is None else chunk.average, count, cols, start, head.weight.shape[1],
        head.weight.shape[0], logits.stride(0), 0 if out is None else out.stride(0),
        0 if product is None else product.stride(0), INNER=_inner(head),
    )  # fmt: skip
    if moved is not None:
        chunk.ref = moved


def grad_tile(
    head: Head,
    chunk: Chunk,
    coef: Coefficients,
    weight: Tensor,
    bias: Tensor | None,
    start: int,
    tile: Tensor,
    out: Tensor,
    scratch: Scratch,
) -> None:
    logits = _logits(head, chunk, weight, tile, scratch)
    constant, mixing = coef.mix or (None, None)
    tuning.grad_tile(
        logits.shape, logits, out, _dense(bias), chunk.target, _gain(chunk), chunk.ref, constant,
        mixing, coef.uniform, *logits.shape, start, logits.stride(0), out.stride(0), INNER=_inner(head),
    )  # fmt: skip


def kept_tile(
    chunk: Chunk,
    coef: Coefficients,
    ref: Tensor,
    kept: Tensor,
    live: Tensor | None,
    out: Tensor,
    scratch: Scratch,
) -> None:
    constant, mixing = coef.mix or (None, None)
    before, after = (None, None) if ref is chunk.ref else (ref, chunk.ref)
    tuning.kept_tile(
        out.shape, kept, out, live, before, after, constant, mixing, *out.shape,
        kept.stride(0), out.stride(0), TINY=torch.finfo(scratch.work).tiny,
    )  # fmt: skip


def fused_score(head: Head, chunk: Chunk) -> None:
    assert chunk.x is not None
    chunk.ref, chunk.total, chunk.moment, chunk.pivot = score.fused_score(
        chunk.x, head.weight, head.bias, chunk.target, chunk.ref, inner=_inner(head) or 1.0, gain=chunk.gain,
        capped=head.softcap is not None, entropy=chunk.moment is not None, pivot=chunk.pivot,
    )  # fmt: skip


def why_not_fused(problem: Problem) -> str | None:
    x, weight = problem.operand or problem.hidden_dtype, problem.weight_dtype
    if torch.version.hip is not None:
        return "fused has no sizes for AMD's GPUs"
    if problem.squares or (problem.average and problem.capped):
        return "fused sums no more than log-probs and entropies need"
    if x != weight or weight not in _TYPES:
        return f"fused multiplies operands of one dtype, and not float64; got {x} and {weight}"
    if problem.on_cpu and x == torch.float16:  # a CPU's float16 products are made in float32
        return "fused multiplies float16 on a GPU only"
    if not problem.adjacent:
        return "fused takes hidden and weight with adjacent columns"
    return None


def fused_bytes(problem: Problem, rows: int) -> int:
    return score.partial_bytes(rows, problem.vocab, problem.device, problem.weight_dtype, problem.entropy)


def _logits(head: Head, chunk: Chunk, weight: Tensor, tile: Tensor, scratch: Scratch) -> Tensor:
    """Raw logits of a tile: in tile; those of a bfloat16 head that says so rounded, in half of it.

    (Every walk of a call must round alike. float16 cannot: its gradient tiles are float32, and lie in tile.)
    """
    x = chunk.x
    assert x is not None
    if head.rounded and x.dtype == weight.dtype == torch.bfloat16:
        logits = tile.view(x.dtype).view(-1)[: tile.numel()].view(tile.shape)
        torch.mm(x, weight.t(), out=logits)
        return logits
    gemm(tile, x, weight.t(), split=not head.rounded, spare=scratch.spare)
    return tile


def _gain(chunk: Chunk) -> Tensor:  # -> [r]
    if not isinstance(chunk.gain, Tensor):
        chunk.gain = torch.full_like(chunk.z, chunk.gain)
    return chunk.gain


def _dense(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()


def _inner(head: Head) -> float | None:
    return None if head.softcap is None else head.logit_scale / head.softcap


# ---- gradients -----------------------------------------------------------------------------------------


def scaled_rows(x: Tensor, coef: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    tuning.scaled_rows(x.shape, x, coef, out, *x.shape, *x.stride())
    return out


def store_hidden(
    out: Tensor,
    index: slice | Tensor,
    product: Tensor,
    scale: Tensor,
    head: Head,
    target: Tensor,
    coef: Coefficients,
    average: Tensor | None,
) -> None:
    listed = isinstance(index, Tensor)
    if coef.average is None:
        average = None
    tuning.store_hidden(
        product.shape, out, index if listed else None, product, scale, head.weight,
        target, coef.target, coef.average, average, *product.shape, 0 if listed else index.start,
        out.stride(0), product.stride(0), *head.weight.stride(), OPERAND=_rounding(head, head.weight),
    )  # fmt: skip


def add_hidden_rows(
    out: Tensor,
    column: Tensor,
    x: Tensor | None,
    coef: Tensor,
    rows: Rows | None = None,
    head: Head | None = None,
) -> None:
    rising, order = column.sort(stable=True)
    index = None
    if rows is not None and isinstance(rows.index, Tensor):
        index = rows.index
    elif rows is not None and x is not None:
        x = x[rows.index]
    operand = None if head is None or x is None else _rounding(head, x)
    given, steps = (0, (0, 0)) if x is None else (x.shape[0], x.stride())
    tuning.add_rows(
        (column.numel(), out.shape[1]), out, rising, order, coef, x, index, column.numel(), given,
        *out.shape, *out.stride(), *steps, OPERAND=operand,
    )  # fmt: skip


def add_products(out: Tensor, tile: Tensor, coef: Tensor) -> None:
    tuning.add_products((tile.shape[1],), out, tile, coef, *tile.shape, tile.stride(0))


def loss_kernel(loss: Loss, humanline: RatioClip | None) -> LossKernel | None:
    found = cover(loss, humanline)
    return None if isinstance(found, str) else found


def _rounding(head: Head, tensor: Tensor) -> tl.dtype | None:
    """What autocast rounds a tensor to before it is used, if that is something else."""
    return None if head.operand in (None, tensor.dtype) else _TYPES[head.operand]
