"""The plans' walks over the vocabulary for chunks of rows, written once over the steps of a backend.

For row t with target y and z its scaled, capped, tempered logits, one forward walk computes

    E_tv = 2^(z_tv log2 e - ref_t), the target's column 0         S_t = sum_v E_tv

against a reference known before the first tile, ref = z_y log2 e + 58 (e^40 above the target), so that tiles
may come in any order and no running maximum is kept. Then, with Z = S + 2^(z_y log2 e - ref),

    logp = -softplus(ln S + ref ln 2 - z_y)      1 - p_y = S / Z      lse = z_y - logp

    dz_y = c (1 - p_y) f_y        dz_v = -(c / Z) E_v f_v             f_v = dz_v / da_v of the raw logit a

The target's part is exact and apart from the rest; c / Z scales rows of hidden or of E @ W, never E.
Rows with logp below -80 leave the range of float32 around that reference. They are seen tile by tile; their
reference then jumps to the tile's maximum, and what was summed so far is scaled down: a running maximum after
all, for those rows alone. References are whole numbers, so that all such scaling is by powers of two: exact.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..backends import torch_ as steps
from ..backends.torch_ import HALF, LN2, LOG2E
from .coefficients import Coefficients
from .plan import GATHER_BYTES, Plan, Problem, gemm_dtype

SHIFT = 58.0  # base 2; e^40.2
CEILING = 58.0  # the largest exponent, base 2: about e^80 above the target
LOWEST = -80.0  # logp below which Z may have left 2^-58 .. 2^58
STEEP = 2.0**64  # the largest c / Z; |c| above 64 may exceed it where p is near 1


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

    def operands(self, x: Tensor) -> Tensor:
        """Rows of hidden as the GEMMs take them: 16-bit only where the weight is."""
        x = x if self.operand is None else x.to(self.operand)
        half = x.dtype in HALF and x.dtype == (self.operand or self.weight.dtype)
        if half and (x.dtype == torch.bfloat16 or x.device.type != "cpu"):
            return x
        return x.to(work_dtype(x, self.weight))

    def average(self, size: int, work: torch.dtype) -> tuple[Tensor, Tensor | float]:
        """Mean over the vocabulary of weight, [H], and of bias, float64; reads `size` rows at a time."""
        total = torch.zeros(self.weight.shape[1], dtype=torch.float64, device=self.weight.device)
        for start in range(0, self.weight.shape[0], size):
            weight, _ = self.tile(start, start + size)
            total += weight.to(work).sum(0).double()
        bias = 0.0 if self.bias is None else self.bias.double().mean()
        return total / self.weight.shape[0], bias


@dataclass
class Chunk:
    """Rows that are walked together, and what a walk leaves of them."""

    x: Tensor | None  # [r, H], as the GEMMs take it; None: only the vectors below
    target: Tensor  # [r]
    gain: float | Tensor  # [r]; base-2 exponent per unit of (capped) logit
    factor: Tensor  # [r]; dz/da, but for the cap's 1 - tanh^2
    z: Tensor  # [r], the target's logit
    ref: Tensor  # [r], base 2, whole numbers
    total: Tensor  # [r], S
    slope: Tensor | None = None  # [r], 1 - tanh^2 of the target, under a cap
    moment: Tensor | None = None  # [r] float64, sum_v E_v (x_v + pivot) of the exponents x
    pivot: Tensor | None = None  # [r] makes that the distance to the target, or to the maximum after a jump
    average: Tensor | None = None  # [r] float64, mean_v z_v
    squares: Tensor | None = None  # [r] float64, sum_v E_v^2
    refs: list[Tensor] = field(default_factory=list)  # the reference of each tile that was kept

    def part(self, index: Tensor | slice, x: Tensor | None = None) -> Chunk:
        """Some of the rows, for a backward; with their x if it is given."""

        def some(vector: Tensor | None) -> Tensor | None:
            return None if vector is None else vector[index]

        ref = self.ref[index]
        return replace(
            self,
            x=some(self.x) if x is None else x,
            target=self.target[index],
            gain=self.gain[index] if isinstance(self.gain, Tensor) else self.gain,
            factor=self.factor[index],
            z=self.z[index],
            ref=ref,
            total=self.total[index],
            slope=some(self.slope),
            moment=None,
            pivot=None,
            average=None,
            squares=None,
            refs=[ref if kept is self.ref else kept[index] for kept in self.refs],
        )

    def finish(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """logp, lse, 1 - p_y, 1/Z, each [r] float64."""
        return steps.finish_rows(self.z, self.ref, self.total)

    def offset(self) -> Tensor:
        """[r] float64: what turns an exponent into (z_v - z_y) log2 e; about 58 but for rows that jumped."""
        return self.ref.double() - self.z.double() * LOG2E

    def entropy(self) -> Tensor:  # [r] float64
        assert self.moment is not None and self.pivot is not None
        logp, _, _, inverse = self.finish()
        to_target = self.moment + (self.offset() - self.pivot) * self.total.double()
        return -logp - inverse * LN2 * to_target

    def collision(self) -> Tensor:  # [r] float64
        """log sum_v p_v^2."""
        assert self.squares is not None
        inverse = self.finish()[3]
        return (self.squares + torch.exp2(-2 * self.offset())).log() + 2 * inverse.log()

    def stats(self) -> dict[str, Tensor]:  # [r] float64 each
        """What the walk was to find, under the names of `ops.STATS`."""
        logp, lse, _, _ = self.finish()
        found = {"logp": logp, "lse": lse}
        if self.moment is not None:
            found["entropy"] = self.entropy()
        if self.average is not None:
            found["average"] = self.average
        if self.squares is not None:
            found["squares"] = self.collision()
        return found

    def restart(self, head: Head) -> None:
        """As it was before the first walk."""
        self.ref, self.refs = reference(self.z), []
        average = None if head.softcap is None else self.average
        for sums in (self.total, self.moment, self.squares, average):
            if sums is not None:
                sums.zero_()
        self.pivot = None if self.moment is None else self.offset()

    def tame(self, c: Tensor) -> None:  # [r]
        """Where c / Z is beyond STEEP the reference moves near the row's lse, so that Z becomes about 1.

        A coefficient of e^60, an importance ratio at its cap, times 1/Z = 2^58 has no float32.
        """
        inverse = self.finish()[3]
        steep = c.abs() * inverse > STEEP
        if steep.device.type == "cpu" and not bool(steep.any()):
            return
        moved = (self.ref.double() - inverse.log2()).round().to(self.ref.dtype)
        ref = torch.where(steep, moved, self.ref)
        self.total = self.total * torch.exp2(self.ref - ref)
        self.ref = ref


def reference(z: Tensor) -> Tensor:
    """Where the exponentials of rows are measured from, base 2, from their targets' logits."""
    return (z.double() * LOG2E + SHIFT).round().to(z.dtype)


