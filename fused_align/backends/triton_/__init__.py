"""The steps as Triton kernels: one for each pass over a tile that torch would take several launches for.

Importing this does not import triton; `steps`, `losses`, `logits` and `score` do.
"""

import importlib.metadata
import importlib.util
import os
import shutil
from contextlib import AbstractContextManager, nullcontext

import torch

OLDEST = 8  # compute capability: bfloat16 in the tensor cores
OLDEST_TRITON = (3, 6)


def installed() -> str | None:
    """The version of Triton, "unknown" where its package has another name (ROCm's), None without it."""
    if importlib.util.find_spec("triton") is None:
        return None
    named = (d.version for d in importlib.metadata.distributions(name="triton"))
    return next(named, "unknown")


INSTALLED = installed()
COMPILER = next(filter(shutil.which, (os.environ.get("CC", ""), "cc", "gcc", "clang")), None)


def interpreted() -> bool:
    """Whether Triton runs its kernels in Python, on a CPU."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")  # as it reads it


def why_not(device: torch.device) -> str | None:
    """None where Triton can run, else the reason: a GPU of compute capability 8.0, or its interpreter."""
    if INSTALLED is None:
        return "triton is not installed (pip install triton; torch's CUDA builds bring it)"
    if INSTALLED != "unknown" and tuple(map(int, INSTALLED.split(".")[:2])) < OLDEST_TRITON:
        return f"it needs Triton {'.'.join(map(str, OLDEST_TRITON))}; got {INSTALLED}"
    if device.type == "cpu":
        if interpreted():
            return None
        return "its kernels need a GPU, and the tensors are on cpu (TRITON_INTERPRET=1 runs them in Python)"
    if COMPILER is None:
        return "Triton builds its launcher with a C compiler, and none of $CC, cc, gcc, clang is there"
    if device.type != "cuda":
        return f"its kernels need an NVIDIA or AMD GPU, and the tensors are on {device}"
    found = torch.cuda.get_device_properties(device)  # (a constant to torch.compile)
    if torch.version.hip is None and found.major < OLDEST:
        return f"it needs compute capability {OLDEST}.0; this GPU has {found.major}.{found.minor}"
    return None


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be that of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
