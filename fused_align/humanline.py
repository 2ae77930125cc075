"""Humanline (arXiv 2509.24207): an asymmetric clip of the token log-ratio, and when the reference follows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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

    def __post_init__(self) -> None:
        if not self.log_eps_p < self.log_eps_r:
            raise ValueError(
                f"Humanline: log_eps_p must be below log_eps_r; got {self.log_eps_p} and {self.log_eps_r}."
            )

    def clip(self, log_ratio: Tensor) -> Tensor:  # [...] -> [...]
        return torch.clamp(log_ratio, self.log_eps_p, self.log_eps_r)

    def inside(self, log_ratio: Tensor) -> Tensor:  # [...] -> [...] bool
        """Whether a log-ratio lies strictly inside the bounds."""
        return (log_ratio > self.log_eps_p) & (log_ratio < self.log_eps_r)


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
