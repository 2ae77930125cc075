"""What a loss is: pure functions of per-token log-probs. Nothing here knows how those were computed.

    logp [n] --minus anchor--> log_ratio [n] --Humanline--> log_ratio [n] --Loss.items--> items
    loss = dot(items, Loss.weights) / normalizer

The weights are fixed before the forward, so with a given normalizer the losses of micro-batches add up to the
loss of the whole batch, and any subset of whole items can be evaluated, and differentiated, on its own: that
is what lets the planner form gradients chunk by chunk while the exponentials are still at hand. (Losses with
item = "batch" compare all of a batch, and are exempt from both.)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..batch import Batch
from ..humanline import RatioClip
from .state import State

ITEMS = ("token", "sequence", "pair", "batch")  # each is made of some of those before it
UNITS = {"token": "tokens", "sequence": "sequences", "pair": "pairs"}
LEARNT = ("entropy", "lse", "average")  # statistics that can be differentiated
STATS = (*LEARNT, "squares")  # and those that `items` can read

Normalizer = float | Tensor | Mapping[str, float | Tensor] | None
Weights = tuple[Tensor, ...]  # of the items of each part of a loss


@dataclass(frozen=True)
class Loss:
    """Base of every loss. A subclass is a frozen dataclass with `item`, `anchor` and `items`.

    item: what one term of the sum couples: "token" | "sequence" | "pair" | "batch". Items must be computable
        on any subset of whole ones; with "batch" they get all of the batch, and no gradient is formed before
        its end. A class attribute, or a property where it depends on the fields.
    per: what one number that `items` returns stands for: "token" | "sequence" | "pair"; `item` unless given.
    anchor: what the log-ratio is measured against: "old" (the policy that sampled; batch.old_logp, or the
        detached log-prob itself where that is None), "ref" (batch.ref_logp), or None (log_ratio is logp).
    paper: arXiv number, or the place where it is defined.

    A subclass enters `Loss.registry` under its lower-case name; one that others share, class X(Loss,
    base=True), does not.
    """

    item: ClassVar[Any] = "token"
    per: ClassVar[str] = "token"
    anchor: ClassVar[Any] = None
    paper: ClassVar[str] = ""
    registry: ClassVar[dict[str, type[Loss]]] = {}

    def __init_subclass__(cls, base: bool = False, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        item_known = isinstance(cls.item, property) or cls.item in ITEMS
        if not item_known or not isinstance(cls.anchor, property) and cls.anchor not in ("old", "ref", None):
            raise TypeError(
                f'{cls.__name__}: item must be one of {list(ITEMS)} and anchor "old", "ref" or None; '
                f"got item={cls.item!r}, anchor={cls.anchor!r}."
            )
        own = cls.__dict__
        if "per" not in own and own.get("item") in UNITS:
            cls.per = own["item"]
        if own.get("item") == "batch" and "per" not in own and cls.per is Loss.per:
            raise TypeError(
                f'{cls.__name__}: a loss with item="batch" must say what one number of its items stands for: '
                'add per = "token", "sequence" or "pair".'
            )
        item = cls.per if isinstance(cls.item, property) else cls.item
        if cls.per not in UNITS or coarsest([item, cls.per]) != item:
            raise TypeError(
                f"{cls.__name__}: per must be one of {list(UNITS)}, and no more than an item, {cls.item!r}; "
                f"got {cls.per!r}."
            )
        if not base:
            Loss.registry[cls.__name__.lower()] = cls

    @property
    def name(self) -> str:
        return type(self).__name__

    @property
    def unit(self) -> str:
        """What `normalizer` counts: "tokens" | "sequences" | "pairs" | "groups"."""
        return UNITS[self.per]

    @property
    def reads(self) -> tuple[str, ...]:
        """Statistics that `items` takes from `batch.stat` besides logp.

        Of "entropy", "lse", "average" (the mean logit), "squares" (log sum_v p_v^2).
        """
        return ()

    @property
    def learnt(self) -> tuple[str, ...]:
        """Those of `reads` that the loss is differentiated by; the others come detached."""
        return tuple(name for name in self.reads if name in LEARNT)

    @property
    def parts(self) -> tuple[tuple[float, Loss], ...]:
        """(weight, loss) of the sums it consists of, each with items and a normalizer of its own."""
        return ((1.0, self),)

    @property
    def anchors(self) -> tuple[str, ...]:
        """The anchors of its parts, without None."""
        return tuple(dict.fromkeys(part.anchor for _, part in self.parts if part.anchor is not None))

    def plain(self) -> Loss:
        """The loss without terms that read more than log-probs, and without memory, for an evaluation."""
        if self.reads:
            raise NotImplementedError(f"{self.name} reads {self.reads}, so it must define plain().")
        return self

    def sparse(self, humanline: RatioClip | None) -> bool:
        """Whether tokens may get a gradient of exactly 0: the planner then prefers plans that skip those."""
        return humanline is not None

    @property
    def needs_ref(self) -> bool:
        """Whether batch.ref_logp is read."""
        return self.anchor == "ref"

    @property
    def rows(self) -> str:
        """Which rows the trainer reads for it: "pair" | "group" | "unpaired" | "judged" | "text"
        (train/data.py).

        What its items and its anchor suggest; a loss of another kind says so: rows = "group". "": none.
        """
        if "pair" in (self.item, self.per):
            return "pair"
        if self.anchor == "old":
            return "group"
        if self.anchor is None or self.per == "token":
            return "text"
        return "unpaired" if self.needs_kl else "judged"

    @property
    def needs_kl(self) -> bool:
        """Whether batch.kl is read, the reference point of `kto_kl`."""
        return False

    def items(self, logp: Tensor, log_ratio: Tensor, batch: Batch) -> Tensor:
        """logp [n], log_ratio [n] (clipped, if Humanline is on), a live batch -> items [n] | [S] | [P]."""
        raise NotImplementedError(f"{self.name} must define items(logp, log_ratio, batch).")

    def weights(self, batch: Batch) -> Tensor:
        """What each item is multiplied by before the sum is divided by the count of `unit`, float64."""
        if self.per == "token":
            return _token_weight(batch)
        count = batch.sequences if self.per == "sequence" else batch.pairs
        return torch.ones(count, dtype=torch.float64, device=batch.target.device)

    def count(self, batch: Batch) -> int | Tensor:
        """How many of `unit` a live batch has: what the sum is divided by without a normalizer."""
        return batch.count(self.unit)

    @property
    def counted(self) -> str:
        """What `count` counts, in words."""
        return f"all {self.unit}"

    def counts(self, batch: Batch) -> dict[str, int | Tensor]:
        """The count of each part's unit: summed over micro-batches and ranks, the `normalizer` of a step."""
        return {part.unit: part.count(batch) for _, part in self.parts}

    def metrics(self, logp: Tensor, log_ratio: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Detached scalars under the trainers' usual names; called without grad on the whole live batch."""
        return {}

    # ---- of losses that keep averages between optimizer steps ----

    def observe(self, log_ratio: Tensor, batch: Batch, count: float | Tensor) -> None:
        """Takes a batch into the averages; called once per align_loss under grad, after the loss is known.

        count: what the loss was divided by, so how many of `unit` the optimizer step has, over all ranks.
        """

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold besides the fields: {} for most losses."""
        state = getattr(self, "state", None)
        return state.state_dict() if isinstance(state, State) else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave. Raises ValueError if it belongs to another loss."""
        own = getattr(self, "state", None)
        if not isinstance(own, State) and state:
            raise ValueError(
                f"{self.name}.load_state_dict: this loss keeps no state; got {sorted(state)}. Is it that "
                "of another loss?"
            )
        if isinstance(own, State):
            own.load_state_dict(state)


def _token_weight(batch: Batch) -> Tensor:  # -> [n]
    if batch.token_weight is not None:
        return batch.token_weight.double()  # 0 where the batch is padded, as every field
    if batch.valid is not None:
        return batch.valid.double()
    return torch.ones(batch.target.numel(), dtype=torch.float64, device=batch.target.device)


def coarsest(items: Iterable[str]) -> str:
    """What is coupled where all of these are.

    >>> coarsest(["token", "pair", "sequence"])
    'pair'
    """
    items = list(items)
    if not set(items) <= {*ITEMS}:
        raise ValueError(f"item must be one of {list(ITEMS)}; got {items}.")
    return max(items, key=ITEMS.index)


class Some(NamedTuple):
    """Some whole items of a batch: their places among its live tokens, sequences and pairs."""

    tokens: slice | Tensor
    sequences: Tensor | None = None
    pairs: slice | None = None


@dataclass(frozen=True)
class _Part:
    loss: Loss
    weight: float  # of the loss in a Sum
    count: float | Tensor  # what its sum is divided by
    batch: Batch

    @cached_property
    def weights(self) -> Tensor:
        """Of its items, the loss's own weight and 1 / count included."""
        return self.weight * self.loss.weights(self.batch) / self.count


class Objective:
    """A loss bound to a batch: from log-probs of some of its live tokens to their part of the scalar loss."""

    def __init__(
        self,
        loss: Loss,
        batch: Batch,  # live
        humanline: RatioClip | None,
        normalizer: Normalizer,
    ) -> None:
        if humanline is not None and not loss.anchors:
            raise ValueError(
                f"align_loss: Humanline clips a log-ratio, and {loss.name} has none (its anchor is None). "
                "Drop humanline or use a loss with a reference."
            )
        for _, part in loss.parts:
            if part.anchor == "ref":
                batch.need("ref_logp", f"{part.name} is measured against a reference model, so it")
        unknown = [name for name in loss.reads if name not in STATS]
        if unknown or not set(loss.learnt) <= {*loss.reads} & {*LEARNT}:
            raise ValueError(
                f"align_loss: {loss.name}.reads must be some of {list(STATS)}, and learnt some of those but "
                f"squares; got {list(loss.reads)} and {list(loss.learnt)}."
            )
        self.loss, self.batch = loss, batch
        self.clip = None if humanline is None else humanline.bind(batch)
        self.parts: list[_Part] = []
        units = {part.unit for _, part in loss.parts}
        if len(units) > 1 and normalizer is not None and not isinstance(normalizer, Mapping):
            raise ValueError(
                f"align_loss: {loss.name} divides by {' and by '.join(sorted(units))}; pass a dict of both "
                f"as normalizer, got {normalizer!r}."
            )
        for weight, part in loss.parts:
            self.parts.append(_Part(part, weight, _divisor(part, batch, normalizer), batch))

    @property
    def weights(self) -> Weights:
        return tuple(part.weights for part in self.parts)

    def weights_of(self, some: Some) -> Weights:
        """Those of some whole items."""
        index: dict[str, Any] = {"token": some.tokens, "sequence": some.sequences, "pair": some.pairs}
        return tuple(part.weights[index[part.loss.per]] for part in self.parts)

    def log_ratio(self, anchor: str | None, logp: Tensor, batch: Batch) -> Tensor:
        """[n] log-ratio against an anchor, before any clip."""
        if anchor is None:
            return logp
        found = batch.ref_logp if anchor == "ref" else batch.old_logp
        return logp - (logp.detach() if found is None else found.to(logp.dtype))

    def _clipped(self, logp: Tensor, batch: Batch) -> dict[str | None, Tensor]:
        """The log-ratio as the losses get it, by anchor."""
        found = {anchor: self.log_ratio(anchor, logp, batch) for anchor in self.loss.anchors}
        if self.clip is not None:
            found = {anchor: self.clip.clip(log_ratio) for anchor, log_ratio in found.items()}
        return {None: logp, **found}

    def total(self, stats: Mapping[str, Tensor], batch: Batch, weights: Weights) -> Tensor:
        """Scalar part of the loss that these tokens (of whole items) contribute. Summed in float64.

        stats: logp, and what the loss `reads` besides, [n] each.
        """
        logp, learnt = stats["logp"], self.loss.learnt
        batch = batch.with_stats({name: x if name in learnt else x.detach() for name, x in stats.items()})
        ratios = self._clipped(logp, batch)
        total = torch.zeros((), dtype=torch.float64, device=logp.device)
        for part, weight in zip(self.parts, weights, strict=True):
            items = part.loss.items(logp, ratios[part.loss.anchor], batch)
            shape = getattr(items, "shape", None)
            if shape != weight.shape:
                raise ValueError(
                    f"{part.loss.name}.items: one number per {part.loss.per} is expected, "
                    f"{list(weight.shape)}; got {type(items).__name__ if shape is None else list(shape)}. "
                    "(`item` and `per` of the class say what a number stands for.)"
                )
            total = total + (items.double() * weight).sum()
        return total.to(logp.dtype)

    def evaluate(
        self, stats: Mapping[str, Tensor], total: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of the whole batch and its metrics, after which losses with averages move on.

        total: the loss, where it was summed up from parts already.
        """
        if total is None:
            total = self.total(stats, self.batch, self.weights)
        total, metrics = self.checked(total), self.metrics(stats)
        self.observe(stats)  # after the metrics: they are of what the loss was computed with
        return total, metrics

    def checked(self, total: Tensor) -> Tensor:
        """The loss; NaN where tokens beyond max_live were left out."""
        surplus = self.batch.surplus
        return total if surplus is None else torch.where(surplus, torch.nan, total)

    def observe(self, stats: Mapping[str, Tensor]) -> None:
        """Lets losses that keep averages take this batch into them, if gradients are recorded."""
        keeping = [part for part in self.parts if type(part.loss).observe is not Loss.observe]
        if not keeping or not torch.is_grad_enabled():
            return
        logp, surplus = stats["logp"].detach(), self.batch.surplus
        if surplus is not None:  # tokens beyond max_live were left out: the loss is NaN, and not remembered
            logp = torch.where(surplus, torch.nan, logp)
        with torch.no_grad():
            ratios = self._clipped(logp, self.batch)
            for part in keeping:
                part.loss.observe(ratios[part.loss.anchor], self.batch, part.count)

    @torch.no_grad()
    def metrics(self, stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        stats = {name: stat.detach() for name, stat in stats.items()}
        logp, batch = stats["logp"], self.batch.with_stats(dict(stats))
        ratios, found = self._clipped(logp, batch), {}
        for part in self.parts:
            found |= part.loss.metrics(logp, ratios[part.loss.anchor], batch)
        found["tokens/live"] = torch.ones_like(logp[:1]).sum() * batch.count("tokens")
        if self.clip is not None:
            inside = self.clip.inside(self.log_ratio(self.loss.anchors[0], logp, batch))
            found["humanline/unclipped"] = batch.token_mean(inside.to(logp.dtype))
        if "entropy" in stats:
            found["entropy"] = batch.token_mean(stats["entropy"])
        return found


def _divisor(loss: Loss, batch: Batch, normalizer: Normalizer) -> float | Tensor:
    if isinstance(normalizer, Mapping):
        if loss.unit not in normalizer:
            raise ValueError(
                f"align_loss: {loss.name} is normalised by {loss.unit}; normalizer has {sorted(normalizer)}."
            )
        normalizer = normalizer[loss.unit]
    if normalizer is None:
        count = loss.count(batch)  # nothing to sum: the loss is 0, not 0/0
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
