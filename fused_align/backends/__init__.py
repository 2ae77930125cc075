"""The backends: who computes the steps of a plan. `pick` chooses one, and never falls back in silence."""

from __future__ import annotations

from types import ModuleType

import torch

from . import eager, torch_

# In the order "auto" tries them. eager holds full logits: it is the oracle and only ever runs by name.
_TABLE: dict[str, ModuleType] = {"torch": torch_, "eager": eager}
_AUTO = ("torch",)


def table(device: torch.device | str = "cpu") -> list[tuple[str, str | None]]:
    """(name, None if usable on this device, else a sentence that says why not), for every backend."""
    return [(name, backend.why_not(torch.device(device))) for name, backend in _TABLE.items()]


def pick(name: str, device: torch.device) -> str:
    """The backend to run: by name, or "auto" for the first usable one.

    Raises:
        ValueError: there is no such backend.
        RuntimeError: the backend asked for by name cannot run, with its reason.
    """
    if name == "auto":
        return next(choice for choice in _AUTO if _TABLE[choice].why_not(device) is None)
    if name not in _TABLE:
        raise ValueError(f'backend must be "auto" or one of {sorted(_TABLE)}; got {name!r}.')
    reason = _TABLE[name].why_not(device)
    if reason is not None:
        raise RuntimeError(f"backend {name!r} cannot run here: {reason}")
    return name
