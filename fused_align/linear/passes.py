"""The plans' walks over the vocabulary for chunks of rows, written once over the steps of a backend.

`backends.operands` has the arithmetic.
"""

from __future__ import annotations

from collections.abc import Container, Iterator

import torch
from torch import Tensor

from ..backends.operands import FAR, LN2, LOG2E, Chunk, Coefficients, Head, Scratch, work_dtype
from .plan import Plan, Problem, gemm_dtype


def load(
    head: Head,
    x: Tensor,  # [r, H]
    target: Tensor,  # [r]
    temperature: float | Tensor,  # [r]
    *,
    stats: Container[str] = (),  # names, besides logp and lse
    average: tuple[Tensor, Tensor | float] | None = None,  # of Head.average, where the mean logit is wanted
    valid: Tensor | None = None,  # [r] bool; the others are padding, with E = 0 and S = 1 whatever the bias
) -> Chunk:
    """A chunk ready to be walked: the target's logits by gather-dot, and the references from them."""
    work, x = work_dtype(x, head.weight), head.operands(x)
    gain, factor, inverse = _scales(head, temperature, target.numel(), work, x.device)
    z, ref, slope = head.steps.open_rows(head, x, target, inverse, work)
    total = torch.zeros_like(z)
    if valid is not None:
        ref = torch.where(valid, ref, FAR)
        z, total = torch.where(valid, z, FAR * LN2), torch.where(valid, total, 1.0)
    chunk = Chunk(x, target, gain, factor, z, ref, total, slope)
    if "entropy" in stats:
        chunk.moment, chunk.pivot = torch.zeros_like(z, dtype=torch.float64), chunk.offset()
    if "squares" in stats:
        chunk.squares = torch.zeros_like(z, dtype=torch.float64)
    if average is not None and head.softcap is None:
        weight, bias = average
        chunk.average = (x.to(work) @ weight.to(work)).double().add_(bias).mul_(factor)
    elif average is not None:
        chunk.average = torch.zeros_like(z, dtype=torch.float64)
    return chunk


def reload(
    head: Head,
    target: Tensor,  # [n]
    temperature: float | Tensor,  # [n]
    saved: Tensor,  # [3 or 4, n]: z, ref, S and, under a cap, slope
) -> Chunk:
    """The vectors of rows that an earlier walk left, without their x."""
    gain, factor, _ = _scales(head, temperature, target.numel(), saved.dtype, saved.device)
    z, ref, total = saved[:3]
    return Chunk(None, target, gain, factor, z, ref, total, None if head.softcap is None else saved[3])


def _scales(
    head: Head, temperature: float | Tensor, rows: int, work: torch.dtype, device: torch.device
) -> tuple[float | Tensor, Tensor, float | Tensor]:
    """gain, factor [r] and 1 / temperature of a chunk."""
    inverse = 1 / (temperature.to(work) if isinstance(temperature, Tensor) else temperature)
    gain = (head.logit_scale if head.softcap is None else head.softcap) * LOG2E * inverse
    scale = head.logit_scale * inverse
    factor = scale if isinstance(scale, Tensor) else torch.full((rows,), scale, dtype=work, device=device)
    return gain, factor, inverse


