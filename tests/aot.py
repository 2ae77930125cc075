"""Compiles every kernel ahead of time, as it is launched for real sizes: python tests/aot.py 80 90 100

No GPU is needed. Prints one JSON line for each kernel, variant and architecture: registers, bytes of stack
and of spilled registers, bytes of shared memory, and what the code has of some instructions. It is a program
of its own because Triton decides when it is imported whether kernels are compiled or interpreted.

The kernels of the steps are recorded where they are launched: calls of the package on small CPU tensors,
whose launches are noted down instead of run, give each variant with the types, the absent arguments and the
divisibility that a GPU would see.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from inspect import signature
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import fused_align as fa
from fused_align.backends import triton_
from fused_align.backends.triton_ import tuning

_TYPES = {
    torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16",
    torch.int64: "i64", torch.int32: "i32", torch.uint8: "u8", torch.bool: "i1",
}  # fmt: skip
TOOL = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


@dataclasses.dataclass(frozen=True)
class Case:
    """One variant of a kernel; the fields are as for ASTSource and triton.compile."""

    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, int]
    attributes: dict[tuple[int, ...], Any] = dataclasses.field(default_factory=dict)
    archs: tuple[int, ...] = (80, 90, 100)

    def key(self) -> str:
        return repr((self.kernel.fn.__name__, self.types, self.constants, self.options, self.attributes))


def case(kernel: Any, arguments: dict[str, Any], options: dict[str, int]) -> Case:
    """The variant that a launch with these arguments compiles."""
    types, constants, attributes = {}, {}, {}
    plain = set(kernel.do_not_specialize or ())
    for place, (name, parameter) in enumerate(signature(kernel.fn).parameters.items()):
        value = arguments[name]
        constant = value is None or "constexpr" in str(parameter.annotation)
        constant = constant or (isinstance(value, int) and value == 1 and name not in plain)
        if constant:
            types[name], constants[name] = "constexpr", value
            continue
        types[name] = f"*{_TYPES[value.dtype]}" if isinstance(value, Tensor) else "i32"
        divisible = isinstance(value, Tensor) or value % 16 == 0
        if divisible and name not in plain:
            attributes[(place,)] = [["tt.divisibility", 16]]
    return Case(kernel, types, constants, options, attributes)


def steps() -> list[Case]:
    """Every variant of the steps' kernels that these calls launch."""
    found: dict[str, Case] = {}

    def note(launch: tuning.Launch, sizes: tuple[int, ...], *args: object, **flags: object) -> None:
        names = launch.kernel.arg_names
        arguments = dict(zip(names, args, strict=False)) | flags | launch.default.sizes()
        one = case(launch.kernel, arguments, {"num_warps": launch.default.warps})
        found.setdefault(one.key(), one)
        if launch is tuning.compact:  # what the host goes by: all rows but one have a gradient
            rows = arguments["rows"]
            arguments["order"].copy_(torch.arange(rows))
            arguments["counts"].copy_(torch.tensor([rows - 1, 0, 1]))

    usable = patch.object(triton_, "why_not", lambda device: None)
    chosen = patch.dict(os.environ, {"FUSED_ALIGN_BACKEND": "triton"})
    with usable, chosen, patch.object(tuning.Launch, "__call__", note):
        for dtype in (torch.float32, torch.bfloat16):
            _call(dtype, {})
            _call(dtype, {"bias": torch.zeros(V, dtype=dtype), "softcap": 30.0, "temperature": torch.ones(N)})
        _call(torch.bfloat16, {"precision": "bf16"})
        _call(torch.float16, {})
    return list(found.values())


N, H, V, SHAPE = 48, 64, 1024, (4, 12)


def _call(dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Statistics and losses with every gradient, and with a frozen head."""
    hidden, weight = torch.zeros(N, H, dtype=dtype), torch.zeros(V, H, dtype=dtype)
    target = torch.zeros(N, dtype=torch.int64)

    def leaves(frozen: bool) -> tuple[Tensor, Tensor]:
        if "bias" in options:
            options["bias"] = options["bias"].detach().requires_grad_(not frozen)
        return hidden.clone().requires_grad_(), weight.clone().requires_grad_(not frozen)

    for frozen, entropy, static in ((False, True, False), (True, False, False), (True, False, True)):
        h, w = leaves(frozen)
        most = N if static else None
        out = fa.token_stats(h, w, target, entropy=entropy, max_live=most, workspace_bytes=1 << 17, **options)
        ((out.logp if out.entropy is None else out.logp + out.entropy).sum()).backward()
    fa.linear_logp(hidden, weight, target, plan="score", **{**options, "bias": None})
    batch = fa.Batch(target.view(SHAPE), ref_logp=torch.zeros(SHAPE))
    if isinstance(options.get("temperature"), Tensor):
        options["temperature"] = options["temperature"].view(SHAPE)
    for loss in (fa.SFT(), fa.SFT(label_smoothing=0.1), fa.DPO(wpo=True)):
        h, w = leaves(False)
        fa.align_loss(h.view(*SHAPE, H), w, batch, loss, **options).loss.backward()


def compiled(one: Case, arch: int) -> dict[str, Any]:
    """What the compiler reports of a variant on an architecture."""
    source = ASTSource(one.kernel, one.types, one.constants, one.attributes)
    binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=one.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = subprocess.run([TOOL, "-res-usage", file.name], capture_output=True, text=True, check=True)
    report = usage.stdout + usage.stderr
    numbers = {name.lower(): int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    assert set(numbers) == {"reg", "stack", "local"}, report
    ptx = binary.asm["ptx"]
    return {
        "kernel": one.kernel.fn.__name__,
        "arch": arch,
        **numbers,
        "shared": binary.metadata.shared,
        "wide": len(re.findall(r"\.v4\.b32|\.v2\.b64|\.v4\.f32|\.b128", ptx)),
        "wgmma": "wgmma.mma_async" in ptx,
        "tma": "cp.async.bulk.tensor" in ptx,
        "variant": one.key(),
    }


def every_case() -> Iterator[Case]:
    import aot_losses
    import aot_score

    yield from steps()
    for module in (aot_losses, aot_score):
        yield from module.aot_cases()


def main(archs: list[int]) -> None:
    for one in every_case():
        for arch in archs:
            if arch in one.archs:
                print(json.dumps(compiled(one, arch)), flush=True)


if __name__ == "__main__":
    main([int(arch) for arch in sys.argv[1:]] or [80, 90, 100])
