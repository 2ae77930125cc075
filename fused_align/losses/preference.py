"""Losses on pairs: a chosen and a rejected answer to the same prompt.

Notation: L = sum over a sequence of the (clipped) token log-ratios against the reference, nats; n its live
tokens; w and l the chosen and the rejected side; D = L_w - L_l; s() the logistic function.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..batch import Batch
from .base import Loss
from .likelihood import SFT
from .policy import finite_expm1


@dataclass(frozen=True)
class PairLoss(Loss, base=True):
    """Base of the losses on pairs. One defines `pair` on the scores of both sides, and maybe `score`.

    Metrics: log-probs of the sequences; rewards, that is beta times the scores, and how they compare.
    """

    item = "pair"
    anchor = "ref"
    scale: ClassVar[str] = "beta"  # the field that the scores are multiplied by

    def __post_init__(self) -> None:
        if not getattr(self, self.scale) > 0:
            raise ValueError(f"{self.name}: {self.scale} must be positive; got {getattr(self, self.scale)}.")

    def score(self, log_ratio: Tensor, batch: Batch) -> Tensor:  # [n] -> [S]
        """What is compared of each sequence: L."""
        return batch.sum(log_ratio)

    def pair(self, chosen: Tensor, rejected: Tensor, batch: Batch) -> Tensor:
        """Scores of the chosen and the rejected side [P] -> items [P]."""
        raise NotImplementedError(f"{self.name} must define pair(chosen, rejected, batch).")

    def items(self, logp: Tensor, log_ratio: Tensor, batch: Batch) -> Tensor:
        score = self.score(log_ratio, batch)
        return self.pair(batch.chosen(score), batch.rejected(score), batch)

    def metrics(self, logp: Tensor, log_ratio: Tensor, batch: Batch) -> dict[str, Tensor]:
        summed, rewards = batch.sum(logp), getattr(self, self.scale) * self.score(log_ratio, batch)
        chosen, rejected = batch.chosen(rewards), batch.rejected(rewards)
        return {
            "logps/chosen": batch.chosen(summed).mean(),
            "logps/rejected": batch.rejected(summed).mean(),
            "rewards/chosen": chosen.mean(),
            "rewards/rejected": rejected.mean(),
            "rewards/accuracies": (chosen > rejected).float().mean(),
            "rewards/margins": (chosen - rejected).mean(),
        }


def smoothed(margin: Tensor, flipped: float) -> Tensor:
    """-(1-e) log s(margin) - e log s(-margin): the label is wrong with probability e."""
    items = -(1 - flipped) * F.logsigmoid(margin)
    return items - flipped * F.logsigmoid(-margin) if flipped else items


def check_flipped(name: str, share: float) -> None:
    if not 0 <= share < 0.5:
        raise ValueError(f"{name}: label_smoothing is the share of flipped labels, in [0, 0.5); got {share}.")


@dataclass(frozen=True)
class DPO(PairLoss):
    """Direct preference optimisation: -(1-e) log s(beta D) - e log s(-beta D), e = label_smoothing (cDPO).

    robust: ( -(1-e) log s(beta D) + e log s(-beta D) ) / (1-2e), unbiased under flipped labels.
    f_divergence: D = g(L_w) - g(L_l), g(L) = L "reverse_kl", 1 - e^-L "forward_kl", log 2 + log s(L) "js",
        (e^((a-1)L) - 1) / (a-1) "alpha", a = f_alpha.
    ld_alpha: L counts tokens beyond the shorter side's length by this factor (length-desensitised).
    wpo: times w_w w_l, w = exp(mean_t(log pi(y_t) - log sum_v pi(v)^2)), without gradient.

    Sources: arXiv 2305.18290 equation 7; cDPO, E. Mitchell 2023; robust 2403.00409; f-divergences 2309.16240;
    ld_alpha 2409.06411; wpo 2406.11827.

    >>> import torch, fused_align as fa
    >>> batch = fa.Batch(torch.tensor([[1, 2], [1, 3]]), ref_logp=torch.zeros(2, 2)).live()
    >>> fa.DPO(beta=0.1).items(torch.zeros(4), torch.tensor([1.0, 1.0, -1.0, 0.0]), batch)
    tensor([0.5544])
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    robust: bool = False
    f_divergence: str = "reverse_kl"
    f_alpha: float = 0.5
    ld_alpha: float = 1.0
    wpo: bool = False

    paper = "2305.18290"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flipped(self.name, self.label_smoothing)
        if self.f_divergence not in ("reverse_kl", "forward_kl", "js", "alpha"):
            raise ValueError(
                'DPO: f_divergence must be "reverse_kl", "forward_kl", "js" or "alpha"; got '
                f"{self.f_divergence!r}."
            )
        if not 0 <= self.ld_alpha <= 1:
            raise ValueError(f"DPO: ld_alpha must be in [0, 1]; got {self.ld_alpha}.")

    @property
    def reads(self) -> tuple[str, ...]:
        return ("squares",) if self.wpo else ()

    def plain(self) -> DPO:
        return replace(self, wpo=False)

    def score(self, log_ratio: Tensor, batch: Batch) -> Tensor:
        if self.ld_alpha != 1:
            lengths = batch.lengths
            shorter = torch.minimum(batch.chosen(lengths), batch.rejected(lengths)).repeat(2)
            beyond = batch.position >= batch.spread(shorter)
            log_ratio = torch.where(beyond, self.ld_alpha * log_ratio, log_ratio)
        total = batch.sum(log_ratio)
        if self.f_divergence == "forward_kl":
            return -finite_expm1(-total)
        if self.f_divergence == "js":
            return math.log(2) + F.logsigmoid(total)
        if self.f_divergence == "alpha" and self.f_alpha != 1:
            power = self.f_alpha - 1
            return finite_expm1(power * total) / power
        return total

    def pair(self, chosen: Tensor, rejected: Tensor, batch: Batch) -> Tensor:
        margin, e = self.beta * (chosen - rejected), self.label_smoothing
        if self.robust:
            return (e * F.logsigmoid(-margin) - (1 - e) * F.logsigmoid(margin)) / (1 - 2 * e)
        return smoothed(margin, e)

    def items(self, logp: Tensor, log_ratio: Tensor, batch: Batch) -> Tensor:
        items = super().items(logp, log_ratio, batch)
        if not self.wpo:
            return items
        weight = batch.mean(logp.detach() - batch.stat("squares", self.name)).exp()
        return items * batch.chosen(weight) * batch.rejected(weight)


