"""What a loss is: pure functions of per-token log-probs. Nothing here knows how those were computed.

    logp [n] --minus anchor--> log_ratio [n] --Humanline--> log_ratio [n] --Loss.items--> items
    loss = dot(items, Loss.weights) / normalizer

The weights are fixed before the forward, so with a given normalizer the losses of micro-batches add up to the
loss of the whole batch, and any subset of whole items can be evaluated, and differentiated, on its own: that
is what lets the planner form gradients chunk by chunk while the exponentials are still at hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..batch import Batch
from ..humanline import Humanline

UNITS = {"token": "tokens", "sequence": "sequences", "pair": "pairs"}


@dataclass(frozen=True)
class Loss:
    """Base of every loss. A subclass is a frozen dataclass with `item`, `anchor` and `items`.

    item: what one term of the sum couples: "token" | "sequence" | "pair". Items must be computable on any
        subset of whole items.
    anchor: what the log-ratio is measured against: "old" (the policy that sampled; batch.old_logp, or the
        detached log-prob itself where that is None), "ref" (batch.ref_logp), or None (log_ratio is logp).

    A subclass enters `Loss.registry` under its lower-case name.
    """

    item: ClassVar[str] = "token"
    anchor: ClassVar[str | None] = None
    registry: ClassVar[dict[str, type[Loss]]] = {}

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if cls.item not in UNITS or cls.anchor not in ("old", "ref", None):
            raise TypeError(
                f'{cls.__name__}: item must be one of {sorted(UNITS)} and anchor "old", "ref" or None; '
                f"got item={cls.item!r}, anchor={cls.anchor!r}."
            )
        if cls.items is not Loss.items:  # a shared base is no loss
            Loss.registry[cls.__name__.lower()] = cls

    @property
    def name(self) -> str:
        return type(self).__name__

    @property
    def unit(self) -> str:
        """What `normalizer` counts: "tokens" | "sequences" | "pairs"."""
        return UNITS[self.item]

    @property
    def reads(self) -> tuple[str, ...]:
        """Statistics that `items` takes from `batch.stat` besides logp: of "entropy", "lse", "average"."""
        return ()

    def plain(self) -> Loss:
        """The loss without its terms that read more than log-probs: what an evaluation reports."""
        if self.reads:
            raise NotImplementedError(f"{self.name} reads {self.reads}, so it must define plain().")
        return self

    def sparse(self, humanline: Humanline | None) -> bool:
        """Whether tokens may get a gradient of exactly 0: the planner then prefers plans that skip those."""
        return humanline is not None

    @property
    def needs_ref(self) -> bool:
        """Whether batch.ref_logp is read."""
        return self.anchor == "ref"

    def items(self, logp: Tensor, log_ratio: Tensor, batch: Batch) -> Tensor:
        """logp [n], log_ratio [n] (clipped, if Humanline is on), a live batch -> items [n] | [S] | [P]."""
        raise NotImplementedError(f"{self.name} must define items(logp, log_ratio, batch).")

    def weights(self, batch: Batch) -> Tensor:
        """What each item is multiplied by before the sum is divided by the count of `unit`, float64."""
        if self.item == "token":
            return _token_weight(batch)
        count = batch.sequences if self.item == "sequence" else batch.pairs
        return torch.ones(count, dtype=torch.float64, device=batch.target.device)

    def metrics(self, logp: Tensor, log_ratio: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Detached scalars under the trainers' usual names; called without grad on the whole live batch."""
        return {}


def _token_weight(batch: Batch) -> Tensor:  # -> [n]
    if batch.token_weight is not None:
        return batch.token_weight.double()  # 0 where the batch is padded, as every field
    if batch.valid is not None:
        return batch.valid.double()
    return torch.ones(batch.target.numel(), dtype=torch.float64, device=batch.target.device)


