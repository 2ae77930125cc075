"""From dLoss by the statistics of a row to what multiplies that row in the gradient GEMMs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..backends.torch_ import LN2

if TYPE_CHECKING:
    from .passes import Chunk

# A GEMM of fewer rows may add in another order than that of a whole chunk. Where logits are large, E that is
# built again would then not fit the sums of the first walk. So dead rows are dropped down to this many.
FEW = 16


def live_places(alive: Tensor) -> Tensor:  # [n] bool -> [k] int64
    """Places of the rows to build again: those alive and, where these are few, some others."""
    places = alive.nonzero().squeeze(1)
    if not 0 < places.numel() < FEW:
        return places
    return torch.sort(~alive, stable=True).indices[:FEW].sort().values


@dataclass(frozen=True)
class Coefficients:
    """What multiplies the rows of a chunk in the gradient GEMMs, [r] each."""

    rows: Tensor  # on E f
    target: Tensor  # on the target's column
    mix: tuple[Tensor, Tensor] | None = None  # (a, b) where E is first multiplied by a + b x, x its exponent
    average: Tensor | None = None  # on the mean over the vocabulary of weight, without a cap
    uniform: Tensor | None = None  # added to (mixed) E, under a cap: the same thing where f differs by column

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


def coefficients(
    chunk: Chunk,
    up: Upstream,
    entropy: Tensor | None = None,  # [r]; given with up.entropy
    *,
    vocab: int,
) -> Coefficients:
    """Upstream gradients of logp, lse, entropy and mean logit -> coefficients of dz.

    d lse / dz_v = p_v, d mean / dz_v = 1 / V, and d entropy / dz_v = -p_v (log p_v + entropy) with
    log p_v = logp + z_v - z_y.
    """
    logp, _, miss, inverse = chunk.finish()
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
    if up.entropy is None and uniform is None:
        rows = (-others * inverse * chunk.factor).to(work)
        return Coefficients(rows, (target * slope).to(work), None, average)
    constant, mixed = -others * inverse, torch.zeros_like(inverse)
    if up.entropy is not None:
        assert entropy is not None
        shift = up.entropy * (logp + entropy)
        target = target - p * shift
        constant = constant - shift * inverse
        mixed = -up.entropy * inverse
    # z_v - z_y = ln 2 (x_v + offset): what is the same for a row is summed in float64
    mix = (constant + mixed * chunk.offset() * LN2).to(work), (mixed * LN2).to(work)
    return Coefficients(chunk.factor, (target * slope).to(work), mix, average, uniform)