@dataclass(frozen=True)
class IPO(PairLoss):
    """Identity preference optimisation: (L_w/n_w - L_l/n_l - 1/(2 tau))^2.

    normalize=False takes the sums L instead of means, as the paper writes it. Source: arXiv 2310.12036,
    equation 17; the mean per token is the reading of TRL and HALOs.

    >>> import torch, fused_align as fa
    >>> batch = fa.Batch(torch.tensor([[1, 2], [1, -100]]), ref_logp=torch.zeros(2, 2)).live()
    >>> fa.IPO(tau=0.5).items(torch.zeros(3), torch.tensor([1.0, 2.0, 0.5]), batch)
    tensor([0.])
    """

    tau: float = 0.1
    normalize: bool = True

    paper = "2310.12036"
    scale = "tau"

    def score(self, log_ratio: Tensor, batch: Batch) -> Tensor:
        return batch.mean(log_ratio) if self.normalize else batch.sum(log_ratio)

    def pair(self, chosen: Tensor, rejected: Tensor, batch: Batch) -> Tensor:
        return (chosen - rejected - 1 / (2 * self.tau)).square()


@dataclass(frozen=True)
class Hinge(PairLoss):
    """Hinge loss: relu(1 - beta D). Sources: SLiC arXiv 2305.10425; RSO 2309.06657.

    >>> import torch, fused_align as fa
    >>> batch = fa.Batch(torch.tensor([[1], [2]]), ref_logp=torch.zeros(2, 1)).live()
    >>> fa.Hinge(beta=0.5).items(torch.zeros(2), torch.tensor([1.0, 0.0]), batch)
    tensor([0.5000])
    """

    beta: float = 0.1

    paper = "2305.10425"

    def pair(self, chosen: Tensor, rejected: Tensor, batch: Batch) -> Tensor:
        return (1 - self.beta * (chosen - rejected)).relu()


