"""Policy-gradient losses without PPO's clip: other ways to weigh tokens, or none, and GRAO."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..batch import Batch
from ..humanline import RatioClip
from .base import Loss
from .policy import PolicyLoss, finite_exp

SMALLEST = math.log(1e-8)  # of VESPO's log w


def either(condition: Tensor, this: float, other: float, like: Tensor) -> Tensor:
    """One number or the other, in the dtype of `like`: torch.where of two numbers would round to float32."""
    return torch.where(condition, like.new_full((), this), like.new_full((), other))


def gated(logp: Tensor, log_ratio: Tensor) -> Tensor:
    """logp, with a gradient only where the log-ratio has one: none for tokens that Humanline clips."""
    return logp.detach() + (log_ratio - log_ratio.detach())


@dataclass(frozen=True)
class CISPO(PolicyLoss):
    """Clipped importance-sampling weights: -sg[min(rho, eps_high)] A log pi. eps_high is the cap itself.

    The gradient flows through log pi, so Humanline's clip would not stop it by itself: a token outside its
    bounds gets none (docs/math.md). Source: MiniMax-M1, arXiv 2506.13585, equation 4.

    >>> import torch, fused_align as fa
    >>> batch = fa.Batch(torch.tensor([[1, 2]]), advantage=torch.tensor([1.0])).live()
    >>> fa.CISPO().items(torch.tensor([-2.0, -1.0]), torch.tensor([0.0, 3.0]), batch)
    tensor([2., 5.])
    """

    eps_high: float = 5.0
    aggregation: str = field(default="token_mean", kw_only=True)

    paper = "2506.13585"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("eps_high", self.eps_high > 0, "positive: the largest ratio")

    def surrogate(self, logp: Tensor, log_ratio: Tensor, advantage: Tensor, batch: Batch) -> Tensor:
        ratio = self.ratio(log_ratio, batch).clamp(max=self.eps_high).detach()
        return -ratio * advantage * gated(logp, log_ratio)

    def metrics(self, logp: Tensor, log_ratio: Tensor, batch: Batch) -> dict[str, Tensor]:
        capped = (log_ratio > math.log(self.eps_high)) & (batch.token_advantage(self.name) > 0)
        capped = batch.token_mean(capped.to(logp.dtype))
        return super().metrics(logp, log_ratio, batch) | {"cispo_clip_ratio": capped}


@dataclass(frozen=True)
class SAPO(PolicyLoss):
    """Soft adaptive policy optimisation: -(4/T) s(T (rho - 1)) A, T = t_pos where A > 0, else t_neg.

    A soft gate in place of the clip: the weight falls off on both sides of rho = 1. Source: arXiv 2511.20347,
    equations 5 and 6.

    >>> import torch, fused_align as fa
    >>> batch = fa.Batch(torch.tensor([[1], [2]]), advantage=torch.tensor([1.0, -1.0])).live()
    >>> fa.SAPO(t_neg=2.0).items(torch.zeros(2), torch.zeros(2), batch)
    tensor([-2.,  1.])
    """

    t_pos: float = 1.0
    t_neg: float = 1.05

    paper = "2511.20347"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("t_pos", self.t_pos > 0, "positive")
        self._check("t_neg", self.t_neg > 0, "positive")

    def surrogate(self, logp: Tensor, log_ratio: Tensor, advantage: Tensor, batch: Batch) -> Tensor:
        temper = either(advantage > 0, self.t_pos, self.t_neg, logp)
        return -4 / temper * torch.sigmoid(temper * (self.ratio(log_ratio, batch) - 1)) * advantage


@dataclass(frozen=True)
class GMPO(PolicyLoss):
    """Geometric-mean policy optimisation: -rho_s A, rho_s = exp(mean_t of the clipped l_t).

    The clip to [-eps, eps] is PPO's, one-sided by the sign of A, in log space. Source: arXiv 2507.20673,
    equation 4.

    >>> import torch, fused_align as fa
    >>> batch = fa.Batch(torch.tensor([[1, 2]]), advantage=torch.tensor([1.0])).live()
    >>> fa.GMPO().items(torch.zeros(2), torch.tensor([1.0, -0.4]), batch)
    tensor([-1., -1.])
    """

    eps: float = 0.4

    paper = "2507.20673"
    coupled = "sequence"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("eps", self.eps > 0, "positive: log-ratios are clipped to [-eps, eps]")

    def surrogate(self, logp: Tensor, log_ratio: Tensor, advantage: Tensor, batch: Batch) -> Tensor:
        low = log_ratio.clamp(min=-self.eps)
        clipped = torch.where(advantage > 0, log_ratio.clamp(max=self.eps), low)
        return -batch.spread(finite_exp(batch.mean(clipped))) * advantage

    def ratio(self, log_ratio: Tensor, batch: Batch) -> Tensor:
        return batch.spread(finite_exp(batch.mean(log_ratio)))

    def clips(self, log_ratio: Tensor, advantage: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        return (log_ratio < -self.eps) & (advantage <= 0), (log_ratio > self.eps) & (advantage > 0)


@dataclass(frozen=True)
class VESPO(PolicyLoss):
    """Variational sequence-level soft policy optimisation: -sg[phi(w)] A log pi, w the sequence's ratio,

        phi(w) = exp(lam + k log w - lam w),   log w = clamp(sum_t clamp(l_t, -20, 20), log 1e-8, 20)

    with (k_pos, lam_pos) where A >= 0, else (k_neg, lam_neg). A sampler correction goes into w. Humanline: as
    for `CISPO`. Source: arXiv 2602.10693, equation 20, with TRL's clamps.

    >>> import torch, fused_align as fa
    >>> batch = fa.Batch(torch.tensor([[1, 2]]), advantage=torch.tensor([1.0])).live()
    >>> fa.VESPO().items(torch.tensor([-2.0, -1.0]), torch.zeros(2), batch)
    tensor([2., 1.])
    """

    k_pos: float = 2.0
    lam_pos: float = 3.0
    k_neg: float = 3.0
    lam_neg: float = 2.0
    aggregation: str = field(default="token_mean", kw_only=True)

    paper = "2602.10693"
    coupled = "sequence"
    folds_sampler = True

    def surrogate(self, logp: Tensor, log_ratio: Tensor, advantage: Tensor, batch: Batch) -> Tensor:
        weight = self._phi(logp.detach(), log_ratio.detach(), advantage, batch)
        return -weight * advantage * gated(logp, log_ratio)

    def _phi(self, logp: Tensor, log_ratio: Tensor, advantage: Tensor, batch: Batch) -> Tensor:
        log_w = batch.spread(batch.sum(log_ratio.clamp(-20, 20)))
        if self.sampler_correction:
            correction = self.correction(logp, batch).clamp(SMALLEST, 20)
            if self.sampler_correction.startswith("token"):
                correction = batch.spread(batch.sum(correction))
            log_w = log_w + correction
        log_w = log_w.clamp(SMALLEST, 20)
        k = either(advantage >= 0, self.k_pos, self.k_neg, logp)
        lam = either(advantage >= 0, self.lam_pos, self.lam_neg, logp)
        return (lam + k * log_w - lam * log_w.exp()).exp()


@dataclass(frozen=True)
class REINFORCE(PolicyLoss):
    """The plain policy gradient: -A log pi(y), of samples of the policy itself. There is no ratio.

    Summed over a sequence, as log pi of the whole of it. Source: R. J. Williams, "Simple statistical
    gradient-following algorithms for connectionist reinforcement learning", 1992.

    >>> import torch, fused_align as fa
    >>> batch = fa.Batch(torch.tensor([[1, 2]]), advantage=torch.tensor([3.0])).live()
    >>> fa.REINFORCE().items(torch.tensor([-2.0, -1.0]), torch.tensor([-2.0, -1.0]), batch)
    tensor([6., 3.])
    """

    aggregation: str = field(default="seq_mean_token_sum", kw_only=True)

    paper = "Williams 1992"
    anchor = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("kl_correction", not self.kl_correction, "false: there is no ratio to correct with")

    def surrogate(self, logp: Tensor, log_ratio: Tensor, advantage: Tensor, batch: Batch) -> Tensor:
        return -advantage * logp


@dataclass(frozen=True)
class GRAO(Loss):
    """Group relative alignment optimisation: imitate, explore and transcend. Per prompt with samples o_i, a
    reference answer y and J = mean_t log pi, the negative of

        (1/G) sum_i (1 + lam) A_i J(o_i)  +  (beta A_y - lam mean_i A_i) J(y)

    batch.reference marks the y, batch.group the prompts, batch.advantage [S] the A. No ratio, no KL. The mean
    over prompts: normalizer counts "groups", and a group must not be split over batches. Where advantages are
    normalised over the samples alone mean_i A_i is 0; it lives when the group includes y (docs/math.md).
    Source: arXiv 2508.07750, equation 3.

    >>> import torch, fused_align as fa
    >>> batch = fa.Batch(torch.tensor([[1], [2], [3]]), group=torch.tensor([5, 5, 5]),
    ...                  advantage=torch.tensor([1.0, 0.0, 2.0]),
    ...                  reference=torch.tensor([False, False, True])).live()
    >>> fa.GRAO().weights(batch)  # (1 + .6) * 1 / 2, 0, .5 * 2 - .6 * .5
    tensor([0.8000, 0.0000, 0.7000], dtype=torch.float64)
    """

    beta: float = 0.5
    lam: float = 0.6

    paper = "2508.07750"
    rows = "group"  # type: ignore[assignment]

    @property
    def unit(self) -> str:
        return "groups"

    def sparse(self, humanline: RatioClip | None) -> bool:
        return True  # groups without spread

    def items(self, logp: Tensor, log_ratio: Tensor, batch: Batch) -> Tensor:
        return -logp

    def weights(self, batch: Batch) -> Tensor:
        advantage = batch.need("advantage", self.name).double()
        if batch.advantage_per_token:
            raise ValueError("GRAO: advantage must be [S], one per sequence; got one per token.")
        reference = batch.need("reference", self.name)
        samples = batch.group_sum((~reference).double())
        mean = batch.group_sum(torch.where(reference, 0.0, advantage)) / samples.clamp(min=1)
        of_sample = (1 + self.lam) * advantage / samples.clamp(min=1)
        weight = torch.where(reference, self.beta * advantage - self.lam * mean, of_sample)
        return super().weights(batch) * batch.spread(weight / batch.lengths.clamp(min=1))

    def metrics(self, logp: Tensor, log_ratio: Tensor, batch: Batch) -> dict[str, Tensor]:
        reference = batch.need("reference", self.name)
        summed = batch.sum(logp)
        return {
            "logps/reference": torch.where(reference, summed, 0.0).sum() / reference.sum(),
            "logps/samples": torch.where(reference, 0.0, summed).sum() / (~reference).sum(),
        }
