"""The backends whose steps are kernels, and how a test runs on one.

On a CPU Triton's interpreter runs those of triton (conftest.py asks for it), and `emulated` those of cuda. A
test with the fixture `backend` (conftest.py) runs on each.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType

import emulated
import pytest
import torch

from fused_align import backends
from fused_align.backends import cuda_

BACKENDS = backends.KERNELS
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def why_not(name: str, device: torch.device = DEVICE) -> str | None:
    """A sentence if tests of a backend can't run here."""
    if name == "cuda" and device.type == "cpu":
        return emulated.why_not()
    return dict(backends.table(device))[name]


def use(name: str, monkeypatch: pytest.MonkeyPatch, device: torch.device | None = None) -> None:
    """Makes it what "auto" takes, of tensors on this device: where a test's are made by default."""
    device = device or torch.get_default_device()
    reason = why_not(name, device)
    if reason is not None:
        pytest.skip(reason)
    monkeypatch.setenv("FUSED_ALIGN_BACKEND", name)
    if name == "cuda" and device.type == "cpu":
        monkeypatch.setattr(cuda_, "module", emulated_module())


def emulated_module() -> ModuleType:
    """csrc/ for the CPU. Sources that do not compile are compiled once, not by every test again."""
    found = _loaded()
    if isinstance(found, str):
        raise RuntimeError(found)
    return found


@cache
def _loaded() -> ModuleType | str:
    try:
        return emulated.load()
    except RuntimeError as error:
        return str(error)
