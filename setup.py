"""The optional CUDA module. Everything else about the package is in pyproject.toml.

FUSED_ALIGN_CUDA=auto (default) | 0 | 1     auto builds the module if this version has one and nvcc is found,
                                            0 never does, 1 fails if it can't be built.

torch is not imported: the module reads raw pointers and a stream, so that one build serves every torch, and
`pip install` works in an isolated build environment that has no torch.
"""

from __future__ import annotations

import os
from pathlib import Path

from setuptools import Extension, setup

CSRC = Path(__file__).parent / "csrc"
CHOICES = ("auto", "0", "1")


def cuda_extensions() -> list[Extension]:
    choice = os.environ.get("FUSED_ALIGN_CUDA", "auto")
    if choice not in CHOICES:
        raise SystemExit(f"FUSED_ALIGN_CUDA must be one of {', '.join(CHOICES)}; got {choice!r}.")
    if choice == "1" and not any(CSRC.glob("*.cu")):
        raise SystemExit(
            "FUSED_ALIGN_CUDA=1 asks for the CUDA module, and this version has none: csrc/ holds no .cu "
            "file. Unset it, or set it to auto or 0."
        )
    return []


setup(ext_modules=cuda_extensions())