class Objective:
    """A loss bound to a batch: from log-probs of some of its live tokens to their part of the scalar loss."""

    def __init__(
        self,
        loss: Loss,
        batch: Batch,  # live
        humanline: Humanline | None,
        normalizer: float | Tensor | Mapping[str, float | Tensor] | None,
    ) -> None:
        if humanline is not None and loss.anchor is None:
            raise ValueError(
                f"align_loss: Humanline clips a log-ratio, and {loss.name} has none (its anchor is None). "
                "Drop humanline or use a loss with a reference."
            )
        if loss.anchor == "ref":
            batch.need("ref_logp", f"{loss.name} is measured against a reference model, so it")
        self.loss, self.batch, self.humanline = loss, batch, humanline
        self.weights = loss.weights(batch) / _divisor(loss, batch, normalizer)

    def log_ratio(self, logp: Tensor, batch: Batch) -> Tensor:
        """[n] log-ratio against the loss's anchor, before any clip."""
        if self.loss.anchor is None:
            return logp
        anchor = batch.ref_logp if self.loss.anchor == "ref" else batch.old_logp
        return logp - (logp.detach() if anchor is None else anchor.to(logp.dtype))

    def clipped(self, logp: Tensor, batch: Batch) -> Tensor:
        log_ratio = self.log_ratio(logp, batch)
        return log_ratio if self.humanline is None else self.humanline.clip(log_ratio)

    def total(self, stats: dict[str, Tensor], batch: Batch, weights: Tensor) -> Tensor:
        """Scalar part of the loss that these tokens (of whole items) contribute. Summed in float64.

        stats: logp, and what the loss `reads` besides, [n] each.
        """
        logp, batch = stats["logp"], batch.with_stats(stats)
        items = self.loss.items(logp, self.clipped(logp, batch), batch)
        if items.shape != weights.shape:
            raise ValueError(
                f"{self.loss.name}.items: item={self.loss.item!r} asks for {list(weights.shape)} items; got "
                f"{list(items.shape)}."
            )
        return (items.double() * weights).sum().to(logp.dtype)

    @torch.no_grad()
    def metrics(self, stats: dict[str, Tensor]) -> dict[str, Tensor]:
        stats = {name: stat.detach() for name, stat in stats.items()}
        logp, batch = stats["logp"], self.batch.with_stats(stats)
        found = self.loss.metrics(logp, self.clipped(logp, batch), batch)
        found["tokens/live"] = torch.ones_like(logp[:1]).sum() * batch.count("tokens")
        if self.humanline is not None:
            inside = self.humanline.inside(self.log_ratio(logp, batch))
            found["humanline/unclipped"] = batch.token_mean(inside.to(logp.dtype))
        if "entropy" in stats:
            found["entropy"] = batch.token_mean(stats["entropy"])
        return found


def _divisor(
    loss: Loss, batch: Batch, normalizer: float | Tensor | Mapping[str, float | Tensor] | None
) -> float | Tensor:
    if isinstance(normalizer, Mapping):
        if loss.unit not in normalizer:
            raise ValueError(
                f"align_loss: {loss.name} is normalised by {loss.unit}; normalizer has {sorted(normalizer)}."
            )
        normalizer = normalizer[loss.unit]
    if normalizer is None:
        count = batch.count(loss.unit)  # nothing to sum: the loss is 0, not 0/0
        return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)
    if isinstance(normalizer, Tensor):
        if normalizer.numel() != 1:
            raise ValueError(
                f"align_loss: normalizer must be one number, the count of {loss.unit} over the optimizer "
                f"step; got a tensor {list(normalizer.shape)}."
            )
        if normalizer.device.type != "cpu":  # reading it would stall the device
            return normalizer.detach().reshape(()).to(batch.target.device)
        normalizer = normalizer.item()
    if not normalizer > 0:
        raise ValueError(
            f"align_loss: normalizer must be positive, the count of {loss.unit}; got {normalizer}."
        )
    return normalizer
