"""Scratch memory. On a CPU it is kept between calls, since fresh pages cost 5 to 10 % of a pass."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_kept = threading.local()


@contextmanager
def lease(nbytes: int, device: torch.device) -> Iterator[Tensor]:
    """Flat scratch, uint8 [nbytes]. A nested lease gets memory of its own, never the one in use.

    On an accelerator the caching allocator already keeps pages, so nothing is held back here.
    """
    if device.type != "cpu":
        yield torch.empty(nbytes, dtype=torch.uint8, device=device)
        return
    kept, _kept.buffer = getattr(_kept, "buffer", None), None
    if kept is None or kept.numel() < nbytes:
        kept = None  # free the old pages before new ones are asked for
        kept = torch.empty(nbytes, dtype=torch.uint8, device=device)
    try:
        yield kept[:nbytes]
    finally:
        _kept.buffer = kept


def release_workspace() -> None:
    """Frees the scratch memory that this thread keeps between calls on a CPU (up to `workspace_bytes`)."""
    _kept.buffer = None
