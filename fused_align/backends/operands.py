"""What the steps of a backend are given: the head, and the vectors of the rows that are walked together.

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

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .. import backends

LOG2E = 1 / math.log(2)
LN2 = math.log(2)
SHIFT = 58.0  # base 2; e^40.2
CEILING = 58.0  # the largest exponent, base 2: about e^80 above the target
LOWEST = -80.0  # logp below which Z may have left 2^-58 .. 2^58
FAR = 2.0**20  # 2^-FAR is 0 in any dtype
STEEP = 2.0**64  # the largest c / Z; |c| above 64 may exceed it where p is near 1
HALF = (torch.bfloat16, torch.float16)

#: the statistics of a token that a walk can give; the first two always
STATS = ("logp", "lse", "entropy", "average", "squares")


@dataclass(frozen=True)
class Head:
    """What turns a hidden row into logits: z = cap(logit_scale * (h W^T + b)) / temperature."""

    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    logit_scale: float = 1.0
    softcap: float | None = None
    operand: torch.dtype | None = None  # GEMM operands are rounded to this first (autocast)
    rounded: bool = False  # precision="bf16"
    backend: str = "torch"  # whose steps run

    @property
    def steps(self) -> backends.Steps:
        return backends.steps(self.backend)

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
class Scratch:
    """Tiles for a step's own use, of one flat piece of memory."""

    memory: Tensor  # bytes
    area: int  # bytes of one tile
    work: torch.dtype
    spare: Tensor  # bytes, for what a 16-bit GEMM on a CPU holds on the way

    def tile(self, number: int, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
        """Tile `number` as [r, v]."""
        dtype = dtype or self.work
        return (
            self.memory[number * self.area :][: shape[0] * shape[1] * dtype.itemsize].view(dtype).view(*shape)
        )


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

    def offset(self) -> Tensor:
        """[r] float64: what turns an exponent into (z_v - z_y) log2 e; about 58 but for rows that jumped."""
        return self.ref.double() - self.z.double() * LOG2E

    def restart(self, head: Head) -> None:
        """As it was before the first walk."""
        self.ref, self.refs = reference(self.z), []
        average = None if head.softcap is None else self.average
        for sums in (self.total, self.moment, self.squares, average):
            if sums is not None:
                sums.zero_()
        self.pivot = None if self.moment is None else self.offset()


def reference(z: Tensor) -> Tensor:
    """Where the exponentials of rows are measured from, base 2, from their targets' logits."""
    return (z.double() * LOG2E + SHIFT).round().to(z.dtype)


@dataclass(frozen=True)
class Coefficients:
    """What multiplies the rows of a chunk in the gradient GEMMs, [r] each."""

    rows: Tensor  # on E f
    target: Tensor  # on the target's column
    mix: tuple[Tensor, Tensor] | None = None  # (a, b) where E is first multiplied by a + b x, x its exponent
    average: Tensor | None = None  # on the mean over the vocabulary of weight, without a cap
    uniform: Tensor | None = None  # added to (mixed) E, under a cap: the same thing where f differs by column
    order: Tensor | None = None  # places of the rows with a coefficient other than 0, in order; then anything
    counts: Tensor | None = None  # [3]: how many those are; whether rows were lost; whether references moved

    def tally(self) -> tuple[int, bool, bool]:
        """The counts, read by the host: one small copy."""
        assert self.counts is not None
        alive, lost, moved = self.counts.tolist()
        return alive, bool(lost), bool(moved)

    def part(self, index: Tensor | slice) -> Coefficients:
        def some(vector: Tensor | None) -> Tensor | None:
            return None if vector is None else vector[index]

        return Coefficients(
            self.rows[index],
            self.target[index],
            None if self.mix is None else (self.mix[0][index], self.mix[1][index]),
            some(self.average),
            some(self.uniform),
        )


@dataclass(frozen=True)
class Upstream:
    """dLoss by each statistic of the rows, [r] each."""

    logp: Tensor
    lse: Tensor | None = None
    entropy: Tensor | None = None
    average: Tensor | None = None  # of the mean logit

    def part(self, index: Tensor | slice) -> Upstream:
        return Upstream(*(None if c is None else c[index] for c in self._each()))  # type: ignore[arg-type]

    def _each(self) -> tuple[Tensor | None, ...]:
        return self.logp, self.lse, self.entropy, self.average

    def all(self) -> list[Tensor]:
        return [c for c in self._each() if c is not None]

    def alive(self) -> Tensor:  # [r] bool
        """Rows with a coefficient that is not 0 (NaN is not)."""
        alive = self.logp != 0
        for c in self.all()[1:]:
            alive = alive | (c != 0)
        return alive

    def size(self) -> Tensor:  # [r]
        return torch.stack([c.abs() for c in self.all()]).sum(0)


def work_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """float64 if either operand is, else float32: the dtype of logits, sums and log-probs."""
    return torch.float64 if torch.float64 in (hidden.dtype, weight.dtype) else torch.float32