@dataclass(frozen=True)
class SigmoidNorm(PairLoss):
    """DPO on means per token: -log s(beta (L_w/n_w - L_l/n_l)). Source: Tulu 3, arXiv 2411.15124, eq. 6.

    >>> import torch, fused_align as fa
    >>> batch = fa.Batch(torch.tensor([[1, 2], [1, -100]]), ref_logp=torch.zeros(2, 2)).live()
    >>> fa.SigmoidNorm(beta=1.0).items(torch.zeros(3), torch.tensor([1.0, 3.0, 2.0]), batch)
    tensor([0.6931])
    """

    beta: float = 0.1

    paper = "2411.15124"

    def score(self, log_ratio: Tensor, batch: Batch) -> Tensor:
        return batch.mean(log_ratio)

    def pair(self, chosen: Tensor, rejected: Tensor, batch: Batch) -> Tensor:
        return -F.logsigmoid(self.beta * (chosen - rejected))


@dataclass(frozen=True)
class EXO(PairLoss):
    """Efficient exact optimisation: KL of q = (s(beta D), s(-beta D)) from (1-eps, eps).

        q (log q - log(1-eps)) + (1-q) (log(1-q) - log eps)

    Source: arXiv 2402.00856, equation 16.

    >>> import torch, fused_align as fa
    >>> batch = fa.Batch(torch.tensor([[1], [2]]), ref_logp=torch.zeros(2, 1)).live()
    >>> fa.EXO(eps=0.5).items(torch.zeros(2), torch.tensor([1.0, 1.0]), batch)
    tensor([0.])
    """

    beta: float = 0.1
    eps: float = 1e-3

    paper = "2402.00856"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.eps < 1:
            raise ValueError(f"EXO: eps is the share of flipped labels, in (0, 1); got {self.eps}.")

    def pair(self, chosen: Tensor, rejected: Tensor, batch: Batch) -> Tensor:
        margin = self.beta * (chosen - rejected)
        right = torch.sigmoid(margin) * (F.logsigmoid(margin) - math.log1p(-self.eps))
        return right + torch.sigmoid(-margin) * (F.logsigmoid(-margin) - math.log(self.eps))


@dataclass(frozen=True)
class NCA(PairLoss):
    """Noise contrastive alignment: -log s(beta L_w) - log s(-beta L_w)/2 - log s(-beta L_l)/2.

    Keeps the chosen answer's likelihood from falling. Source: arXiv 2402.05369, table 1.

    >>> import torch, fused_align as fa
    >>> batch = fa.Batch(torch.tensor([[1], [2]]), ref_logp=torch.zeros(2, 1)).live()
    >>> fa.NCA().items(torch.zeros(2), torch.zeros(2), batch)  # 2 log 2
    tensor([1.3863])
    """

    beta: float = 0.01

    paper = "2402.05369"

    def pair(self, chosen: Tensor, rejected: Tensor, batch: Batch) -> Tensor:
        chosen, rejected = self.beta * chosen, self.beta * rejected
        return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


@dataclass(frozen=True)
class BCOPair(PairLoss):
    """Binary classifier on pairs: -log s(beta L_w) - log s(-beta L_l). Source: arXiv 2404.04656 (delta 0).

    >>> import torch, fused_align as fa
    >>> batch = fa.Batch(torch.tensor([[1], [2]]), ref_logp=torch.zeros(2, 1)).live()
    >>> fa.BCOPair(beta=1.0).items(torch.zeros(2), torch.tensor([2.0, -2.0]), batch)
    tensor([0.2539])
    """

    beta: float = 0.01

    paper = "2404.04656"

    def pair(self, chosen: Tensor, rejected: Tensor, batch: Batch) -> Tensor:
        return -F.logsigmoid(self.beta * chosen) - F.logsigmoid(-self.beta * rejected)


