"""Humanline (arXiv 2509.24207): an asymmetric clip of the token log-ratio, and when the reference follows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .batch import Batch


@dataclass(frozen=True)
class Humanline:
    """Clips every token's log-ratio to [log_eps_p, log_eps_r] (nats), upstream of any loss with an anchor.

    The gradient is 1 inside (bounds included) and 0 outside; the clipped value still enters the loss.
    Against a policy that is its own anchor (old_logp=None) every log-ratio is 0 and there is nothing to clip:
    pass the synced reference's log-probs as old_logp.
    Source: arXiv 2509.24207, section 4. The defaults are the paper's; its code also ships (-1.0, 1.5).

    >>> Humanline().clip(torch.tensor([-2.0, 0.5, 3.0]))
    tensor([-1.5000,  0.5000,  1.5000])
    """

    log_eps_p: float = -1.5
    log_eps_r: float = 1.5

    item: ClassVar[str] = "token"  # what it couples, as of a loss

    def __post_init__(self) -> None:
        if not self.log_eps_p < self.log_eps_r:
            raise ValueError(
                f"Humanline: log_eps_p must be below log_eps_r; got {self.log_eps_p} and {self.log_eps_r}."
            )

    def bind(self, batch: Batch) -> Humanline:
        """The clip of one batch: itself."""
        return self

    def clip(self, log_ratio: Tensor) -> Tensor:  # [...] -> [...]
        return torch.clamp(log_ratio, self.log_eps_p, self.log_eps_r)

    def inside(self, log_ratio: Tensor) -> Tensor:  # [...] -> [...] bool
        """Whether a log-ratio lies strictly inside the bounds."""
        return (log_ratio > self.log_eps_p) & (log_ratio < self.log_eps_r)


@dataclass(frozen=True)
class HumanlineSampling:
    """Humanline's stochastic original: tokens are rejected at random, and lose their gradient, not their
    value.

    With r = exp(log-ratio) and M_P, M_R the largest r and 1/r of the batch's live tokens, a token is rejected
    iff

        r < M_P B_P   or   1/r < M_R B_R        B_P ~ Beta(gamma_p, 1), B_R ~ Beta(gamma_r, 1), i.i.d.

    so the whole batch is coupled: no gradient is formed before its end. Every call of align_loss draws 2 n
    uniform numbers, n the live tokens or max_live, from `generator` (None: torch's own). Source: arXiv
    2509.24207, section 4.
    """

    gamma_p: float = 0.5
    gamma_r: float = 0.01
    generator: torch.Generator | None = None

    item: ClassVar[str] = "batch"

    def __post_init__(self) -> None:
        if not (self.gamma_p > 0 and self.gamma_r > 0):
            raise ValueError(
                f"HumanlineSampling: gamma_p and gamma_r must be positive; got {self.gamma_p} and "
                f"{self.gamma_r}."
            )

    def bind(self, batch: Batch) -> _Draws:
        """The draws for one live batch."""
        device = batch.target.device if self.generator is None else self.generator.device
        uniform = torch.rand(
            2, batch.target.numel(), generator=self.generator, device=device, dtype=torch.float64
        )
        log = uniform.to(batch.target.device, non_blocking=True).log()
        return _Draws(log[0] / self.gamma_p, log[1] / self.gamma_r, batch.valid)


@dataclass(frozen=True)
class _Draws:
    """log B_P and log B_R of every token, [n]."""

    log_p: Tensor
    log_r: Tensor
    valid: Tensor | None

    def clip(self, log_ratio: Tensor) -> Tensor:  # [n] -> [n]
        return torch.where(self.inside(log_ratio), log_ratio, log_ratio.detach())

    def inside(self, log_ratio: Tensor) -> Tensor:  # [n] -> [n] bool
        """Whether a token was not rejected."""
        if not log_ratio.numel():
            return log_ratio.bool()
        x = log_ratio.detach().double()
        most = x if self.valid is None else torch.where(self.valid, x, -torch.inf)
        least = x if self.valid is None else torch.where(self.valid, x, torch.inf)
        return (x >= most.amax() + self.log_p) & (-x >= -least.amin() + self.log_r)


RatioClip = Humanline | HumanlineSampling


@dataclass(frozen=True)
class SyncSchedule:
    """When the reference takes the policy's weights: 0-based step n syncs iff (n+1) % every == 0.

    The copy is made after backward and before the optimizer's step, so the reference lags 1..every updates
    and never equals the policy after the first step.

    >>> [step for step in range(6) if SyncSchedule(every=3).due(step)]
    [2, 5]
    """

    every: int = 1

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"SyncSchedule: every must be at least 1 step; got {self.every}.")

    def due(self, step: int) -> bool:
        return (step + 1) % self.every == 0
