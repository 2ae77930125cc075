"""Weighted sums of losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..humanline import RatioClip
from .base import Loss, coarsest


@dataclass(frozen=True)
class Sum(Loss, base=True):
    """A weighted sum of losses, each with its anchor, its reduction and its own normalizer (a dict, by unit).

    What is coupled is what the coarsest part couples. Humanline clips the parts that have an anchor. Metrics
    are those of the parts; where two have one of the same name, the later one's.

    Raises:
        ValueError: no part, or two that count the same unit differently (all tokens, and the chosen ones').

    >>> import torch, fused_align as fa
    >>> loss = fa.Sum([(1.0, fa.DPO()), (0.5, fa.SFT(chosen=True))])
    >>> loss.item, loss.anchor, [(weight, part.unit) for weight, part in loss.parts]
    ('pair', 'ref', [(1.0, 'pairs'), (0.5, 'tokens')])
    """

    losses: Sequence[tuple[float, Loss]] = ()

    def __post_init__(self) -> None:
        losses = tuple((float(weight), loss) for weight, loss in self.losses)
        object.__setattr__(self, "losses", losses)
        if not losses:
            raise ValueError("Sum: losses must hold at least one (weight, loss); got none.")
        counted: dict[str, tuple[str, str]] = {}
        for _, loss in losses:
            for _, part in loss.parts:
                other, what = counted.setdefault(part.unit, (loss.name, part.counted))
                if what != part.counted:
                    raise ValueError(
                        f"Sum: {other} counts {what} and {loss.name} {part.counted}, under one name in "
                        f"`normalizer`, {part.unit!r}. Use SFT(chosen=True) with losses on pairs."
                    )

    @property
    def parts(self) -> tuple[tuple[float, Loss], ...]:
        return tuple((w * v, part) for w, loss in self.losses for v, part in loss.parts)

    @property
    def item(self) -> str:  # type: ignore[override]
        return coarsest(loss.item for _, loss in self.losses)

    @property
    def anchor(self) -> str | None:  # type: ignore[override]
        return next(iter(self.anchors), None)

    @property
    def unit(self) -> str:
        raise ValueError(f"{self} has a unit for each of its parts; see `parts`.")

    @property
    def reads(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for _, loss in self.losses for name in loss.reads))

    @property
    def learnt(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for _, loss in self.losses for name in loss.learnt))

    @property
    def needs_ref(self) -> bool:
        return any(loss.needs_ref for _, loss in self.losses)

    @property
    def needs_kl(self) -> bool:
        return any(loss.needs_kl for _, loss in self.losses)

    def sparse(self, humanline: RatioClip | None) -> bool:
        return all(loss.sparse(humanline) for _, loss in self.losses)

    def plain(self) -> Sum:
        return Sum([(weight, loss.plain()) for weight, loss in self.losses])

    def state_dict(self) -> dict[str, Any]:
        return {str(i): loss.state_dict() for i, (_, loss) in enumerate(self.losses) if loss.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if set(state) != set(self.state_dict()):
            raise ValueError(
                f"Sum.load_state_dict: expected the states of parts {sorted(self.state_dict())}; got "
                f"{sorted(state)}. Is it the state of another loss?"
            )
        before = self.state_dict()
        try:
            for place, saved in state.items():
                self.losses[int(place)][1].load_state_dict(saved)
        except ValueError:
            for place, own in before.items():
                self.losses[int(place)][1].load_state_dict(own)
            raise