def load(
    head: Head,
    x: Tensor,  # [r, H]
    target: Tensor,  # [r]
    temperature: float | Tensor,  # [r]
    *,
    stats: Container[str] = (),  # names, besides logp and lse
    average: tuple[Tensor, Tensor | float] | None = None,  # of Head.average, where the mean logit is wanted
) -> Chunk:
    """A chunk ready to be walked: the target's logits by gather-dot, and the references from them."""
    work, x = work_dtype(x, head.weight), head.operands(x)
    gain, factor, inverse = _scales(head, temperature, target.numel(), work, x.device)
    z, slope = steps.target_logit(x, head.weight, head.bias, target, head.operand).double(), None
    z = z * head.logit_scale
    if head.softcap is not None:
        tanh = torch.tanh(z / head.softcap)
        z, slope = head.softcap * tanh, (1 - tanh * tanh).to(work)
    z = (z * inverse).to(work)
    chunk = Chunk(x, target, gain, factor, z, reference(z), torch.zeros_like(z), slope)
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

    def __init__(self, head: Head, plan: Plan, problem: Problem, scratch: Tensor) -> None:  # scratch: bytes
        self.head, self.cols = head, plan.cols
        self.work, self.gemm_dtype = problem.work, gemm_dtype(problem)
        self.scratch, self.area = scratch, plan.rows * plan.cols * problem.work.itemsize
        tiles, spare, complete = problem.scratch(plan.name, plan.rows, plan.cols)
        self.spare = scratch[tiles:][:spare]
        self.whole = scratch[tiles + spare :][:complete].view(self.gemm_dtype)
        self.split = not head.rounded
        # rows of size [H] that may be copied at a time on top of the plan's own
        self.block = max(1, GATHER_BYTES // (3 * head.weight.shape[1] * problem.work.itemsize))
        # An accelerator walks in trust, and again where a look at the sums finds a row lost; or it watches
        # from the start where the host may not look (max_live). On a CPU looking costs nothing.
        self.static = problem.static and not problem.on_cpu
        self.watches = problem.on_cpu or self.static

    def tiles(self) -> Iterator[tuple[int, int]]:
        vocab = self.head.weight.shape[0]
        for start in range(0, vocab, self.cols):
            yield start, min(start + self.cols, vocab)

    def _scratch(self, number: int, rows: int, cols: int, *, dtype: torch.dtype | None = None) -> Tensor:
        """Scratch tile `number` as [rows, cols]."""
        dtype = dtype or self.work
        return self.scratch[number * self.area :][: rows * cols * dtype.itemsize].view(dtype).view(rows, cols)

    def complete(self, rows: int) -> Tensor:
        """Scratch for complete rows, [rows, V], in plans that hold them."""
        vocab = self.head.weight.shape[0]
        return self.whole[: rows * vocab].view(rows, vocab)

    def gemm(self, out: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
        """A gradient's product, in the dtype of the operands."""
        steps.gemm(out, a, b, beta=float(add), spare=self.spare)

    def _exponents(self, chunk: Chunk, start: int, stop: int, tile: Tensor) -> Tensor | None:
        """Fills tile with exponents; returns tanh^2 in the second scratch tile if the head is capped."""
        head = self.head
        square = None if head.softcap is None else self._scratch(1, *tile.shape)
        weight, bias = head.tile(start, stop)
        assert chunk.x is not None
        steps.exponents(
            tile,
            chunk.x,
            weight,
            bias,
            chunk.ref,
            inner=head.logit_scale / head.softcap if head.softcap is not None else 1.0,
            gain=chunk.gain,
            square=square,
            split=self.split,
            spare=self.spare,
        )
        return square

    def forward(
        self,
        chunk: Chunk,
        keep: Tensor | None = None,  # [r, V] out
        product: Tensor | None = None,  # [r, H] out
    ) -> None:
        """Fills chunk.total (and moment, average): all that log-probs, lse and entropies need.

        keep receives E f, product receives (E f) @ W, where f is the cap's 1 - tanh^2 (after S is summed).
        """
        if not self.watches:
            self.walk(chunk, keep, product, watch=False)
            if not bool(self.lost(chunk)):
                return
            chunk.restart(self.head)
        self.walk(chunk, keep, product, watch=True)

    def lost(self, chunk: Chunk) -> Tensor:  # []
        """Whether a walk that did not watch has left the range of float32 for some row."""
        return ~(chunk.finish()[0] >= LOWEST).all()

    def walk(self, chunk: Chunk, keep: Tensor | None, product: Tensor | None, *, watch: bool) -> None:
        """One forward walk. watch: look for rows that leave the range, and move their reference."""
        for start, stop in self.tiles():
            direct = keep is not None and keep.dtype == self.work
            tile = (
                keep[:, start:stop] if keep is not None and direct
                else self._scratch(0, chunk.target.numel(), stop - start)
            )  # fmt: skip
            square = self._exponents(chunk, start, stop, tile)
            if chunk.average is not None and square is not None:
                logits = tile.sum(1).double() + (stop - start) * chunk.ref.double()
                chunk.average.add_(logits, alpha=LN2 / self.head.weight.shape[0])
            if watch and self._jump(chunk, tile, product if start > 0 else None):
                square = self._exponents(chunk, start, stop, tile)  # with all digits
            distance = None
            if chunk.moment is not None:
                distance = self._scratch(2 if square is not None else 1, *tile.shape)
                torch.add(tile, chunk.pivot.to(tile.dtype)[:, None], out=distance)  # type: ignore[union-attr]
            steps.exp_tile(tile, chunk.target - start)
            chunk.total.add_(tile.sum(1))
            if chunk.squares is not None:
                steps.add_squares(chunk.squares, tile)
            if distance is not None and chunk.moment is not None:
                chunk.moment.add_(distance.mul_(tile).sum(1))
            if square is not None and (keep is not None or product is not None):
                tile.addcmul_(tile, square, value=-1)
            if keep is not None:
                chunk.refs.append(chunk.ref)
                if not direct:
                    keep[:, start:stop] = tile
            if product is not None:
                weight, _ = self.head.tile(start, stop)
                self.gemm(product, self._rounded(tile), weight, start > 0)

    def _rounded(self, tile: Tensor) -> Tensor:
        """A tile as the gradient GEMMs take it, in the scratch tile after the last one in use."""
        if self.gemm_dtype == tile.dtype:
            return tile
        capped = self.head.softcap is not None
        return self._scratch(1 + capped, *tile.shape, dtype=self.gemm_dtype).copy_(tile)

    def _jump(self, chunk: Chunk, tile: Tensor, product: Tensor | None) -> bool:
        """Moves the reference of rows whose exponents in this tile are beyond CEILING to their maximum.

        Returns whether the tile is to be made again. Where the host may not look it is corrected instead, at
        the cost of the digits that large exponents did not have.
        """
        top = tile.amax(1)
        beyond = top > CEILING
        if not self.static and not bool(beyond.any()):
            return False
        jump = torch.where(beyond, top.ceil(), 0.0)
        if self.static:
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
        return not self.static

    def gradient_tile(
        self,
        chunk: Chunk,
        coef: Coefficients,
        number: int,
        start: int,
        stop: int,
        kept: Tensor | None,  # [r', V], what forward kept; None: the tile is computed again
        live: Tensor | None,  # [r] which rows of kept; None: all
    ) -> Tensor:  # [r, v]
        """E f, times its affine function of z_v - z_y under an entropy gradient, as the GEMMs take it."""
        shape = chunk.target.numel(), stop - start
        if kept is None:
            tile = self._scratch(0, *shape)
            square = self._exponents(chunk, start, stop, tile)
            mix = None if coef.mix is None else self._mix(coef, tile, 1 + (square is not None))
            steps.exp_tile(tile, chunk.target - start)
            if mix is not None:
                tile.mul_(mix)
            if coef.uniform is not None and square is not None:
                tile.add_(coef.uniform[:, None])
            if square is not None:
                tile.addcmul_(tile, square, value=-1)
            return self._rounded(tile)
        moved = chunk.refs[number] is not chunk.ref
        if live is None and not moved and coef.mix is None:
            return kept[:, start:stop]
        tile = self._scratch(0, *shape, dtype=kept.dtype)
        if live is None:
            tile.copy_(kept[:, start:stop])
        else:
            torch.index_select(kept[:, start:stop], 0, live, out=tile)
        if moved:
            tile.mul_(torch.exp2(chunk.refs[number] - chunk.ref)[:, None])
        if coef.mix is not None:
            tiny = torch.finfo(self.work).tiny
            exponent = torch.clamp(tile, min=tiny, out=self._scratch(1, *shape)).log2_()
            tile.mul_(self._mix(coef, exponent, 1))
        return tile

    def _mix(self, coef: Coefficients, exponent: Tensor, number: int) -> Tensor:
        """a + b x of exponents x, in scratch tile `number` (which may be the exponents' own)."""
        assert coef.mix is not None
        constant, slope = coef.mix
        mix = self._scratch(number, *exponent.shape)
        return torch.addcmul(constant[:, None], exponent, slope[:, None], out=mix)


def work_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """float64 if either operand is, else float32: the dtype of logits, sums and log-probs."""
    return torch.float64 if torch.float64 in (hidden.dtype, weight.dtype) else torch.float32