@dataclass(frozen=True)
class SPPOHard(PairLoss):
    """Self-play preference optimisation, hard labels: (L_w - 1/(2 beta))^2 + (L_l + 1/(2 beta))^2.

    Source: arXiv 2405.00675, equation 4.7 with probabilities 1 and 0.

    >>> import torch, fused_align as fa
    >>> batch = fa.Batch(torch.tensor([[1], [2]]), ref_logp=torch.zeros(2, 1)).live()
    >>> fa.SPPOHard(beta=0.5).items(torch.zeros(2), torch.tensor([3.0, -1.0]), batch)
    tensor([4.])
    """

    beta: float = 0.001

    paper = "2405.00675"

    def pair(self, chosen: Tensor, rejected: Tensor, batch: Batch) -> Tensor:
        aim = 1 / (2 * self.beta)
        return (chosen - aim).square() + (rejected + aim).square()


@dataclass(frozen=True)
class APOZero(PairLoss):
    """Anchored preference optimisation: 1 - s(beta L_w) + s(beta L_l): up the chosen, down the rejected.

    For chosen answers better than what the model writes. Source: arXiv 2408.06266, equation 7.

    >>> import torch, fused_align as fa
    >>> batch = fa.Batch(torch.tensor([[1], [2]]), ref_logp=torch.zeros(2, 1)).live()
    >>> fa.APOZero(beta=1.0).items(torch.zeros(2), torch.tensor([2.0, 0.0]), batch)
    tensor([0.6192])
    """

    beta: float = 0.1

    paper = "2408.06266"

    def pair(self, chosen: Tensor, rejected: Tensor, batch: Batch) -> Tensor:
        return torch.sigmoid(-self.beta * chosen) + torch.sigmoid(self.beta * rejected)


@dataclass(frozen=True)
class APODown(PairLoss):
    """Anchored preference optimisation: s(beta L_w) + 1 - s(beta D): down both, the rejected more.

    For chosen answers worse than what the model writes. Source: arXiv 2408.06266, equation 8.

    >>> import torch, fused_align as fa
    >>> batch = fa.Batch(torch.tensor([[1], [2]]), ref_logp=torch.zeros(2, 1)).live()
    >>> fa.APODown(beta=1.0).items(torch.zeros(2), torch.tensor([0.0, -2.0]), batch)
    tensor([0.6192])
    """

    beta: float = 0.1

    paper = "2408.06266"

    def pair(self, chosen: Tensor, rejected: Tensor, batch: Batch) -> Tensor:
        return torch.sigmoid(self.beta * chosen) + torch.sigmoid(-self.beta * (chosen - rejected))


@dataclass(frozen=True)
class DiscoPOP(PairLoss):
    """Discovered preference optimisation: (1-m) (-log s(u)) + m e^-u, u = beta D, m = s(u / tau).

    Source: arXiv 2406.08414, equation 5.

    >>> import torch, fused_align as fa
    >>> batch = fa.Batch(torch.tensor([[1], [2]]), ref_logp=torch.zeros(2, 1)).live()
    >>> fa.DiscoPOP().items(torch.zeros(2), torch.zeros(2), batch)  # (log 2 + 1) / 2
    tensor([0.8466])
    """

    beta: float = 0.05
    tau: float = 0.05

    paper = "2406.08414"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.tau < 1:
            raise ValueError(f"DiscoPOP: tau must be in (0, 1); got {self.tau}.")

    def pair(self, chosen: Tensor, rejected: Tensor, batch: Batch) -> Tensor:
        u = self.beta * (chosen - rejected)
        # m e^-u as one exponential: for u << 0 it is 0, where e^-u alone has no float32
        blended = (F.logsigmoid(u / self.tau) - u).exp()
        return blended - torch.sigmoid(-u / self.tau) * F.logsigmoid(u)


