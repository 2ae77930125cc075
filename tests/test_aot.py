"""Every kernel, compiled for three architectures with the block sizes of its default launch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton", minversion="3.6", reason="needs Triton 3.6")

#: bytes of shared memory that one block may have
SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
#: bytes of stack by kernel and architecture with Triton 3.6, whose ptxas keeps one register of the variant
#: that watches there, outside of the loops
SPILLS_BEFORE_3_7 = {("exp_tile", 80): 8}
#: kernels whose rows are long and adjacent: threads move 16 bytes at a time
STREAMS = {
    "exp_tile",
    "grad_tile",
    "kept_tile",
    "scaled_rows",
    "store_hidden",
    "close_product",
    "_forward_kernel",
}
#: kernels of a step or a loss that must be among those compiled
EXPECTED = STREAMS | {
    "open_rows", "finish_rows", "coefficients", "compact", "add_products", "add_rows", "policy_loss",
    "preference_loss", "judged_loss", "_backward_kernel", "_score_kernel", "_combine_kernel",
}  # fmt: skip


@pytest.mark.parametrize("arch", sorted(SHARED))
def test_compiles_without_spills(arch: int, tmp_path: Path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    program = Path(__file__).with_name("aot.py")
    run = subprocess.run(
        [sys.executable, program, str(arch)], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-4000:]
    found: list[dict[str, Any]] = [json.loads(line) for line in run.stdout.splitlines()]
    assert {one["kernel"] for one in found} >= EXPECTED
    old = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)
    for one in found:
        allowed = SPILLS_BEFORE_3_7.get((one["kernel"], arch), 0) if old else 0
        assert one["stack"] <= allowed and one["local"] == 0, f"spills: {one}"
        assert one["shared"] <= SHARED[arch], one
    for name in STREAMS:
        assert any(one["wide"] for one in found if one["kernel"] == name), f"{name} moves less than 16 bytes"
    score = [one for one in found if one["kernel"] == "_score_kernel"]
    if arch == 90:
        assert any(one["wgmma"] and one["tma"] for one in score)
