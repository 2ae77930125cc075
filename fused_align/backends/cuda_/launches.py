"""How arguments cross to the launch functions of the compiled module: addresses, sizes, a stream."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .. import cuda_
from ..codes import RatioOf
from ..kernel_losses import LossLaunch

#: the element types, by the numbers of csrc/launches.h
TYPES = {
    torch.float64: 1, torch.float32: 2, torch.bfloat16: 3, torch.float16: 4, torch.int64: 5,
    torch.int32: 6, torch.uint8: 7, torch.bool: 7,
}  # fmt: skip
BUSY = 4  # blocks for each multiprocessor, with which a GPU has enough to do
STRIP = 8192  # the fewest columns of a row that are worth a block of their own
SUMS = 4  # that a strip of a row has
TOKENS = 1024  # the fewest tokens of a sequence that are worth a block of their own


def launch(name: str, device: torch.device, *args: object, **named: object) -> None:
    """Calls a launch function, on the current stream of a device, where all tensors have to be.

    Raises:
        RuntimeError: the kernel could not be launched; the message names it.
        ValueError, TypeError: a tensor of another device, or of a type that no kernel takes.
    """
    function = getattr(cuda_.module, name)
    crossed = [_crossed(name, x, device) for x in args]
    options = {key: _crossed(name, x, device) for key, x in named.items()}
    if device.type != "cuda":
        function((0, 0), *crossed, **options)
        return
    with nullcontext() if device.index == torch.cuda.current_device() else torch.cuda.device(device):
        function((device.index, torch.cuda.current_stream().cuda_stream), *crossed, **options)


def _crossed(name: str, x: object, device: torch.device) -> object:
    if isinstance(x, torch.dtype):
        return TYPES[x]
    if not isinstance(x, Tensor):
        return x
    if x.device != device:
        raise ValueError(
            f"{name}: all tensors must be on {device}; got {x.dtype} {list(x.shape)} on {x.device}. Move it."
        )
    if x.dtype not in TYPES:
        raise TypeError(
            f"{name}: its kernel takes float64, float32, bfloat16, float16, int64, int32, uint8 and bool; "
            f"got {x.dtype}."
        )
    return x.data_ptr(), TYPES[x.dtype]


def _step(name: str) -> Callable[..., None]:
    """The launch of a step's kernel; its arguments are in the order of its launch function."""

    def call(sizes: tuple[int, ...], *args: object, **fixed: object) -> None:
        if 0 not in sizes:
            device = next(x.device for x in args if isinstance(x, Tensor))
            launch(name, device, *args, *fixed.values())

    return call


open_rows = _step("open_rows")
finish_rows = _step("finish_rows")
coefficients = _step("coefficients")
compact = _step("compact")
add_products = _step("add_products")
scaled_rows = _step("scaled_rows")
close_product = _step("close_product")
store_hidden = _step("store_hidden")
add_rows = _step("add_rows")
_exp_tile, _grad_tile, _kept_tile = map(_step, ("exp_tile", "grad_tile", "kept_tile"))


def exp_tile(
    sizes: tuple[int, ...],
    logits: Tensor,  # [r, v]
    out: Tensor | None,
    product: Tensor | None,
    bias: Tensor | None,  # [v]
    target: Tensor,
    gain: Tensor,
    ref: Tensor,
    moved: Tensor | None,
    *others: Any,
    **fixed: object,
) -> None:
    rows, cols = logits.shape
    # what watches needs a row's maximum before its sums: one block sees all of it
    count = 1 if moved is not None else strips(rows, cols, logits.device)
    partials = counters = None
    if count > 1:
        partials = logits.new_empty(rows, count, SUMS, dtype=torch.float64)
        counters = torch.zeros(rows, dtype=torch.int32, device=logits.device)
    bias = None if bias is None else bias.to(ref.dtype)
    _exp_tile(
        sizes, logits, out, product, bias, target, gain, ref, moved, *others, *fixed.values(), partials,
        counters, count,
    )  # fmt: skip


def grad_tile(
    sizes: tuple[int, ...],
    logits: Tensor,  # [r, v]
    out: Tensor,
    bias: Tensor | None,  # [v]
    target: Tensor,
    gain: Tensor,
    *others: Any,
    **fixed: object,
) -> None:
    bias = None if bias is None else bias.to(gain.dtype)
    rows, cols = logits.shape
    count = strips(rows, cols, logits.device)
    _grad_tile(sizes, logits, out, bias, target, gain, *others, *fixed.values(), count)


def kept_tile(sizes: tuple[int, ...], kept: Tensor, out: Tensor, *others: Any, **fixed: object) -> None:
    rows, cols = out.shape
    _kept_tile(sizes, kept, out, *others, *fixed.values(), strips(rows, cols, out.device))


def strips(rows: int, cols: int, device: torch.device) -> int:
    """Into how many strips rows of a tile are cut: several where few long ones would not keep a GPU busy."""
    wanted = -(-BUSY * multiprocessors(device) // max(rows, 1))
    return max(1, min(wanted, cols // STRIP))


@cache
def multiprocessors(device: torch.device) -> int:
    """As many as a GPU has; a handful for a CPU, where tests run the kernels."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def loss(one: LossLaunch, device: torch.device) -> None:
    arguments, pieces = one.arguments, _pieces(one, device)
    if pieces > 1:
        programs = one.programs * pieces
        partials = arguments["partials"].new_empty(arguments["K"], programs)
        arguments = {**arguments, "pieces": pieces, "programs": programs, "partials": partials}
    launch(one.kernel, device, **arguments)


def _pieces(one: LossLaunch, device: torch.device) -> int:
    """How many blocks share a sequence: several where they are few and long, and their tokens apart."""
    given = one.arguments
    if one.kernel != "policy_loss" or given["RATIO"] != RatioOf.TOKEN or given["WHOLE"]:
        return 1
    tokens = given["logp"].numel() // one.programs
    return max(1, min(-(-tokens // TOKENS), multiprocessors(device) // one.programs))
