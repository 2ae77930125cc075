"""Losses on single sequences, each judged desirable or not (batch.desirable).

Notation: L = sum over a sequence of the (clipped) token log-ratios against the reference, nats; s() the
logistic function.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..batch import IGNORE_INDEX, Batch
from ..humanline import Humanline, RatioClip
from .base import Loss
from .state import State, all_reduced, zeros


@dataclass(frozen=True)
class UnpairedLoss(Loss, base=True):
    """Base of the losses on judged sequences: one defines `judged` on the rewards beta L."""

    beta: float = 0.1

    item = "sequence"
    anchor = "ref"

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ValueError(f"{self.name}: beta must be positive; got {self.beta}.")

    def judged(self, reward: Tensor, desirable: Tensor, batch: Batch) -> Tensor:
        """Rewards [S] and judgements [S] -> items [S]."""
        raise NotImplementedError(f"{self.name} must define judged(reward, desirable, batch).")

    def items(self, logp: Tensor, log_ratio: Tensor, batch: Batch) -> Tensor:
        return self.judged(self.beta * batch.sum(log_ratio), batch.need("desirable", self.name), batch)

    def metrics(self, logp: Tensor, log_ratio: Tensor, batch: Batch) -> dict[str, Tensor]:
        desirable = batch.need("desirable", self.name)
        summed, rewards = batch.sum(logp), self.beta * batch.sum(log_ratio)

        def mean(x: Tensor, of: Tensor) -> Tensor:  # NaN where no sequence is of this kind
            return torch.where(of, x, 0.0).sum() / of.sum()

        return {
            "logps/chosen": mean(summed, desirable),
            "logps/rejected": mean(summed, ~desirable),
            "rewards/chosen": mean(rewards, desirable),
            "rewards/rejected": mean(rewards, ~desirable),
        }


@dataclass(frozen=True)
class KTO(UnpairedLoss):
    """Kahneman-Tversky optimisation: single judged sequences against a reference point z0 = batch.kl,

        desirable    w_D (1 - s(beta (L - z0)))
        undesirable  w_U (1 - s(beta (z0 - L)))

    z0 comes from `kto_kl` on mismatched prompts and completions. Source: arXiv 2402.01306, equation 8.

    >>> import torch, fused_align as fa
    >>> batch = fa.Batch(torch.tensor([[1], [2]]), ref_logp=torch.zeros(2, 1), kl=torch.tensor(0.0),
    ...                  desirable=torch.tensor([True, False])).live()
    >>> fa.KTO(beta=1.0).items(torch.zeros(2), torch.tensor([0.0, 2.0]), batch)
    tensor([0.5000, 0.8808])
    """

    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    paper = "2402.01306"

    @property
    def needs_kl(self) -> bool:
        return True

    def judged(self, reward: Tensor, desirable: Tensor, batch: Batch) -> Tensor:
        z0 = batch.need("kl", "KTO (its reference point z0, see fused_align.kto_kl)").to(reward.dtype)
        distance = reward - self.beta * z0
        # 1 - s(x) = s(-x), which keeps its digits when x is large
        return torch.where(
            desirable,
            self.desirable_weight * torch.sigmoid(-distance),
            self.undesirable_weight * torch.sigmoid(distance),
        )

    def metrics(self, logp: Tensor, log_ratio: Tensor, batch: Batch) -> dict[str, Tensor]:
        return super().metrics(logp, log_ratio, batch) | {"kl": batch.need("kl", "KTO").to(logp.dtype)}


@dataclass(frozen=True)
class APOZeroUnpaired(UnpairedLoss):
    """Anchored preference optimisation, unpaired: 1 - s(beta L) desirable, s(beta L) undesirable.

    Source: arXiv 2408.06266, equation 7, each side by itself.

    >>> import torch, fused_align as fa
    >>> batch = fa.Batch(torch.tensor([[1], [2]]), ref_logp=torch.zeros(2, 1),
    ...                  desirable=torch.tensor([True, False])).live()
    >>> fa.APOZeroUnpaired(beta=1.0).items(torch.zeros(2), torch.tensor([2.0, 2.0]), batch)
    tensor([0.1192, 0.8808])
    """

    paper = "2408.06266"

    def judged(self, reward: Tensor, desirable: Tensor, batch: Batch) -> Tensor:
        return torch.sigmoid(torch.where(desirable, -reward, reward))


@dataclass(frozen=True)
class BCO(UnpairedLoss):
    """Binary classifier optimisation: -log s(r) desirable, -log s(-r) undesirable, r = beta L - delta.

    delta is the mean of beta L over all sequences seen in training, this batch and all ranks included,
    without gradient: state of the loss, for the checkpoint (`state_dict`). Source: arXiv 2404.04656; the
    paper's delta is the mean of the two kinds' means, TRL's and this one the mean over all.

    >>> import torch, fused_align as fa
    >>> batch = fa.Batch(torch.tensor([[1], [2]]), ref_logp=torch.zeros(2, 1),
    ...                  desirable=torch.tensor([True, False])).live()
    >>> fa.BCO(beta=1.0).items(torch.zeros(2), torch.tensor([3.0, 1.0]), batch)  # delta 2: -log s(1)
    tensor([0.3133, 0.3133])
    """

    beta: float = 0.01
    #: sum of beta L, and of how many sequences
    state: State = field(default_factory=lambda: State(zeros(2)), init=False, compare=False, repr=False)

    paper = "2404.04656"
    item = "batch"
    per = "sequence"

    def plain(self) -> BCO:
        return replace(self)  # without memory: delta of what is evaluated

    def judged(self, reward: Tensor, desirable: Tensor, batch: Batch) -> Tensor:
        total, count = self.state.at(reward.device).total + self._sums(reward)
        away = reward - (total / count.clamp(min=1)).to(reward.dtype)
        return -F.logsigmoid(torch.where(desirable, away, -away))

    @staticmethod
    def _sums(reward: Tensor) -> Tensor:  # [S] -> [2]
        reward = reward.detach().double()
        return all_reduced(torch.stack([reward.sum(), torch.ones_like(reward).sum()]))

    def observe(self, log_ratio: Tensor, batch: Batch, count: float | Tensor) -> None:
        state = self.state.at(log_ratio.device)
        sums = self._sums(self.beta * batch.sum(log_ratio))
        state.total = torch.where(sums.isfinite().all(), state.total + sums, state.total)  # else it diverged

    def metrics(self, logp: Tensor, log_ratio: Tensor, batch: Batch) -> dict[str, Tensor]:
        total, count = self.state.at(logp.device).total + self._sums(self.beta * batch.sum(log_ratio))
        return super().metrics(logp, log_ratio, batch) | {
            "delta": (total / count.clamp(min=1)).to(logp.dtype)
        }


@torch.no_grad()
def kto_kl(
    policy_logp: Tensor,  # [B, T]
    ref_logp: Tensor,  # [B, T]
    target: Tensor,  # [B, T] int64
    *,
    humanline: RatioClip | None = None,
) -> Tensor:
    """KTO's reference point z0 = max(0, mean of L over the mismatched pairs (x_i, y_{i+1})), nats, scalar.

    Takes the log-probs of the mismatched completions under the policy and the reference; L is clipped token
    by token if `humanline` is given; sequences without live tokens do not count. Detached. Averaged over all
    ranks when torch.distributed is initialised. Source: arXiv 2402.01306, section 4.1.

    Raises:
        ValueError: the shapes differ or are not [B, T].
    """
    if target.dim() != 2 or policy_logp.shape != target.shape or ref_logp.shape != target.shape:
        raise ValueError(
            "kto_kl: policy_logp, ref_logp and target must all be [B, T]; got "
            f"{list(policy_logp.shape)}, {list(ref_logp.shape)} and {list(target.shape)}."
        )
    live = target != IGNORE_INDEX
    log_ratio = policy_logp - ref_logp.to(policy_logp.dtype)
    if isinstance(humanline, Humanline):  # HumanlineSampling keeps values
        log_ratio = humanline.clip(log_ratio)
    sums = torch.where(live, log_ratio, 0.0).double().sum()
    both = all_reduced(torch.stack([sums, live.any(1).sum().double()]))
    return (both[0] / both[1].clamp(min=1)).clamp(min=0).to(policy_logp.dtype)
