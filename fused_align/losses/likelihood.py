"""Losses on the log-prob itself: no reference, no ratio."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..batch import Batch
from ..humanline import RatioClip
from .base import Loss


@dataclass(frozen=True)
class SFT(Loss):
    """Supervised fine-tuning: -log pi(y_t), completion-only through the batch's mask. Token mean.

    chosen=True: of the chosen answers of pairs only, the first half of the sequences, and over their tokens:
    the NLL term of CPO, ORPO, or RPO (`Sum([(1.0, DPO()), (1.0, SFT(chosen=True))])`).

        -(1-e) log pi(y_t) - e mean_v log pi(v) + z_loss lse^2

    e = label_smoothing, as torch's cross_entropy has it (Szegedy et al., arXiv 1512.00567, section 7); z_loss
    keeps the normaliser near 1 (PaLM, arXiv 2204.02311, section 5).

    >>> import torch, fused_align as fa
    >>> batch = fa.Batch(torch.tensor([[3, 1]])).live()
    >>> fa.SFT().items(torch.tensor([-0.5, -2.0]), torch.tensor([-0.5, -2.0]), batch)
    tensor([0.5000, 2.0000])
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    chosen: bool = False

    paper = "2203.02155"

    @property
    def rows(self) -> str:
        return "pair" if self.chosen else "text"

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(
                f"SFT: label_smoothing is the mass spread over the vocabulary, in [0, 1); got "
                f"{self.label_smoothing}."
            )

    @property
    def reads(self) -> tuple[str, ...]:
        smooth = ("average", "lse") if self.label_smoothing else ()
        return smooth or (("lse",) if self.z_loss else ())

    def plain(self) -> SFT:
        return SFT(chosen=self.chosen)

    @property
    def counted(self) -> str:
        return "the tokens of chosen answers" if self.chosen else super().counted

    def count(self, batch: Batch) -> int | Tensor:
        return batch.chosen(batch.lengths).sum() if self.chosen else super().count(batch)

    def sparse(self, humanline: RatioClip | None) -> bool:
        return self.chosen

    def weights(self, batch: Batch) -> Tensor:
        weights = super().weights(batch)
        return torch.where(batch.sequence < batch.pairs, weights, 0.0) if self.chosen else weights

    def metrics(self, logp: Tensor, log_ratio: Tensor, batch: Batch) -> dict[str, Tensor]:
        if not self.chosen:
            return {}
        return {"nll": -torch.where(batch.sequence < batch.pairs, logp, 0.0).sum() / self.count(batch)}

    def items(self, logp: Tensor, log_ratio: Tensor, batch: Batch) -> Tensor:
        items = -logp
        if self.label_smoothing:  # mean_v log pi(v) = mean_v z_v - lse
            others = batch.stat("average", "SFT") - batch.stat("lse", "SFT")
            items = (1 - self.label_smoothing) * items - self.label_smoothing * others
        if self.z_loss:
            items = items + self.z_loss * batch.stat("lse", "SFT").square()
        return items
