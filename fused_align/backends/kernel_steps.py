"""The steps of `torch_` as kernel launches, the same for every language that kernels are written in.

Products are the vendor's: `torch_.gemm`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..humanline import RatioClip
from ..losses.base import Loss
from ..rows import Rows
from . import torch_
from .kernel_losses import LossKernel, cover
from .operands import LOWEST, STATS, Chunk, Coefficients, Head, Scratch, Upstream

if TYPE_CHECKING:
    from ..linear.plan import Problem


class KernelSteps:
    """A backend's steps, from its kernels.

    launches: has a function for every kernel, by the step's name. It takes the sizes that the grid covers
        (nothing is launched if one is 0), then the kernel's arguments: tensors, or None for those that are
        absent, and integers; by keyword, what is fixed for a head, in its order.
    """

    # the bytes per logit that a pass amounts to, for the planner: product written, read again, E written
    EXP_BYTES = {"cpu": 5, "cuda": 8}
    gemm = staticmethod(torch_.gemm)

    def __init__(self, launches: Any) -> None:
        self.launches = launches

    def watching_is_free(self, device: torch.device) -> bool:
        """A walk in trust reads each tile once; one that watches twice, the second time from a cache."""
        return False

    def extra_tiles(self, capped: bool, mixed: bool) -> int:
        """None: a cap's slope and what mixes E are computed where E is."""
        return 0

    # ---- rows ----------------------------------------------------------------------------------------------

    def open_rows(
        self, head: Head, x: Tensor, target: Tensor, inverse: float | Tensor, work: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        count = target.numel()
        z, ref = (x.new_empty(count, dtype=work) for _ in range(2))
        slope = None if head.softcap is None else torch.empty_like(z)
        per_row = isinstance(inverse, Tensor)
        heat = inverse if per_row else torch.full((1,), inverse, dtype=torch.float64, device=x.device)
        self.launches.open_rows(
            (count,), x, head.weight, dense(head.bias), target, heat, z, ref, slope, count, x.shape[1],
            *x.stride(), *head.weight.stride(), int(per_row), SCALE=head.logit_scale, CAP=head.softcap,
            OPERAND=_rounding(head, head.weight),
        )  # fmt: skip
        return z, ref, slope

    def finish_rows(self, chunk: Chunk) -> Tensor:
        count = chunk.target.numel()
        out = chunk.z.new_empty(len(STATS), count)
        self.launches.finish_rows(
            (count,), chunk.z, chunk.ref, chunk.total, chunk.moment, chunk.pivot, chunk.average,
            chunk.squares, out, count,
        )  # fmt: skip
        return out

    def lost(self, chunk: Chunk) -> Tensor:
        return ~(self.finish_rows(chunk)[0] >= LOWEST).all()

    def close_product(self, product: Tensor, chunk: Chunk) -> None:
        count, size = product.shape
        self.launches.close_product(
            (count, size), product, chunk.z, chunk.ref, chunk.total, chunk.factor, count,
            size, product.stride(0),
        )  # fmt: skip

    def coefficients(
        self, chunk: Chunk, up: Upstream, entropy: Tensor | None = None, *, vocab: int
    ) -> Coefficients:
        count, capped = chunk.target.numel(), chunk.slope is not None
        after, total, on_rows, on_target = (torch.empty_like(chunk.z) for _ in range(4))
        mixes = up.entropy is not None or (up.average is not None and capped)
        constant, mixing = (torch.empty_like(chunk.z) if mixes else None for _ in range(2))
        on_average = torch.empty_like(chunk.z) if up.average is not None and not capped else None
        uniform = torch.empty_like(chunk.z) if up.average is not None and capped else None
        flags = torch.empty(count, dtype=torch.int32, device=chunk.z.device)
        ups = map(dense, (up.logp, up.lse, up.entropy, up.average))
        self.launches.coefficients(
            (count,), chunk.z, chunk.ref, chunk.total, chunk.factor, chunk.slope, *ups,
            entropy if up.entropy is not None else None, after, total, on_rows, on_target,
            constant, mixing, on_average, uniform, flags, count, vocab,
        )  # fmt: skip
        order = torch.empty(count, dtype=torch.int64, device=chunk.z.device)
        counts = torch.empty(3, dtype=torch.int64, device=chunk.z.device)
        self.launches.compact((1,), flags, order, counts, count)
        chunk.ref, chunk.total = after, total
        mix = None if constant is None or mixing is None else (constant, mixing)
        return Coefficients(on_rows, on_target, mix, on_average, uniform, order, counts)

    # ---- tiles ---------------------------------------------------------------------------------------------

    def exp_tile(
        self,
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
        self.launches.exp_tile(
            (count,), logits, out, product if watch else None, dense(bias), chunk.target, _gain(chunk),
            before, moved, chunk.total, chunk.moment, chunk.pivot, chunk.squares,
            None if head.softcap is None else chunk.average, count, cols, start, head.weight.shape[1],
            head.weight.shape[0], logits.stride(0), 0 if out is None else out.stride(0),
            0 if product is None else product.stride(0), INNER=inner(head),
        )  # fmt: skip
        if moved is not None:
            chunk.ref = moved

    def grad_tile(
        self,
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
        self.launches.grad_tile(
            logits.shape, logits, out, dense(bias), chunk.target, _gain(chunk), chunk.ref, constant,
            mixing, coef.uniform, *logits.shape, start, logits.stride(0), out.stride(0), INNER=inner(head),
        )  # fmt: skip

    def kept_tile(
        self,
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
        self.launches.kept_tile(
            out.shape, kept, out, live, before, after, constant, mixing, *out.shape,
            kept.stride(0), out.stride(0), TINY=torch.finfo(scratch.work).tiny,
        )  # fmt: skip

    # ---- gradients -----------------------------------------------------------------------------------------

    def scaled_rows(self, x: Tensor, coef: Tensor, dtype: torch.dtype) -> Tensor:
        out = torch.empty(x.shape, dtype=dtype, device=x.device)
        self.launches.scaled_rows(x.shape, x, coef, out, *x.shape, *x.stride())
        return out

    def store_hidden(
        self,
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
        self.launches.store_hidden(
            product.shape, out, index if listed else None, product, scale, head.weight,
            target, coef.target, coef.average, average, *product.shape, 0 if listed else index.start,
            out.stride(0), product.stride(0), *head.weight.stride(), OPERAND=_rounding(head, head.weight),
        )  # fmt: skip

    def add_hidden_rows(
        self,
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
        self.launches.add_rows(
            (column.numel(), out.shape[1]), out, rising, order, coef, x, index, column.numel(), given,
            *out.shape, *out.stride(), *steps, OPERAND=operand,
        )  # fmt: skip

    def add_products(self, out: Tensor, tile: Tensor, coef: Tensor) -> None:
        self.launches.add_products((tile.shape[1],), out, tile, coef, *tile.shape, tile.stride(0))

    # ---- what only some backends have ----------------------------------------------------------------------

    def fused_score(self, head: Head, chunk: Chunk) -> None:
        return torch_.fused_score(head, chunk)

    def why_not_fused(self, problem: Problem) -> str | None:
        return torch_.why_not_fused(problem)

    def fused_bytes(self, problem: Problem, rows: int) -> int:
        return torch_.fused_bytes(problem, rows)

    def loss_kernel(self, loss: Loss, humanline: RatioClip | None) -> LossKernel | None:
        found = cover(loss, humanline, self.launches.loss)
        return None if isinstance(found, str) else found


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
    torch_.gemm(tile, x, weight.t(), split=not head.rounded, spare=scratch.spare)
    return tile


def _gain(chunk: Chunk) -> Tensor:  # -> [r]
    if not isinstance(chunk.gain, Tensor):
        chunk.gain = torch.full_like(chunk.z, chunk.gain)
    return chunk.gain


def dense(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()


def inner(head: Head) -> float | None:
    return None if head.softcap is None else head.logit_scale / head.softcap


def _rounding(head: Head, tensor: Tensor) -> torch.dtype | None:
    """What autocast rounds a tensor to before it is used, if that is something else."""
    return None if head.operand == tensor.dtype else head.operand