@dataclass(frozen=True)
class DPOP(PairLoss):
    """DPO-positive: -log s(beta (D - lam max(0, -L_w))): the chosen answer must not become less likely.

    Source: arXiv 2402.13228, equation 3.

    >>> import torch, fused_align as fa
    >>> batch = fa.Batch(torch.tensor([[1], [2]]), ref_logp=torch.zeros(2, 1)).live()
    >>> fa.DPOP(beta=1.0, lam=2.0).items(torch.zeros(2), torch.tensor([-1.0, -3.0]), batch)
    tensor([0.6931])
    """

    beta: float = 0.1
    lam: float = 50.0

    paper = "2402.13228"

    def pair(self, chosen: Tensor, rejected: Tensor, batch: Batch) -> Tensor:
        return -F.logsigmoid(self.beta * (chosen - rejected - self.lam * (-chosen).relu()))


@dataclass(frozen=True)
class MADPO(PairLoss):
    """Margin-adaptive DPO: -w(h) log s(beta D), h = batch.margin, the pair's margin by a reward model.

        w(h) = s(c(|h|) h) / s(h) for h > -tau, else 1
        c(z) = c_min + (c_max - c_min) / (1 + (c_max-1)/(1-c_min) e^(lam (z - tau))),   c_min = 1 / c_max

    Sharpens small margins (c_max), flattens large ones (c_min); c(tau) = 1. Source: arXiv 2510.05342.

    >>> import torch, fused_align as fa
    >>> batch = fa.Batch(torch.tensor([[1], [2]]), ref_logp=torch.zeros(2, 1), margin=torch.tensor([-9.0]))
    >>> batch = batch.live()
    >>> fa.MADPO().items(torch.zeros(2), torch.zeros(2), batch)
    tensor([0.6931])
    """

    beta: float = 0.1
    c_max: float = 2.0
    lam: float = 1.0
    tau: float = math.log(0.999 / 0.001)

    paper = "2510.05342"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.c_max > 1:
            raise ValueError(f"MADPO: c_max must be above 1, and c_min is 1 / c_max; got {self.c_max}.")

    def pair(self, chosen: Tensor, rejected: Tensor, batch: Batch) -> Tensor:
        weight = self.weight(batch.need("margin", self.name).to(chosen.dtype))
        return -weight * F.logsigmoid(self.beta * (chosen - rejected))

    def weight(self, h: Tensor) -> Tensor:  # [P] -> [P]
        c_min = 1 / self.c_max
        steepness = math.log((self.c_max - 1) / (1 - c_min))
        c = c_min + (self.c_max - c_min) * torch.sigmoid(-(self.lam * (h.abs() - self.tau) + steepness))
        amplified = (F.logsigmoid(c * h) - F.logsigmoid(h)).exp()
        return torch.where(h > -self.tau, amplified, 1.0)


# ---- without a reference -------------------------------------------------------------------------------


@dataclass(frozen=True)
class SimPO(PairLoss):
    """Simple preference optimisation: -log s(beta (m_w - m_l) - gamma), m = mean_t log pi.

    alphapo = a other than 0 takes (1 - e^(-a m)) / a in place of m (AlphaPO; a = 0 is its limit).
    Sources: arXiv 2405.14734 equation 6; AlphaPO 2501.03884.

    >>> import torch, fused_align as fa
    >>> batch = fa.Batch(torch.tensor([[1], [2]])).live()
    >>> fa.SimPO(beta=2.0, gamma=1.0).items(*[torch.tensor([-1.0, -1.5])] * 2, batch)
    tensor([0.6931])
    """

    beta: float = 2.5
    gamma: float = 1.375
    alphapo: float = 0.0

    paper = "2405.14734"
    anchor = None

    def score(self, log_ratio: Tensor, batch: Batch) -> Tensor:
        return alphapo_reward(batch.mean(log_ratio), self.alphapo)

    def pair(self, chosen: Tensor, rejected: Tensor, batch: Batch) -> Tensor:
        return -F.logsigmoid(self.beta * (chosen - rejected) - self.gamma)


