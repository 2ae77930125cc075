"""Averages that a loss keeps between optimizer steps, and sums over ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def all_reduced(x: Tensor, how: str = "SUM") -> Tensor:
    """x, reduced over the ranks where torch.distributed is initialised."""
    if dist.is_available() and dist.is_initialized():
        x = x.clone()
        dist.all_reduce(x, getattr(dist.ReduceOp, how))
    return x


def zeros(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.float64, device="cpu")


@dataclass
class State:
    """What a loss remembers, in float64 vectors that move to the device where they are used.

    total: what the loss reads. pending: sums of the optimizer step under way. calls: how many batches were
    seen; a number of the host, to seed draws with.
    """

    total: Tensor  # [k]
    pending: Tensor = field(default_factory=lambda: zeros(0))  # [m]
    calls: int = 0

    def at(self, device: torch.device) -> State:
        """Itself, with the vectors moved to the device."""
        self.total, self.pending = self.total.to(device), self.pending.to(device)
        return self

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total.clone(), "pending": self.pending.clone(), "calls": self.calls}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        own = self.state_dict()
        if set(state) != set(own) or any(own[n].shape != state[n].shape for n in ("total", "pending")):
            raise ValueError(
                f"load_state_dict: expected total {list(self.total.shape)}, pending "
                f"{list(self.pending.shape)} and calls; got {sorted(state)}. Is it the state of another loss?"
            )
        self.total, self.pending = state["total"].double().clone(), state["pending"].double().clone()
        self.calls = int(state["calls"])
