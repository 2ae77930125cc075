"""Policy-gradient losses. rho_t = exp(log pi - log old), A the advantage."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..batch import Batch
from ..humanline import Humanline
from .base import Loss

MAX_LOG_RATIO = 60.0  # e^60 is finite in float32; above it there is no gradient
MAX_ITEM = 1e30  # of rho * KL, whose factors may reach e^60 each


@dataclass(frozen=True)
class GRPO(Loss):
    """Clipped policy gradient with an optional KL penalty; one item per token:

        -min( min(rho, delta) A, clip(rho, 1-eps_low, 1+eps_high) A ) + beta * KL - entropy_coef * entropy

    KL of the unclipped log-probs against batch.ref_logp, d = log ref - log pi: "k3" exp(d) - d - 1, "k1" -d,
    "k2" d^2/2; times rho with `kl_correction`. delta (above 1 + eps_high) bounds rho where A < 0 (two-sided).

    aggregation: "seq_mean_token_mean" (GRPO; normalizer counts sequences) | "token_mean" (DAPO, BNPO;
    tokens) | "constant" (Dr. GRPO: sum / (S max_length); sequences) | "seq_mean_token_sum" (sequences).
    Sources: PPO arXiv 1707.06347 equation 7; GRPO arXiv 2402.03300 equation 3; asymmetric eps and token mean
    DAPO arXiv 2503.14476; constant length arXiv 2503.20783; two-sided arXiv 2505.07291.

    >>> import torch, fused_align as fa
    >>> batch = fa.Batch(torch.tensor([[1, 2]]), advantage=torch.tensor([2.0])).live()
    >>> fa.GRPO().items(torch.zeros(2), torch.tensor([0.0, 1.0]), batch)
    tensor([-2.0000, -2.4000])
    """

    eps_low: float = 0.2
    eps_high: float = 0.2
    delta: float | None = None
    beta: float = 0.0
    kl: str = "k3"
    kl_correction: bool = False
    aggregation: str = "seq_mean_token_mean"
    max_length: int | None = None
    entropy_coef: float = 0.0

    anchor = "old"

    def __post_init__(self) -> None:
        if self.kl not in ("k1", "k2", "k3"):
            raise ValueError(f'{self.name}: kl must be "k1", "k2" or "k3"; got {self.kl!r}.')
        if self.aggregation not in ("seq_mean_token_mean", "token_mean", "constant", "seq_mean_token_sum"):
            raise ValueError(
                f'{self.name}: aggregation must be "seq_mean_token_mean", "token_mean", "constant" or '
                f'"seq_mean_token_sum"; got {self.aggregation!r}.'
            )
        if self.aggregation == "constant" and not self.max_length:
            raise ValueError(
                f'{self.name}: aggregation="constant" divides by max_length, the longest completion allowed; '
                f"got {self.max_length}."
            )
        if self.delta is not None and self.delta <= 1 + self.eps_high:
            raise ValueError(
                f"{self.name}: delta must be above 1 + eps_high = {1 + self.eps_high}; got {self.delta}."
            )

    @property
    def needs_ref(self) -> bool:
        return self.beta != 0

    @property
    def reads(self) -> tuple[str, ...]:
        return ("entropy",) if self.entropy_coef else ()

    def sparse(self, humanline: Humanline | None) -> bool:
        return self.beta == 0 and not self.entropy_coef

    def plain(self) -> GRPO:
        return replace(self, entropy_coef=0.0)

    @property
    def unit(self) -> str:
        return "tokens" if self.aggregation == "token_mean" else "sequences"

    def weights(self, batch: Batch) -> Tensor:
        weights = super().weights(batch)
        if self.aggregation == "seq_mean_token_mean":
            return weights / batch.spread(batch.lengths)
        return weights / self.max_length if self.aggregation == "constant" and self.max_length else weights

    def items(self, logp: Tensor, log_ratio: Tensor, batch: Batch) -> Tensor:
        advantage = batch.token_advantage(self.name).to(logp.dtype)
        rho = log_ratio.clamp(max=MAX_LOG_RATIO).exp()
        bounded = rho if self.delta is None else rho.clamp(max=self.delta)
        clipped = rho.clamp(1 - self.eps_low, 1 + self.eps_high)
        items = -torch.minimum(bounded * advantage, clipped * advantage)
        if self.beta != 0:
            kl = self.penalty(logp, batch)
            items = items + self.beta * ((rho * kl).clamp(max=MAX_ITEM) if self.kl_correction else kl)
        if self.entropy_coef:
            items = items - self.entropy_coef * batch.stat("entropy", self.name)
        return items

    def penalty(self, logp: Tensor, batch: Batch) -> Tensor:
        """[n] estimates of KL(pi || ref), nats. Source: J. Schulman, "Approximating KL divergence", 2020."""
        d = batch.need("ref_logp", f"{self.name}'s KL penalty").to(logp.dtype) - logp
        if self.kl == "k1":
            return -d
        if self.kl == "k2":
            return d.square() / 2
        d = d.clamp(max=MAX_LOG_RATIO)
        return torch.expm1(d) - d  # near the reference e^d - d - 1 would be all rounding

    def metrics(self, logp: Tensor, log_ratio: Tensor, batch: Batch) -> dict[str, Tensor]:
        advantage, rho = batch.token_advantage(self.name), log_ratio.exp()
        low = (rho < 1 - self.eps_low) & (advantage < 0)
        high = (rho > 1 + self.eps_high) & (advantage > 0)
        found = {
            "clip_ratio/low_mean": batch.token_mean(low.float()),
            "clip_ratio/high_mean": batch.token_mean(high.float()),
            "clip_ratio/region_mean": batch.token_mean((low | high).float()),
        }
        if batch.ref_logp is not None:
            found["kl"] = batch.token_mean(self.penalty(logp, batch))
        return found


@dataclass(frozen=True)
class PPO(GRPO):
    """PPO's clipped surrogate: `GRPO` with the mean over all tokens. Source: arXiv 1707.06347, equation 7."""

    aggregation: str = "token_mean"
