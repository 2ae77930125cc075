"""`logit_stats` and `logit_gradient` in torch operations: statistics of logits that exist already.

For row t with target y and z its tempered logits, against the largest of them, m,

    O = sum_{v != y} e^(z_v - m)      A = sum_{v != y} e^(z_v - m) (z_v - m)      g = z_y - m      Z = O + e^g

    logp = -softplus(ln O - g)      lse = m + ln Z      entropy = ln Z - (A + g e^g) / Z

The target is apart from the others, so that log(p) of a sure token keeps its digits. With c, l and h the
coefficients of the three, the gradient of a logit is 1 / temperature times

    v != y:  p_v (l - c - h (ln p_v + entropy))        v = y:  c (1 - p_y) + p_y (l - h (logp + entropy))
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ..batch import IGNORE_INDEX

BLOCK_BYTES = 8 << 20  # rows are upcast and exponentiated in blocks of this size
NOTHING = -1000.0  # its power is 0; exponents below are taken for it, so that 0 * inf does not arise


class LogitStats(NamedTuple):
    """What is found of each row, [M] each; 0 of ignored ones. float64 for float64 logits, else float32."""

    logp: Tensor
    lse: Tensor
    entropy: Tensor | None
    largest: Tensor  # tempered logit; of cuda the raw one. For the same backend's backward alone
    total: Tensor  # Z


def _blocks(logits: Tensor, target: Tensor, work: torch.dtype) -> Iterator[Tensor]:
    """Indices of the live rows, a block at a time."""
    live = (target != IGNORE_INDEX).nonzero().squeeze(1)
    yield from live.split(max(1, BLOCK_BYTES // (logits.shape[-1] * work.itemsize)))


def _load(logits: Tensor, at: Tensor, inverse: Tensor | None, scalar: float, work: torch.dtype) -> Tensor:
    z = logits[at].to(work)
    return z.mul_(scalar) if inverse is None else z.mul_(inverse[at][:, None])


def logit_stats(
    logits: Tensor,  # [M, V]
    target: Tensor,  # [M]; one that lies outside [0, V) gives NaN
    inverse: Tensor | None,  # [M], 1 / temperature
    scalar: float,  # 1 / temperature where inverse is None
    *,
    entropy: bool = False,
) -> LogitStats:
    """What is to be known of every row, in one read, a block of rows at a time."""
    work = torch.float64 if logits.dtype == torch.float64 else torch.float32
    logp, lse, largest, total = (logits.new_zeros(target.shape, dtype=work) for _ in range(4))
    entropies = logits.new_zeros(target.shape, dtype=work) if entropy else None
    for at in _blocks(logits, target, work):
        y = target[at].clamp(0, logits.shape[-1] - 1)[:, None]
        z = _load(logits, at, inverse, scalar, work)
        top = z.amax(1)
        gap = (z.gather(1, y).squeeze(1).double() - top.double()).clamp(max=0)
        z.sub_(top[:, None])
        distance = z.clamp(min=NOTHING) if entropy else z
        others = z.exp_().scatter_(1, y, 0.0)
        summed, p = others.sum(1).double(), gap.exp()
        Z = summed + p
        value = -softplus(summed.log() - gap, threshold=700).to(work)
        if logits.device.type != "cpu":
            value = torch.where(y.squeeze(1) == target[at], value, torch.nan)
        logp[at], largest[at], total[at] = value, top, Z.to(work)
        lse[at] = (top.double() + Z.log()).to(work)
        if entropies is not None:
            moment = distance.mul_(others).sum(1).double() + p * gap.clamp(min=NOTHING)
            entropies[at] = (Z.log() - moment / Z).to(work)
    return LogitStats(logp, lse, entropies, largest, total)


def logit_gradient(
    dlogp: Tensor,  # [M]
    dlse: Tensor | None,  # [M]
    dentropy: Tensor | None,  # [M]; needs the entropy among the stats
    logits: Tensor,  # [M, V]
    target: Tensor,  # [M]
    stats: LogitStats,
    inverse: Tensor | None,  # [M]
    scalar: float,
    *,
    out: Tensor,  # [M, V]; may be the logits
) -> None:
    """The gradient of the logits; ignored rows get zeros."""
    out[target == IGNORE_INDEX] = 0
    for at in _blocks(logits, target, stats.logp.dtype):
        y = target[at].clamp(0, logits.shape[-1] - 1)[:, None]
        # against the largest and not their logsumexp, whose rounding would scale the row
        z = _load(logits, at, inverse, scalar, stats.logp.dtype).sub_(stats.largest[at][:, None])
        logp, heat = stats.logp[at], scalar if inverse is None else inverse[at]
        own, slope = dlogp[at] * -logp.expm1(), -dlogp[at]
        if dlse is not None:
            own, slope = own + dlse[at] * logp.exp(), slope + dlse[at]
        e = None
        if dentropy is not None and stats.entropy is not None:
            bend, H = dentropy[at], stats.entropy[at]
            own = own - bend * logp.exp() * (logp.clamp(min=NOTHING) + H)
            slope = slope - bend * (H - stats.total[at].log())
            z.clamp_(min=NOTHING)
            e = z.exp()
            e.mul_(torch.addcmul(slope[:, None], z, bend[:, None], value=-1, out=z))
        else:
            e = z.exp_().mul_(slope[:, None])
        e.mul_((heat / stats.total[at])[:, None])
        out[at] = e.scatter_(1, y, (own * heat)[:, None]).to(out.dtype)
