"""Losses on preferences: pairs (DPO, IPO) and single judged sequences (KTO).

Notation: L = sum over a sequence of the (clipped) token log-ratios against the reference, nats.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..batch import IGNORE_INDEX, Batch
from ..humanline import Humanline
from .base import Loss


@dataclass(frozen=True)
class PairLoss(Loss):
    """Base of the losses on pairs: metrics from the sequences' log-probs and rewards."""

    item = "pair"
    anchor = "ref"

    def rewards(self, log_ratio: Tensor, batch: Batch) -> Tensor:
        """[n] -> [S]: the implicit reward of each sequence, in the units the loss compares."""
        raise NotImplementedError(f"{self.name} must define rewards(log_ratio, batch).")

    def metrics(self, logp: Tensor, log_ratio: Tensor, batch: Batch) -> dict[str, Tensor]:
        summed, rewards = batch.sum(logp), self.rewards(log_ratio, batch)
        chosen, rejected = batch.chosen(rewards), batch.rejected(rewards)
        return {
            "logps/chosen": batch.chosen(summed).mean(),
            "logps/rejected": batch.rejected(summed).mean(),
            "rewards/chosen": chosen.mean(),
            "rewards/rejected": rejected.mean(),
            "rewards/accuracies": (chosen > rejected).float().mean(),
            "rewards/margins": (chosen - rejected).mean(),
        }


@dataclass(frozen=True)
class DPO(PairLoss):
    """Direct preference optimisation: -(1-e) log s(beta D) - e log s(-beta D), D = L_chosen - L_rejected.

    e = label_smoothing (conservative DPO). Source: arXiv 2305.18290, equation 7; cDPO, E. Mitchell 2023.

    >>> import torch, fused_align as fa
    >>> batch = fa.Batch(torch.tensor([[1, 2], [1, 3]]), ref_logp=torch.zeros(2, 2)).live()
    >>> fa.DPO(beta=0.1).items(torch.zeros(4), torch.tensor([1.0, 1.0, -1.0, 0.0]), batch)
    tensor([0.5544])
    """

    beta: float = 0.1
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(
                f"DPO: label_smoothing is the share of flipped labels, in [0, 0.5); got "
                f"{self.label_smoothing}."
            )

    def rewards(self, log_ratio: Tensor, batch: Batch) -> Tensor:
        return self.beta * batch.sum(log_ratio)

    def items(self, logp: Tensor, log_ratio: Tensor, batch: Batch) -> Tensor:
        rewards = self.rewards(log_ratio, batch)
        margin = batch.chosen(rewards) - batch.rejected(rewards)
        e = self.label_smoothing
        items = -(1 - e) * F.logsigmoid(margin)
        return items - e * F.logsigmoid(-margin) if e else items


@dataclass(frozen=True)
class IPO(PairLoss):
    """Identity preference optimisation: (L_w/n_w - L_l/n_l - 1/(2 tau))^2, n the live tokens of a side.

    normalize=False takes the sums L instead of means, as the paper writes it. Source: arXiv 2310.12036,
    equation 17; the mean per token is the reading of TRL and HALOs.

    >>> import torch, fused_align as fa
    >>> batch = fa.Batch(torch.tensor([[1, 2], [1, -100]]), ref_logp=torch.zeros(2, 2)).live()
    >>> fa.IPO(tau=0.5).items(torch.zeros(3), torch.tensor([1.0, 2.0, 0.5]), batch)
    tensor([0.])
    """

    tau: float = 0.1
    normalize: bool = True

    def __post_init__(self) -> None:
        if not self.tau > 0:
            raise ValueError(f"IPO: tau must be positive, the margin aimed at is 1/(2 tau); got {self.tau}.")

    def rewards(self, log_ratio: Tensor, batch: Batch) -> Tensor:
        return self.tau * (batch.mean(log_ratio) if self.normalize else batch.sum(log_ratio))

    def items(self, logp: Tensor, log_ratio: Tensor, batch: Batch) -> Tensor:
        compared = batch.mean(log_ratio) if self.normalize else batch.sum(log_ratio)
        return (batch.chosen(compared) - batch.rejected(compared) - 1 / (2 * self.tau)).square()


@dataclass(frozen=True)
class KTO(Loss):
    """Kahneman-Tversky optimisation on single judged sequences, with reference point z0 = batch.kl:

        desirable    w_D (1 - s(beta (L - z0)))
        undesirable  w_U (1 - s(beta (z0 - L)))

    z0 comes from `kto_kl` on mismatched prompts and completions. Source: arXiv 2402.01306, equation 8.

    >>> import torch, fused_align as fa
    >>> batch = fa.Batch(torch.tensor([[1], [2]]), ref_logp=torch.zeros(2, 1), kl=torch.tensor(0.0),
    ...                  desirable=torch.tensor([True, False])).live()
    >>> fa.KTO(beta=1.0).items(torch.zeros(2), torch.tensor([0.0, 2.0]), batch)
    tensor([0.5000, 0.8808])
    """

    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    item = "sequence"
    anchor = "ref"

    def items(self, logp: Tensor, log_ratio: Tensor, batch: Batch) -> Tensor:
        desirable = batch.need("desirable", "KTO")
        z0 = batch.need("kl", "KTO (its reference point z0, see fused_align.kto_kl)")
        distance = self.beta * (batch.sum(log_ratio) - z0.to(logp.dtype))
        # 1 - s(x) = s(-x), which keeps its digits when x is large
        return torch.where(
            desirable,
            self.desirable_weight * torch.sigmoid(-distance),
            self.undesirable_weight * torch.sigmoid(distance),
        )

    def metrics(self, logp: Tensor, log_ratio: Tensor, batch: Batch) -> dict[str, Tensor]:
        desirable = batch.need("desirable", "KTO")
        summed, rewards = batch.sum(logp), self.beta * batch.sum(log_ratio)

        def mean(x: Tensor, of: Tensor) -> Tensor:  # NaN where no sequence is of this kind
            return torch.where(of, x, 0.0).sum() / of.sum()

        return {
            "logps/chosen": mean(summed, desirable),
            "logps/rejected": mean(summed, ~desirable),
            "rewards/chosen": mean(rewards, desirable),
            "rewards/rejected": mean(rewards, ~desirable),
            "kl": batch.need("kl", "KTO").to(logp.dtype),
        }


@torch.no_grad()
def kto_kl(
    policy_logp: Tensor,  # [B, T]
    ref_logp: Tensor,  # [B, T]
    target: Tensor,  # [B, T] int64
    *,
    humanline: Humanline | None = None,
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
    if humanline is not None:
        log_ratio = humanline.clip(log_ratio)
    sums = torch.where(live, log_ratio, 0.0).double().sum()
    both = torch.stack([sums, live.any(1).sum().double()])
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(both)
    return (both[0] / both[1].clamp(min=1)).clamp(min=0).to(policy_logp.dtype)
