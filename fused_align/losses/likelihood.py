"""Losses on the log-prob itself: no reference, no ratio."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..batch import Batch
from .base import Loss


@dataclass(frozen=True)
class SFT(Loss):
    """Supervised fine-tuning: items = -log pi(y_t), completion-only through the batch's mask. Token mean.

    >>> import torch, fused_align as fa
    >>> batch = fa.Batch(torch.tensor([[3, 1]])).live()
    >>> fa.SFT().items(torch.tensor([-0.5, -2.0]), torch.tensor([-0.5, -2.0]), batch)
    tensor([0.5000, 2.0000])
    """

    def items(self, logp: Tensor, log_ratio: Tensor, batch: Batch) -> Tensor:
        return -logp
