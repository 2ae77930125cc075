"""The steps as Triton kernels: one for each pass over a tile that torch would take several launches for.

Importing this does not import triton; `steps`, `losses`, `logits` and `score` do.
"""

import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext

import torch

OLDEST = (8, 0)  # compute capability: bfloat16 in the tensor cores


def interpreted() -> bool:
    """Whether Triton runs its kernels in Python, on a CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_not(device: torch.device) -> str | None:
    """None where Triton can run, else the reason: a GPU of compute capability 8.0, or its interpreter."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton; torch's CUDA builds bring it)"
    if device.type == "cpu":
        if interpreted():
            return None
        return "its kernels need a GPU, and the tensors are on cpu (TRITON_INTERPRET=1 runs them in Python)"
    if device.type != "cuda":
        return f"its kernels need an NVIDIA or AMD GPU, and the tensors are on {device}"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < OLDEST:
        found = ".".join(map(str, torch.cuda.get_device_capability(device)))
        return f"it needs compute capability {'.'.join(map(str, OLDEST))}; this GPU has {found}"
    return None


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be that of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
