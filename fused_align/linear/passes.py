"""The plans, written once over the steps of a backend: walks over the vocabulary for chunks of rows.

For row t with target y and z its scaled, capped, tempered logits, one forward walk computes

    E_tv = 2^(z_tv log2 e - ref_t), the target's column 0         S_t = sum_v E_tv

against a reference known before the first tile, ref = z_y log2 e + 58 (e^40 above the target), so that tiles
may come in any order and no running maximum is kept. Then, with Z = S + 2^(z_y log2 e - ref),

    logp = -softplus(ln S + ref ln 2 - z_y)      1 - p_y = S / Z      lse = z_y - logp

    dz_y = c (1 - p_y) f_y        dz_v = -(c / Z) E_v f_v             f_v = dz_v / da_v of the raw logit a

The target's part is exact and apart from the rest; c / Z scales rows of hidden or of E @ W, never E.
Rows with logp below -80 leave the range of float32 around that reference: they are walked again against their
true maximum (`_redo`). From then on only `ref` tells them from the others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..backends import torch_ as steps
from ..backends.torch_ import LN2, LOG2E
from .plan import GATHER_BYTES, HALF, Plan

SHIFT = 58.0  # base 2; e^40.2
LOWEST = -80.0  # logp below which Z leaves 2^-58 .. 2^58
STEEP = 2.0**64  # the largest c / Z; |c| above 64 may exceed it where p is near 1

# A GEMM of fewer rows may add in another order than that of a whole chunk. Where logits are large, the sums
# of rows walked again by themselves would then not fit the E that the backward builds in whole chunks.
FEW = 16

Index = slice | Tensor  # rows of the flat hidden


@dataclass(frozen=True)
class Head:
    """What turns a hidden row into logits: z = cap(logit_scale * (h W^T + b)) / temperature."""

    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    logit_scale: float = 1.0
    softcap: float | None = None
    operand: torch.dtype | None = None  # GEMM operands are rounded to this first (autocast)
    rounded: bool = False  # precision="bf16"

    def tile(self, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        """weight [v, H] and bias [v] of a slice of the vocabulary."""
        weight = self.weight[start:stop]
        if self.operand is not None:
            weight = weight.to(self.operand)
        return weight, None if self.bias is None else self.bias[start:stop]


@dataclass
class Chunk:
    """Rows that are walked together, and what a walk leaves of them."""

    index: Index
    x: Tensor  # [r, H], as the GEMMs take it
    target: Tensor  # [r]
    gain: float | Tensor  # [r]; base-2 exponent per unit of (capped) logit
    factor: Tensor  # [r]; dz/da, but for the cap's 1 - tanh^2
    z: Tensor  # [r], the target's logit
    ref: Tensor  # [r], base 2
    total: Tensor  # [r], S
    slope: Tensor | None = None  # [r], 1 - tanh^2 of the target, under a cap
    moment: Tensor | None = None  # [r] float64, sum_v E_v (z_v - z_y)

    def rows(self, index: Tensor) -> Chunk:
        """Some of the rows, with sums of their own."""
        return replace(
            self,
            index=index,
            x=self.x[index],
            target=self.target[index],
            gain=self.gain[index] if isinstance(self.gain, Tensor) else self.gain,
            factor=self.factor[index],
            z=self.z[index],
            ref=self.ref[index],
            total=self.total[index],
            slope=None if self.slope is None else self.slope[index],
            moment=None if self.moment is None else self.moment[index],
        )

    def finish(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """logp, lse, 1 - p_y, 1/Z, each [r] float64."""
        return steps.finish_rows(self.z, self.ref, self.total)

    def offset(self) -> Tensor:
        """[r] float64: what turns an exponent into (z_v - z_y) log2 e; 58 but for rows walked again."""
        return self.ref.double() - self.z.double() * LOG2E

    def entropy(self) -> Tensor:  # [r] float64
        assert self.moment is not None
        logp, _, _, inverse = self.finish()
        return -logp - inverse * self.moment

    def tame(self, c: Tensor) -> Tensor:  # [r] -> [r]
        """Where c / Z is beyond STEEP the reference moves to the row's lse, so that Z becomes 1.

        A coefficient of e^60, an importance ratio at its cap, times 1/Z = 2^58 has no float32. Returns what E
        against the old reference is to be multiplied by.
        """
        inverse = self.finish()[3]
        moved = (self.ref.double() - inverse.log2()).to(self.ref.dtype)
        ref = torch.where(c.abs() * inverse > STEEP, moved, self.ref)
        scale = torch.exp2(self.ref.double() - ref.double())
        self.ref, self.total = ref, (self.total.double() * scale).to(self.total.dtype)
        return scale.to(self.total.dtype)


def load(
    head: Head,
    hidden: Tensor,  # [M, H]
    index: Index,
    target: Tensor,  # [r]
    temperature: float | Tensor,  # [r]
    *,
    entropy: bool = False,
    saved: Tensor | None = None,  # [3, r] or, under a cap, [4, r]
) -> Chunk:
    """A chunk ready to be walked: the target's logits by gather-dot, and the references from them.

    saved: z, ref, S and slope of an earlier walk over the same rows.
    """
    work = work_dtype(hidden, head.weight)
    x = hidden[index]
    if head.operand is not None:
        x = x.to(head.operand)
    if x.dtype not in HALF or not (x.is_cuda or head.rounded):
        x = x.to(work)
    inverse = 1 / (temperature.to(work) if isinstance(temperature, Tensor) else temperature)
    gain = (head.logit_scale if head.softcap is None else head.softcap) * LOG2E * inverse
    factor = torch.as_tensor(head.logit_scale * inverse, dtype=work, device=x.device).expand(x.shape[0])
    if saved is not None:
        z, ref, total = saved[:3]
        slope = None if head.softcap is None else saved[3]
    else:
        z, slope = steps.target_logit(x, head.weight, head.bias, target, head.operand).double(), None
        z = z * head.logit_scale
        if head.softcap is not None:
            tanh = torch.tanh(z / head.softcap)
            z, slope = head.softcap * tanh, (1 - tanh * tanh).to(work)
        z = (z * inverse).to(work)
        ref = (z.double() * LOG2E + SHIFT).to(work)
        total = torch.zeros_like(z)
    moment = torch.zeros_like(z, dtype=torch.float64) if entropy else None
    return Chunk(index, x, target, gain, factor, z, ref, total, slope, moment)


class Walk:
    """Walks over the vocabulary for one head, with the sizes of a plan and scratch for its tiles."""

    def __init__(self, head: Head, plan: Plan, scratch: Tensor) -> None:  # scratch: flat, work dtype
        self.head, self.rows, self.cols = head, plan.rows, plan.cols
        self.area = plan.rows * plan.cols
        # rows of size [H] that may be copied at a time on top of the plan's own
        self.block = max(1, GATHER_BYTES // (3 * head.weight.shape[1] * scratch.element_size()))
        self.scratch = scratch

    def tiles(self) -> Iterator[tuple[int, int]]:
        vocab = self.head.weight.shape[0]
        for start in range(0, vocab, self.cols):
            yield start, min(start + self.cols, vocab)

    def _scratch(self, number: int, rows: int, cols: int) -> Tensor:
        """Scratch tile `number` as [rows, cols]."""
        return self.scratch[number * self.area :][: rows * cols].view(rows, cols)

    def complete(self, rows: int) -> Tensor:
        """Scratch for complete rows, [rows, V]: behind the tiles, in plans that hold them."""
        vocab = self.head.weight.shape[0]
        return self.scratch[self.scratch.numel() - self.rows * vocab :][: rows * vocab].view(rows, vocab)

    def exponents(
        self, chunk: Chunk, start: int, stop: int, tile: Tensor, ref: Tensor | None, used: int
    ) -> Tensor | None:
        """Fills tile with exponents; returns tanh^2 in scratch tile `used` if the head is capped."""
        head, shape = self.head, (chunk.x.shape[0], stop - start)
        square = None if head.softcap is None else self._scratch(used, *shape)
        weight, bias = head.tile(start, stop)
        steps.exponents(
            tile,
            chunk.x,
            weight,
            bias,
            ref,
            inner=head.logit_scale / head.softcap if head.softcap is not None else 1.0,
            gain=chunk.gain,
            square=square,
            rounded=head.rounded,
        )
        return square

    def forward(
        self,
        chunk: Chunk,
        keep: Tensor | None = None,  # [r, V] out
        product: Tensor | None = None,  # [r, H] out
    ) -> None:
        """Fills chunk.total (and chunk.moment): all that log-probs, lse and entropies need.

        keep receives E f, product receives (E f) @ W, where f is the cap's 1 - tanh^2 (after S is summed).
        """
        self._walk(chunk, keep, product)
        logp, _, _, _ = chunk.finish()
        lost = (~(logp >= LOWEST)).nonzero().squeeze(1)
        if lost.numel():
            few = min(FEW, logp.numel())
            lost = lost.repeat(-(-few // lost.numel()))[: max(few, lost.numel())]
            for index in lost.tensor_split(-(-lost.numel() // self.block)):  # evenly
                self._redo(chunk, index, keep, product)

    def _walk(
        self, chunk: Chunk, keep: Tensor | None, product: Tensor | None, at: Tensor | None = None
    ) -> None:
        """at: the rows of `keep` that the chunk's rows go to; None where they are all of them, in place.

        chunk.moment is taken about the target's logit, or about the reference of rows that are walked again.
        """
        rows = chunk.x.shape[0]
        pivot = (chunk.offset() if at is None else torch.zeros_like(chunk.z)).to(chunk.z.dtype)
        for start, stop in self.tiles():
            if keep is not None and at is None:
                tile = keep[:, start:stop]
            else:
                tile = self._scratch(0, rows, stop - start)
            square = self.exponents(chunk, start, stop, tile, chunk.ref, used=1)
            distance = None
            if chunk.moment is not None:
                distance = self._scratch(2 if square is not None else 1, rows, stop - start)
                torch.add(tile, pivot[:, None], out=distance)
            steps.exp_tile(tile, chunk.target - start)
            chunk.total.add_(tile.sum(1))
            if distance is not None and chunk.moment is not None:
                chunk.moment.add_(distance.mul_(tile).sum(1), alpha=LN2)
            if square is not None and (keep is not None or product is not None):
                tile.addcmul_(tile, square, value=-1)
            if product is not None:
                weight, _ = self.head.tile(start, stop)
                steps.gemm(product, tile, weight, beta=float(start > 0), rounded=self.head.rounded)
            if keep is not None and at is not None:
                keep[at, start:stop] = tile

    def _redo(self, chunk: Chunk, index: Tensor, keep: Tensor | None, product: Tensor | None) -> None:
        """Walks some rows again, against their true maximum instead of the target."""
        part = chunk.rows(index)
        part.ref = torch.full_like(part.z, -math.inf)
        for start, stop in self.tiles():
            tile = self._scratch(0, index.numel(), stop - start)
            self.exponents(part, start, stop, tile, None, used=1)
            part.ref = torch.maximum(part.ref, tile.amax(1))
        part.total = torch.zeros_like(part.z)
        part.moment = None if part.moment is None else torch.zeros_like(part.moment)
        part_product = None if product is None else product[index]
        self._walk(part, keep, part_product, at=index)
        chunk.ref[index], chunk.total[index] = part.ref, part.total
        if chunk.moment is not None and part.moment is not None:
            chunk.moment[index] = part.moment + LN2 * part.offset() * part.total
        if product is not None and part_product is not None:
            product[index] = part_product

    def by_tile(self, target: Tensor) -> list[Tensor]:  # [r] -> [k] each
        """For each tile of the vocabulary the rows whose target lies in it. One small copy to the host."""
        order = target.argsort(stable=True)
        edges = torch.tensor([stop for _, stop in self.tiles()], device=target.device)
        bounds = torch.searchsorted(target[order], edges).tolist()
        return [order[a:b] for a, b in zip([0, *bounds], bounds, strict=False)]

    def backward(
        self,
        chunk: Chunk,
        place: slice,  # of the chunk among the live rows
        coef: Coefficients,
        mine: list[Tensor],  # by_tile of its targets
        grads: Gradients,
        *,
        kept: Tensor | None = None,  # [r, V], what forward kept; None: tiles are computed again
        only: int | None = None,  # the number of one tile; the last one completes dhidden
        parts: tuple[bool, bool] = (True, True),  # dhidden; dweight and dbias
    ) -> None:
        """Adds the gradients of a chunk."""
        vocab = self.head.weight.shape[0]
        scaled = chunk.x.to(chunk.z.dtype) * coef.rows[:, None]
        if chunk.x.dtype == torch.bfloat16:  # float16 has no range for c/Z, and is multiplied in float32
            scaled = scaled.to(torch.bfloat16)
        dhidden = grads.rows_of_hidden(chunk, place) if parts[0] else None
        for number, (start, stop) in enumerate(self.tiles()):
            if only is not None and number != only:
                continue
            if kept is not None:
                tile = kept[:, start:stop]
            else:
                tile = self._scratch(0, chunk.x.shape[0], stop - start)
                self._gradient_tile(chunk, coef, start, stop, tile)
            if dhidden is not None:
                weight, _ = self.head.tile(start, stop)
                steps.gemm(dhidden, tile, weight, beta=float(start > 0), rounded=self.head.rounded)
            if parts[1]:
                grads.add_tile(chunk, coef, tile, scaled, start, mine[number], first=place.start == 0)
            if dhidden is not None and stop == vocab:
                dhidden.mul_(coef.rows[:, None])
                grads.store_hidden(chunk, dhidden, coef.target)

    def _gradient_tile(self, chunk: Chunk, coef: Coefficients, start: int, stop: int, tile: Tensor) -> None:
        """E f again; with an entropy gradient also times its affine function of z_v - z_y."""
        square = self.exponents(chunk, start, stop, tile, chunk.ref, used=1)
        mix = None
        if coef.mix is not None:
            constant, slope = coef.mix
            mix = self._scratch(2 if square is not None else 1, *tile.shape)
            torch.add(tile, chunk.offset().to(tile.dtype)[:, None], out=mix)
            mix.mul_(slope[:, None] * LN2).add_(constant[:, None])
        steps.exp_tile(tile, chunk.target - start)
        if square is not None:
            tile.addcmul_(tile, square, value=-1)
        if mix is not None:
            tile.mul_(mix)


@dataclass(frozen=True)
class Coefficients:
    """What multiplies the rows of a chunk in the gradient GEMMs, [r] each."""

    rows: Tensor  # on E f
    target: Tensor  # on the target's column
    mix: tuple[Tensor, Tensor] | None  # (a, b) where E f is first multiplied by a + b (z_v - z_y)


def coefficients(
    chunk: Chunk,
    dlogp: Tensor,  # [r]
    dlse: Tensor | None = None,  # [r]
    dentropy: Tensor | None = None,  # [r]
    entropy: Tensor | None = None,  # [r]; given with dentropy
) -> Coefficients:
    """Upstream gradients of logp, lse and entropy -> coefficients of dz.

    d lse / dz_v = p_v, and d entropy / dz_v = -p_v (log p_v + entropy) with log p_v = logp + z_v - z_y.
    """
    logp, _, miss, inverse = chunk.finish()
    work = chunk.z.dtype
    slope = chunk.factor if chunk.slope is None else chunk.factor * chunk.slope
    others = dlogp if dlse is None else dlogp - dlse
    p = logp.exp()  # not 1 - miss, which would lose the digits of a small p
    target = dlogp * miss if dlse is None else dlogp * miss + dlse * p
    if dentropy is None or entropy is None:
        return Coefficients((-others * inverse * chunk.factor).to(work), (target * slope).to(work), None)
    target = target - dentropy * p * (logp + entropy)
    constant = -(others + dentropy * (logp + entropy)) * inverse
    mix = constant.to(work), (-dentropy * inverse).to(work)
    return Coefficients(chunk.factor, (target * slope).to(work), mix)


class Gradients:
    """The gradients under construction, allocated once; chunks add to them.

    dweight is summed in the dtype of the logits and rounded once. Where the two dtypes are the same it is its
    own sum. Else `single` and `window`, which see every column of a chunk at once, hold a sum [V, H]; and
    `recompute` finishes one slice of the vocabulary after the other, over all chunks (`sliced`), so that a
    slice is all it holds; and dhidden of all rows meanwhile, unless the plan forms that `apart`.
    """

    def __init__(
        self,
        head: Head,
        hidden: Tensor,
        live: int,
        needs: tuple[bool, bool, bool],  # hidden, weight, bias
        complete: bool,  # chunks come with every column
        apart: bool = False,  # as Plan.apart
    ) -> None:
        self.head, self.work = head, work_dtype(hidden, head.weight)
        device = hidden.device

        def dtype(tensor: Tensor) -> torch.dtype:
            # single and window scale by the upstream gradient later, and float16 may have lost it by then
            return self.work if complete and tensor.dtype == torch.float16 else tensor.dtype

        everything = live == hidden.shape[0]
        new = torch.empty if everything else torch.zeros
        shape = head.weight.shape
        self.hidden = new(hidden.shape, dtype=dtype(hidden), device=device) if needs[0] else None
        self.weight = torch.empty(shape, dtype=dtype(head.weight), device=device) if needs[1] else None
        self.bias = torch.zeros(shape[0], dtype=self.work, device=device) if needs[2] else None
        rounded = self.weight is not None and self.weight.dtype != self.work
        self.sliced = rounded and not complete
        self.sum = self.weight
        if rounded:
            self.sum = None if self.sliced else torch.empty(shape, dtype=self.work, device=device)
        # chunks come again for every slice, so what is not summed in place must stay in between
        self.rows = None
        summed = everything and self.hidden is not None and self.hidden.dtype == self.work
        if self.sliced and self.hidden is not None and not apart and not summed:
            self.rows = torch.empty(live, hidden.shape[1], dtype=self.work, device=device)

    def _in_place(self, index: Index) -> bool:
        return isinstance(index, slice) and self.hidden is not None and self.hidden.dtype == self.work

    def rows_of_hidden(self, chunk: Chunk, place: slice) -> Tensor | None:
        """Where dhidden of a chunk is summed: in place where it can be."""
        if self.hidden is None:
            return None
        if self._in_place(chunk.index):
            return self.hidden[chunk.index]
        return torch.empty_like(chunk.x, dtype=self.work) if self.rows is None else self.rows[place]

    def store_hidden(self, chunk: Chunk, dhidden: Tensor, coef: Tensor) -> None:
        """Completes dhidden [r, H] of a chunk by coef [r] times the targets' rows of the weight."""
        steps.add_target_rows(dhidden, self.head.weight, chunk.target, coef, self.head.operand)
        if self.hidden is not None and not self._in_place(chunk.index):
            self.hidden[chunk.index] = dhidden.to(self.hidden.dtype)

    def add_tile(
        self,
        chunk: Chunk,
        coef: Coefficients,
        tile: Tensor,  # [r, v], E f
        scaled: Tensor,  # [r, H]
        start: int,  # of the slice of the vocabulary
        mine: Tensor,  # [k] rows whose target lies in it
        *,
        first: bool,  # the first chunk writes, the others add
    ) -> None:
        """dweight and dbias of one slice of the vocabulary."""
        stop = start + tile.shape[1]
        target, column = coef.target[mine], chunk.target[mine] - start
        if self.weight is not None:
            if self.sum is not None:
                part = self.sum[start:stop]
            else:
                if first:
                    self.slice = torch.empty(
                        stop - start, scaled.shape[1], dtype=self.work, device=tile.device
                    )
                part = self.slice
            steps.gemm(part, tile.t(), scaled, beta=float(not first), rounded=self.head.rounded)
            steps.add_hidden_rows(part, column, chunk.x, mine, target)
        if self.bias is not None:
            self.bias[start:stop].addmv_(tile.t(), coef.rows)
            self.bias[start:stop].index_add_(0, column, target)

    def round_slice(self, start: int) -> None:
        """Writes the slice of dweight that begins at `start`, complete now."""
        if self.weight is not None:
            self.weight[start : start + self.slice.shape[0]] = self.slice.to(self.weight.dtype)

    def add_jacobian(self, chunk: Chunk, place: slice, product: Tensor, others: Tensor, coef: Tensor) -> None:
        """dhidden of a chunk from (1/Z) (E f) @ W, product: others [r] times it, and the targets' rows."""
        dhidden = self.rows_of_hidden(chunk, place)
        if dhidden is not None:
            torch.mul(product, others[:, None], out=dhidden)
            self.store_hidden(chunk, dhidden, coef)

    def clear(self) -> None:
        """No live row at all: zeros."""
        for grad in (self.hidden, self.weight, self.sum, self.bias):
            if grad is not None:
                grad.zero_()

    def finish(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """dhidden, dweight, dbias, in the dtypes of what they are gradients of."""
        if self.weight is not None and self.sum is not None and self.sum is not self.weight:
            self.weight.copy_(self.sum)
        bias = None if self.bias is None or self.head.bias is None else self.bias.to(self.head.bias.dtype)
        return self.hidden, self.weight, bias


def work_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """float64 if either operand is, else float32: the dtype of logits, sums and log-probs."""
    return torch.float64 if torch.float64 in (hidden.dtype, weight.dtype) else torch.float32
