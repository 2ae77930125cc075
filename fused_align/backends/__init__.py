"""The backends: who computes the steps of a plan. `pick` chooses one, and never falls back in silence.

A backend is a module with `why_not(device)`; one with steps of its own has those of `Steps` too. What needs
more than torch is imported when it is first used, but for the compiled module of `cuda`.
"""

from __future__ import annotations

import os
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from . import cuda_, eager, torch_, triton_

if TYPE_CHECKING:
    from ..humanline import RatioClip
    from ..linear.plan import Problem
    from ..losses.base import Loss
    from ..rows import Rows
    from .kernel_losses import LossKernel
    from .operands import Chunk, Coefficients, Head, Scratch, Upstream
    from .torch_logits import LogitStats

_TABLE: dict[str, ModuleType] = {"triton": triton_, "cuda": cuda_, "torch": torch_, "eager": eager}
KERNELS = ("triton", "cuda")  # those whose steps are kernels, the module `steps` of theirs
_AUTO = ("triton", "cuda", "torch")  # in the order "auto" tries them


class Steps(Protocol):
    """What a backend implements, on a tile of the vocabulary or on vectors of rows; `torch_` documents it."""

    EXP_BYTES: dict[str, int]

    def watching_is_free(self, device: torch.device) -> bool: ...

    def extra_tiles(self, capped: bool, mixed: bool) -> int: ...

    def gemm(
        self,
        out: Tensor,
        a: Tensor,
        b: Tensor,
        *,
        alpha: float = 1.0,
        beta: float = 0.0,
        split: bool = False,
        spare: Tensor | None = None,
    ) -> None: ...

    # rows

    def open_rows(
        self, head: Head, x: Tensor, target: Tensor, inverse: float | Tensor, work: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor | None]: ...

    def finish_rows(self, chunk: Chunk) -> Tensor: ...

    def lost(self, chunk: Chunk) -> Tensor: ...

    def close_product(self, product: Tensor, chunk: Chunk) -> None: ...

    def coefficients(
        self, chunk: Chunk, up: Upstream, entropy: Tensor | None = None, *, vocab: int
    ) -> Coefficients: ...

    # tiles

    def exp_tile(
        self,
        head: Head,
        chunk: Chunk,
        weight: Tensor,
        bias: Tensor | None,
        start: int,
        tile: Tensor,
        out: Tensor | None,
        product: Tensor | None,
        scratch: Scratch,
        *,
        watch: bool,
        static: bool,
    ) -> None: ...

    def grad_tile(
        self,
        head: Head,
        chunk: Chunk,
        coef: Coefficients,
        weight: Tensor,
        bias: Tensor | None,
        start: int,
        tile: Tensor,
        out: Tensor,
        scratch: Scratch,
    ) -> None: ...

    def kept_tile(
        self,
        chunk: Chunk,
        coef: Coefficients,
        ref: Tensor,
        kept: Tensor,
        live: Tensor | None,
        out: Tensor,
        scratch: Scratch,
    ) -> None: ...

    def fused_score(self, head: Head, chunk: Chunk) -> None: ...

    def why_not_fused(self, problem: Problem) -> str | None: ...

    def fused_bytes(self, problem: Problem, rows: int) -> int: ...

    # gradients

    def scaled_rows(self, x: Tensor, coef: Tensor, dtype: torch.dtype) -> Tensor: ...

    def store_hidden(
        self,
        out: Tensor,
        index: slice | Tensor,
        product: Tensor,
        scale: Tensor,
        head: Head,
        target: Tensor,
        coef: Coefficients,
        average: Tensor | None,
    ) -> None: ...

    def add_hidden_rows(
        self,
        out: Tensor,
        column: Tensor,
        x: Tensor | None,
        coef: Tensor,
        rows: Rows | None = None,
        head: Head | None = None,
    ) -> None: ...

    def add_products(self, out: Tensor, tile: Tensor, coef: Tensor) -> None: ...

    # logits that exist

    def logit_stats(
        self, logits: Tensor, target: Tensor, inverse: Tensor | None, scalar: float, *, entropy: bool = False
    ) -> LogitStats: ...

    def logit_gradient(
        self,
        dlogp: Tensor,
        dlse: Tensor | None,
        dentropy: Tensor | None,
        logits: Tensor,
        target: Tensor,
        stats: LogitStats,
        inverse: Tensor | None,
        scalar: float,
        *,
        out: Tensor,
    ) -> None: ...

    # losses

    def loss_kernel(self, loss: Loss, humanline: RatioClip | None) -> LossKernel | None: ...


def steps(name: str) -> Steps:
    """The steps of a backend; those of torch for eager, which is dense and only plans with them."""
    if name in KERNELS:
        return import_module(f".{name}_.steps", __name__).STEPS
    return torch_


def table(device: torch.device | str = "cpu") -> list[tuple[str, str | None]]:
    """(name, None if usable on this device, else a sentence that says why not), for every backend."""
    return [(name, backend.why_not(torch.device(device))) for name, backend in _TABLE.items()]


def pick(name: str, device: torch.device) -> str:
    """The backend to run: by name, or "auto" for FUSED_ALIGN_BACKEND, else the first usable one.

    Raises:
        ValueError: there is no such backend.
        RuntimeError: the backend asked for by name cannot run, with its reason.
    """
    asked = (os.environ.get("FUSED_ALIGN_BACKEND") or "auto") if name == "auto" else name
    if asked == "auto":
        return next(choice for choice in _AUTO if _suits(choice, device))
    if asked not in _TABLE:
        where = " (from FUSED_ALIGN_BACKEND)" if asked != name else ""
        raise ValueError(f'backend must be "auto" or one of {sorted(_TABLE)}; got {asked!r}{where}.')
    reason = _TABLE[asked].why_not(device)
    if reason is not None:
        raise RuntimeError(f"backend {asked!r} cannot run here: {reason}")
    return asked


def _suits(name: str, device: torch.device) -> bool:
    """Whether "auto" may take it: kernels run on a CPU for tests alone."""
    return (name == "torch" or device.type != "cpu") and _TABLE[name].why_not(device) is None