def alphapo_reward(mean: Tensor, alpha: float) -> Tensor:
    """(1 - p^-alpha) / alpha of p = e^mean, whose limit is the mean itself. Source: arXiv 2501.03884."""
    return -finite_expm1(-alpha * mean) / alpha if alpha else mean


@dataclass(frozen=True)
class CPO(PairLoss):
    """Contrastive preference optimisation: -(1-e) log s(beta M) - e log s(-beta M), plus alpha NLL(y_w).

    M = sum log pi(y_w) - sum log pi(y_l), or the margin of AlphaPO's rewards if alphapo is not 0; e =
    label_smoothing. The NLL is the mean over all chosen tokens, so a normalizer is {"pairs": .., "tokens":
    those of the chosen answers}. Sources: arXiv 2401.08417 equation 5; AlphaPO 2501.03884.

    >>> import torch, fused_align as fa
    >>> batch = fa.Batch(torch.tensor([[1], [2]])).live()
    >>> fa.CPO(beta=1.0).items(*[torch.tensor([-1.0, -1.0])] * 2, batch), fa.CPO(alpha=0.5).parts[1]
    (tensor([0.6931]), (0.5, SFT(label_smoothing=0.0, z_loss=0.0, chosen=True)))
    """

    beta: float = 0.1
    alpha: float = 1.0
    label_smoothing: float = 0.0
    alphapo: float = 0.0

    paper = "2401.08417"
    anchor = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flipped(self.name, self.label_smoothing)

    @property
    def parts(self) -> tuple[tuple[float, Loss], ...]:
        return ((1.0, self), (self.alpha, SFT(chosen=True))) if self.alpha else ((1.0, self),)

    def score(self, log_ratio: Tensor, batch: Batch) -> Tensor:
        return alphapo_reward(batch.mean(log_ratio), self.alphapo) if self.alphapo else batch.sum(log_ratio)

    def pair(self, chosen: Tensor, rejected: Tensor, batch: Batch) -> Tensor:
        return smoothed(self.beta * (chosen - rejected), self.label_smoothing)


@dataclass(frozen=True)
class ORPO(PairLoss):
    """Odds-ratio preference optimisation: NLL(y_w) - lam log s(log odds_w - log odds_l).

    log odds = m - log(1 - e^m), m = mean_t log pi, at most -1e-7. The NLL and the normalizer are as for
    `CPO`. Source: arXiv 2403.07691, equation 6.

    >>> import torch, fused_align as fa
    >>> batch = fa.Batch(torch.tensor([[1], [2]])).live()
    >>> fa.ORPO().items(*[torch.tensor([0.75, 0.5]).log()] * 2, batch)  # -log s(log 3)
    tensor([0.2877])
    """

    lam: float = 0.1

    paper = "2403.07691"
    anchor = None
    scale = "lam"

    @property
    def parts(self) -> tuple[tuple[float, Loss], ...]:
        return (self.lam, self), (1.0, SFT(chosen=True))

    def score(self, log_ratio: Tensor, batch: Batch) -> Tensor:
        return batch.mean(log_ratio)

    def pair(self, chosen: Tensor, rejected: Tensor, batch: Batch) -> Tensor:
        return -F.logsigmoid(log_odds(chosen) - log_odds(rejected))


def log_odds(log_p: Tensor) -> Tensor:
    """log p - log(1 - p) from log p, which is taken as at most -1e-7."""
    log_p = log_p.clamp(max=-1e-7)
    near = log_p > -math.log(2)  # 1 - p by the formula that keeps its digits
    inside = torch.where(near, log_p, -math.log(2))
    outside = torch.where(near, -math.log(2), log_p)
    return log_p - torch.where(near, (-torch.expm1(inside)).log(), torch.log1p(-outside.exp()))