class Walk:
    """Walks over the vocabulary for one head, with the sizes of a plan and scratch for its tiles."""

    def __init__(self, head: Head, plan: Plan, problem: Problem, memory: Tensor) -> None:  # memory: bytes
        self.head, self.steps, self.cols = head, head.steps, plan.cols
        self.work, self.gemm_dtype = problem.work, gemm_dtype(problem)
        tiles, spare, complete = problem.scratch(plan.name, plan.rows, plan.cols)
        self.scratch = Scratch(
            memory, plan.rows * plan.cols * self.work.itemsize, self.work, memory[tiles:][:spare]
        )
        self.whole = memory[tiles + spare :][:complete].view(self.gemm_dtype)
        self.row = problem.row
        self.rounding = 1 + problem.extra_tiles  # the scratch tile after those that steps use
        # A walk is in trust, and made again where a look at the sums finds a row lost; or it watches from the
        # start: where the host may not look (max_live), and where looking costs nothing.
        self.static, self.fused = problem.static, plan.name == "fused"
        self.watches = problem.static or self.steps.watching_is_free(problem.device)

    def tiles(self) -> Iterator[tuple[int, int]]:
        vocab = self.head.weight.shape[0]
        for start in range(0, vocab, self.cols):
            yield start, min(start + self.cols, vocab)

    def complete(self, rows: int) -> Tensor:
        """Scratch for complete rows, [rows, V], in plans that hold them."""
        return self.whole[: rows * self.row].view(rows, self.row)[:, : self.head.weight.shape[0]]

    def gemm(self, out: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
        """A gradient's product, in the dtype of the operands."""
        self.steps.gemm(out, a, b, beta=float(add), spare=self.scratch.spare)

    def forward(self, chunk: Chunk, product: Tensor | None = None) -> None:  # product [r, H] out
        """Fills chunk.total (and moment, average): all that log-probs, lse and entropies need.

        product receives (E f) @ W, where f is the cap's 1 - tanh^2 (after S is summed).
        """
        if self.fused:
            self.steps.fused_score(self.head, chunk)
            return
        if not self.watches:
            self.walk(chunk, None, product, watch=False)
            if not bool(self.steps.lost(chunk)):
                return
            chunk.restart(self.head)
        self.walk(chunk, None, product, watch=True)

    def walk(self, chunk: Chunk, keep: Tensor | None, product: Tensor | None, *, watch: bool) -> None:
        """One forward walk. watch: look for rows that leave the range, and move their reference.

        keep [r, V] receives E f, product as in `forward`.
        """
        for start, stop in self.tiles():
            weight, bias = self.head.tile(start, stop)
            kept = None if keep is None else keep[:, start:stop]
            tile, out = self._tile(chunk.target.numel(), stop - start, kept, wanted=product is not None)
            before = product if start > 0 else None
            self.steps.exp_tile(
                self.head, chunk, weight, bias, start, tile, out, before, self.scratch, watch=watch,
                static=self.static,
            )  # fmt: skip
            if kept is not None:
                chunk.refs.append(chunk.ref)
            if product is not None and out is not None:
                self.gemm(product, out, weight, start > 0)
            del weight  # a cast of the head's: else it would lie beside that of the next tile

    def _tile(
        self, rows: int, cols: int, kept: Tensor | None = None, *, wanted: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Where the logits of a tile go, and where what the gradient GEMMs take of it, if that is wanted."""
        if kept is not None and kept.dtype == self.work:
            return kept, kept
        tile = self.scratch.tile(0, (rows, cols))
        if kept is not None or not wanted:
            return tile, kept
        if self.gemm_dtype == self.work:
            return tile, tile
        return tile, self.scratch.tile(self.rounding, (rows, cols), self.gemm_dtype)

    def spans(
        self, chunk: Chunk, coef: Coefficients, kept: Tensor | None, live: Tensor | None
    ) -> list[tuple[int, int]]:
        """The columns that `gradient_tile` is asked for: a tile, or several that were kept.

        dhidden is read and written again for every product that is added to it. So where E is multiplied as
        it was kept there is one, and where live rows are gathered from it as few as the scratch allows.
        """
        tiles, weight = list(self.tiles()), self.head.weight
        plain = self.head.operand in (None, weight.dtype) and kept is not None and kept.dtype == weight.dtype
        if kept is None or not plain or coef.mix is not None or any(x is not chunk.ref for x in chunk.refs):
            return tiles
        vocab = weight.shape[0]
        if live is None:
            return [(0, vocab)]
        room = self.scratch.area // (kept.element_size() * live.numel())
        width = max(1, room // self.cols) * self.cols
        return [(start, min(start + width, vocab)) for start in range(0, vocab, width)]

    def gradient_tile(
        self,
        chunk: Chunk,
        coef: Coefficients,
        start: int,
        stop: int,
        kept: Tensor | None,  # [r', V], what forward kept; None: the tile is computed again
        live: Tensor | None,  # [r] which rows of kept; None: all
    ) -> Tensor:  # [r, stop - start]
        """E f, times its affine function of z_v - z_y under an entropy gradient, as the GEMMs take it."""
        rows, cols = chunk.target.numel(), stop - start
        if kept is None:
            weight, bias = self.head.tile(start, stop)
            tile, out = self._tile(rows, cols)
            assert out is not None
            self.steps.grad_tile(self.head, chunk, coef, weight, bias, start, tile, out, self.scratch)
            return out
        ref, kept = chunk.refs[start // self.cols], kept[:, start:stop]
        if live is None and ref is chunk.ref and coef.mix is None:
            return kept
        out = self.scratch.tile(0, (rows, cols), kept.dtype)
        self.steps.kept_tile(chunk, coef, ref, kept, live, out, self.scratch)
        return out
