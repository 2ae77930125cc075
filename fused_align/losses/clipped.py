"""Policy-gradient losses with PPO's clip of the ratio: of tokens (PPO, GRPO) or of sequences (GSPO, RLOO)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..batch import Batch
from .policy import PolicyLoss, finite_exp


@dataclass(frozen=True)
class _Clipped(PolicyLoss, base=True):
    """Base of the losses with PPO's clip: -min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A)."""

    eps_low: float = 0.2
    eps_high: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("eps_low", self.eps_low >= 0, "0 or more: the ratio is clipped below 1 - eps_low")
        self._check("eps_high", self.eps_high >= 0, "0 or more: the ratio is clipped above 1 + eps_high")

    def surrogate(self, logp: Tensor, log_ratio: Tensor, advantage: Tensor, batch: Batch) -> Tensor:
        ratio = self.ratio(log_ratio, batch)
        clipped = ratio.clamp(1 - self.eps_low, 1 + self.eps_high)
        return -torch.minimum(self.bounded(ratio) * advantage, clipped * advantage)

    def bounded(self, ratio: Tensor) -> Tensor:
        """The ratio of the term that is not clipped."""
        return ratio

    def clips(self, log_ratio: Tensor, advantage: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        ratio = self.ratio(log_ratio, batch)
        return (ratio < 1 - self.eps_low) & (advantage < 0), (ratio > 1 + self.eps_high) & (advantage > 0)


@dataclass(frozen=True)
class GRPO(_Clipped):
    """Group-relative policy optimisation (DAPO, BNPO and Dr. GRPO are presets of it):

        -min( min(rho, delta) A, clip(rho, 1-eps_low, 1+eps_high) A )

    delta (above 1 + eps_high) bounds rho where A < 0 (two-sided clip). Fields of `PolicyLoss` besides.
    Sources: arXiv 2402.03300 equation 3; DAPO arXiv 2503.14476; Dr. GRPO arXiv 2503.20783; two-sided arXiv
    2505.07291.

    >>> import torch, fused_align as fa
    >>> batch = fa.Batch(torch.tensor([[1, 2]]), advantage=torch.tensor([2.0])).live()
    >>> fa.GRPO().items(torch.zeros(2), torch.tensor([0.0, 1.0]), batch)
    tensor([-2.0000, -2.4000])
    """

    delta: float | None = None

    paper = "2402.03300"

    def __post_init__(self) -> None:
        super().__post_init__()
        fits = self.delta is None or self.delta > 1 + self.eps_high
        self._check("delta", fits, f"above 1 + eps_high = {1 + self.eps_high}, or None")

    @classmethod
    def dapo(cls, eps_high: float = 0.28, **fields: Any) -> GRPO:
        """Decoupled clip and the mean over all tokens of the step (pass their number as normalizer)."""
        return cls(eps_high=eps_high, aggregation="token_mean", **fields)

    @classmethod
    def bnpo(cls, **fields: Any) -> GRPO:
        """The mean over the tokens of each batch (without a normalizer)."""
        return cls(aggregation="token_mean", **fields)

    @classmethod
    def dr_grpo(cls, max_length: int, **fields: Any) -> GRPO:
        """No length bias: every sequence's sum is divided by the same max_length."""
        return cls(aggregation="constant", max_length=max_length, **fields)

    def bounded(self, ratio: Tensor) -> Tensor:
        return ratio if self.delta is None else ratio.clamp(max=self.delta)


@dataclass(frozen=True)
class PPO(GRPO):
    """PPO's clipped surrogate: `GRPO` with the mean over all tokens. Source: arXiv 1707.06347, equation 7.

    >>> import torch, fused_align as fa
    >>> batch = fa.Batch(torch.tensor([[1, 2]]), advantage=torch.tensor([-1.0])).live()
    >>> fa.PPO(eps_low=0.5).items(torch.zeros(2), torch.tensor([0.5, -1.0]).log1p(), batch)
    tensor([1.5000, 0.5000])
    """

    aggregation: str = field(default="token_mean", kw_only=True)

    paper = "1707.06347"


@dataclass(frozen=True)
class GSPO(_Clipped):
    """Group sequence policy optimisation: `GRPO` with a ratio per sequence, rho_s = exp(mean_t l_t).

    level="token" (GSPO-token) takes sg[rho_s] pi / sg[pi]: the same value, and gradients that per-token
    advantages can tell apart. Source: arXiv 2507.18071, equations 5 to 7, 13 and 14.

    >>> import torch, fused_align as fa
    >>> batch = fa.Batch(torch.tensor([[1, 2]]), advantage=torch.tensor([-1.0])).live()
    >>> fa.GSPO().items(torch.zeros(2), torch.tensor([3.0, 1.0]).log() / 3, batch)
    tensor([1.2009, 1.2009])
    """

    eps_low: float = 3e-4
    eps_high: float = 4e-4
    level: str = "sequence"

    paper = "2507.18071"
    coupled = "sequence"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("level", self.level in ("sequence", "token"), '"sequence" or "token"')

    def ratio(self, log_ratio: Tensor, batch: Batch) -> Tensor:
        whole = batch.spread(finite_exp(batch.mean(log_ratio)))
        return whole if self.level == "sequence" else whole.detach() * (log_ratio - log_ratio.detach()).exp()


@dataclass(frozen=True)
class LUSPO(GSPO):
    """Length-unbiased sequence policy optimisation: `GSPO` times the sequence's length.

    Source: arXiv 2602.05261, equation 7.

    >>> import torch, fused_align as fa
    >>> batch = fa.Batch(torch.tensor([[1, 2]]), advantage=torch.tensor([1.0])).live()
    >>> fa.LUSPO().weights(batch), fa.LUSPO().items(torch.zeros(2), torch.zeros(2), batch)
    (tensor([1., 1.], dtype=torch.float64), tensor([-1., -1.]))
    """

    eps_low: float = 2e-3
    eps_high: float = 2.5e-3
    aggregation: str = field(default="seq_mean_token_sum", kw_only=True)

    paper = "2602.05261"


@dataclass(frozen=True)
class RLOO(_Clipped):
    """REINFORCE leave-one-out as it is trained off-policy: PPO's clip on rho_s = exp(sum_t l_t), per
    sequence.

    The leave-one-out baseline is in the advantages (`group_advantages(baseline="leave_one_out")`). On-policy
    its gradient is that of -A log pi(y). Source: arXiv 2402.14740.

    >>> import torch, fused_align as fa
    >>> batch = fa.Batch(torch.tensor([[1, 2]]), advantage=torch.tensor([1.0])).live()
    >>> fa.RLOO().items(torch.zeros(2), torch.tensor([0.5, 1.6]).log(), batch)
    tensor([-0.8000, -0.8000])
    """

    paper = "2402.14740"
    coupled = "sequence"

    def ratio(self, log_ratio: Tensor, batch: Batch) -> Tensor:
        return batch.spread(finite_exp(batch.sum(log_ratio)))


@dataclass(frozen=True)
class HybridPolicy(_Clipped):
    """Policy gradient on samples and on edits of them (critique-post-edit):

        samples    -min(rho A, clip(rho, 1-eps_low, 1+eps_high) A)
        edits      -clip(rho, 1-edit_low, 1+edit_high) A            rows with batch.off_policy; None: no bound

    old_logp of an edit is its log-prob under the prompt that it was edited with. Mean over the tokens of
    both. Source: arXiv 2510.18849, section 4.2.2; its released code has no bounds on edits.

    >>> import torch, fused_align as fa
    >>> batch = fa.Batch(torch.tensor([[1], [2]]), advantage=torch.ones(2),
    ...                  off_policy=torch.tensor([False, True])).live()
    >>> fa.HybridPolicy().items(torch.zeros(2), torch.tensor([2.0, 2.0]).log(), batch)
    tensor([-1.2000, -2.0000])
    """

    edit_low: float | None = None
    edit_high: float | None = None
    aggregation: str = field(default="token_mean", kw_only=True)

    paper = "2510.18849"
    rows = ""  # the trainer has no edits, nor their log-probs under the prompt that they were edited with

    def surrogate(self, logp: Tensor, log_ratio: Tensor, advantage: Tensor, batch: Batch) -> Tensor:
        low = -math.inf if self.edit_low is None else 1 - self.edit_low
        high = math.inf if self.edit_high is None else 1 + self.edit_high
        edits = -self.ratio(log_ratio, batch).clamp(low, high) * advantage
        return torch.where(self._edited(batch), edits, super().surrogate(logp, log_ratio, advantage, batch))

    def clips(self, log_ratio: Tensor, advantage: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        low, high = super().clips(log_ratio, advantage, batch)
        sampled = ~self._edited(batch)
        return low & sampled, high & sampled

    def _edited(self, batch: Batch) -> Tensor:  # -> [n] bool
        return batch.spread(batch.need("off_policy", self.name)).bool()
