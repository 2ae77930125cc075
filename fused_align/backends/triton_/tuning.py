"""Block sizes: how each kernel is launched, and what else may be tried for it.

By default from the table below, so that a first call costs one compilation. FUSED_ALIGN_TUNE=1 times the
candidates that suit a call's sizes instead, at the first call of each class of sizes, and keeps what won in
Triton's cache on disk, by device and versions: later processes with the same setting start with that.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import hidden, interpreted, on_device, rows, tiles
from .losses import loss as loss  # one of the launches that KernelSteps calls

_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@dataclass(frozen=True)
class Blocks:
    """What one program takes, and with how many threads."""

    rows: int
    cols: int | None = None
    warps: int = 4

    def settings(self) -> dict[str, int]:
        """As arguments of a launch."""
        return self.sizes() | {"num_warps": self.warps}

    def sizes(self) -> dict[str, int]:
        return {"ROWS": self.rows} | ({} if self.cols is None else {"COLS": self.cols})


@dataclass(frozen=True)
class Launch:
    """A kernel with its grid and block sizes.

    The defaults hold for sm_80, sm_90 and sm_100 alike: a thread moves one or two pieces of 16 bytes at a
    time, and rows are long enough to fill a program. tests/test_aot.py compiles them for all three.
    """

    kernel: Any
    default: Blocks
    others: tuple[Blocks, ...] = ()
    grid: tuple[str | None, ...] = ("ROWS",)  # what each size of the problem is divided by
    key: tuple[str, ...] = ()  # arguments whose values make a class of sizes
    adds_to: tuple[str, ...] = ()  # arguments that a timing run must find as they were
    interpreted: Blocks = Blocks(64, 256)  # few programs, each of which is slow

    def __call__(self, sizes: tuple[int, ...], *args: object, **flags: object) -> None:
        """Launches over `sizes`, one for each dimension of the grid; nothing if one of them is 0."""
        if 0 in sizes:
            return
        flags = {name: _TYPES[x] if isinstance(x, torch.dtype) else x for name, x in flags.items()}
        device = next(x.device for x in args if isinstance(x, Tensor))

        def grid(meta: dict[str, int]) -> tuple[Any, ...]:
            pairs = zip(sizes, self.grid, strict=True)
            return tuple(size if name is None else triton.cdiv(size, meta[name]) for size, name in pairs)

        with on_device(device):
            if self.others and os.environ.get("FUSED_ALIGN_TUNE") == "1":
                _tuned(self)[grid](*args, **flags)
            else:
                chosen = self.interpreted if interpreted() else self.default
                self.kernel[grid](*args, **flags, **chosen.settings())

    def configs(self) -> list[triton.Config]:
        return [triton.Config(b.sizes(), num_warps=b.warps) for b in (self.default, *self.others)]


timer: Callable[..., list[float]] | None = None  # (call, quantiles) -> milliseconds; None: Triton's own


@cache
def _tuned(launch: Launch) -> Any:
    copies: dict[str, Tensor] = {}

    def keep(arguments: dict[str, Any], reset_only: bool = False) -> None:
        if not reset_only:
            given = ((name, arguments[name]) for name in launch.adds_to)
            copies.update((name, x.clone()) for name, x in given if x is not None)

    def restore(arguments: dict[str, Any], exception: Exception | None) -> None:
        for name, copy in copies.items():
            arguments[name].copy_(copy)
        copies.clear()

    return triton.autotune(
        launch.configs(),
        key=list(launch.key),
        pre_hook=keep,
        post_hook=restore,
        prune_configs_by={"early_config_prune": _prune},
        do_bench=timer,
        cache_results=True,
    )(launch.kernel)


def _prune(configs: list[triton.Config], named: dict[str, Any], **_: Any) -> list[triton.Config]:
    """Drops blocks of which one would cover the problem twice; the smallest always stays."""
    sizes = {"ROWS": named.get("rows"), "COLS": named.get("cols", named.get("hidden"))}

    def excess(config: triton.Config) -> bool:
        return any(size and config.kwargs.get(name, 1) >= 2 * size for name, size in sizes.items())

    return [c for c in configs if not excess(c)] or configs[:1]


_WIDE = (Blocks(1, 1024, 4), Blocks(1, 4096, 8), Blocks(1, 8192, 16), Blocks(2, 2048, 8))
_FLAT = (Blocks(1, 2048, 8), Blocks(4, 512, 4), Blocks(4, 1024, 8))

exp_tile = Launch(
    tiles.exp_tile, Blocks(1, 2048, 8), _WIDE, key=("cols", "hidden"),
    adds_to=("logits", "product", "total", "moment", "pivot", "squares", "average"),
)  # fmt: skip
grad_tile = Launch(
    tiles.grad_tile, Blocks(1, 2048, 8), _WIDE, ("ROWS", "COLS"), key=("cols",), adds_to=("logits",)
)
kept_tile = Launch(tiles.kept_tile, Blocks(1, 2048, 4), _WIDE, ("ROWS", "COLS"), key=("cols",))
add_products = Launch(
    tiles.add_products, Blocks(32, 64, 4), (Blocks(64, 64, 4), Blocks(32, 128, 8)), ("COLS",), key=("cols",),
    adds_to=("out",), interpreted=Blocks(128, 256),
)  # fmt: skip
open_rows = Launch(
    rows.open_rows, Blocks(1, 1024, 4), (Blocks(4, 512, 4), Blocks(1, 2048, 8)), key=("hidden",)
)
finish_rows = Launch(rows.finish_rows, Blocks(128), interpreted=Blocks(64))
coefficients = Launch(rows.coefficients, Blocks(128), interpreted=Blocks(64))
compact = Launch(rows.compact, Blocks(1024, None, 8), grid=(None,), interpreted=Blocks(64))
scaled_rows = Launch(hidden.scaled_rows, Blocks(1, 1024), _FLAT, ("ROWS", "COLS"), key=("hidden",))
close_product = Launch(
    hidden.close_product, Blocks(1, 1024), _FLAT, ("ROWS", "COLS"), key=("hidden",), adds_to=("product",)
)
store_hidden = Launch(
    hidden.store_hidden, Blocks(1, 1024), _FLAT, ("ROWS", "COLS"), key=("hidden",), adds_to=("product", "out")
)
add_rows = Launch(
    hidden.add_rows, Blocks(8, 512), (Blocks(16, 256), Blocks(4, 1024)), (None, "COLS"), key=("hidden",),
    adds_to=("out",), interpreted=Blocks(8, 256),
)  # fmt: skip


def launches() -> Iterator[tuple[str, Launch]]:
    """Every kernel of the steps by name."""
    return ((name, found) for name, found in globals().items() if isinstance(found, Launch))
