"""The kernels over materialised logits and the scoring kernel as they are launched, for tests/aot.py."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from aot import Case

from fused_align.backends.triton_ import logits, score

_POINTERS = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}
_ALIGNED = [["tt.divisibility", 16]]


def aot_cases() -> Iterator[Case]:
    """Every default configuration, with and without what makes a kernel larger."""
    for dtype, entropy in itertools.product(_POINTERS, (False, True)):
        for kernel in (logits._forward_kernel, logits._backward_kernel):
            yield _logits(kernel, dtype, entropy, True)
            if dtype == "bf16" and not entropy:
                yield _logits(kernel, dtype, entropy, False)
    for (arch, size, kind), sizes in score.CONFIGS.items():
        if size == 4 and kind in ("bias", "odd"):
            continue  # the same sizes as the others
        for capped in (False, True):  # and one gain for each row with a cap
            entropy = {"plain": False, "entropy": True}.get(kind, capped)
            yield _score(arch, "bf16" if size == 2 else "fp32", kind, sizes, capped, capped, entropy)
    for entropy in (False, True):
        yield _combine(entropy)


def _case(
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    aligned: set[str],
    options: dict[str, int],
    archs: tuple[int, ...] = (80, 90, 100),
) -> Case:
    names = kernel.arg_names
    types = {name: "constexpr" if name in constants else types[name] for name in names}
    constants = {name: value for name, value in constants.items() if name in names}
    attributes = {
        (names.index(name),): _ALIGNED for name in names if name in aligned and name not in constants
    }
    return Case(kernel, types, constants, options, attributes, archs)


def _logits(kernel: Any, dtype: str, entropy: bool, aligned: bool) -> Case:
    """Gradients of lse and entropy come together here; the temperature is a number."""
    wide = _POINTERS[dtype]
    work = torch.float64 if wide == torch.float64 else torch.float32
    vectors = ("logp", "lse", "entropy", "largest", "total", "dlogp", "dlse", "dentropy", "inverse")
    types = {name: "*fp64" if work == torch.float64 else "*fp32" for name in vectors}
    types |= {"logits": f"*{dtype}", "out": f"*{dtype}", "target": "*i64", "scalar": "fp32"}
    types |= dict.fromkeys(("rows", "vocab", "stride", "out_stride"), "i32")
    rows, cols, warps = logits.BLOCKS[wide.itemsize]
    constants: dict[str, Any] = {"ROWS": rows, "COLS": cols, "FLOOR": torch.finfo(work).min, "inverse": None}
    if not entropy:
        constants |= {"entropy": None, "dentropy": None, "dlse": None}
    same = {"logits", "out"} | ({"vocab", "stride", "out_stride"} if aligned else set())
    return _case(kernel, types, constants, same, {"num_warps": warps})


def _score(
    arch: int, dtype: str, kind: str, sizes: score.Config, capped: bool, per_row: bool, entropy: bool
) -> Case:
    by_tma = arch >= 90 and kind != "odd"
    types = {"x": f"*{dtype}", "weight": f"*{dtype}", "bias": f"*{dtype}", "target": "*i64"}
    if by_tma:
        types["x"] = f"tensordesc<{dtype}[{sizes.rows}, {sizes.depth}]>"
        types["weight"] = f"tensordesc<{dtype}[{sizes.cols}, {sizes.depth}]>"
    types |= dict.fromkeys(("ref", "gain", "totals", "refs"), "*fp32")
    types |= dict.fromkeys(("pivot", "moments"), "*fp64") | dict.fromkeys(("inner", "scalar"), "fp32")
    types |= dict.fromkeys(("n", "vocab", "hidden", "x_stride", "weight_stride", "groups"), "i32")
    hidden = sizes.depth * 7 if kind != "odd" else sizes.depth * 7 + 3
    constants = score._constants(sizes, 4, capped, by_tma, hidden)
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
    constants["IN_PYTHON"] = False
    if kind not in ("bias", "odd"):
        constants["bias"] = None
    if not per_row:
        constants["gain"] = None
    if not entropy:
        constants |= {"pivot": None, "moments": None}
    aligned = {"bias", "vocab"} if kind != "odd" else set()
    if kind != "odd":
        aligned |= {"hidden", "x_stride", "weight_stride"} | (set() if by_tma else {"x", "weight"})
    return _case(score._score_kernel, types, constants, aligned, options, (arch,))


def _combine(entropy: bool) -> Case:
    types: dict[str, str] = {}
    types |= dict.fromkeys(("totals", "refs", "start", "out_total", "out_ref"), "*fp32")
    types |= dict.fromkeys(("moments", "pivot", "out_moment", "out_pivot"), "*fp64")
    types |= dict.fromkeys(("n", "groups"), "i32")
    constants: dict[str, Any] = {"ROWS": score._COMBINE["ROWS"]}
    if not entropy:
        constants |= dict.fromkeys(("moments", "pivot", "out_moment", "out_pivot"))
    return _case(score._combine_kernel, types, constants, set(), {"num_warps": score._COMBINE["num_warps"]})
