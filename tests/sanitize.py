"""Launches every kernel once or more at small sizes: compute-sanitizer python tests/sanitize.py

Sizes are multiples of nothing, so that reads and writes past an edge would show. Without names of backends
those run that can. Where there is no GPU, `cuda` runs under the emulation, with AddressSanitizer in the
environment `emulated.sanitized()`.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any
from unittest.mock import patch

import emulated
import kernels
import torch
from torch import Tensor

import fused_align as fa
from fused_align.backends import cuda_

S, T, H, V = 6, 11, 72, 1031
LOSSES = (fa.SFT(label_smoothing=0.1), fa.DPO(wpo=True), fa.DPO(), fa.MADPO(), fa.KTO(), fa.GRPO(), fa.GSPO())
DTYPES = (torch.float32, torch.bfloat16)
Call = Callable[[], list[Tensor]]  # -> all that it computes


def calls(
    backend: str, device: torch.device, dtypes: Sequence[torch.dtype] = DTYPES
) -> Iterator[tuple[str, Call]]:
    """Calls of the package by name, that together launch every kernel."""
    heads = ({}, {"bias": torch.randn(V), "softcap": 5.0, "temperature": 0.5 + torch.rand(S, T)})
    # static: no look at what was found, so every walk watches; cut: several blocks share a row, as of few
    ways = ("", "static", "cut") if backend == "cuda" else ("", "static")
    for dtype, head, way in itertools.product(dtypes, heads, ways):
        head = {key: x.to(device) if isinstance(x, Tensor) else x for key, x in head.items()}
        options = {"backend": backend, "max_live": S * T if way == "static" else None, **head}
        for name, call in _of_one_head(backend, dtype, device, options):
            yield f"{name} {dtype} {' '.join(head)} {way}", partial(_cut, call) if way == "cut" else call


def _cut(call: Call) -> list[Tensor]:
    """As if rows and sequences were long, and there were multiprocessors enough for parts of them."""
    sizes = (("launches.STRIP", 200), ("launches.TOKENS", 4), ("logits.COLUMNS", 200))
    with ExitStack() as stack:
        stack.enter_context(patch("fused_align.backends.cuda_.launches.multiprocessors", lambda device: 1000))
        for name, size in sizes:
            stack.enter_context(patch(f"fused_align.backends.cuda_.{name}", size))
        return call()


def _of_one_head(
    backend: str, dtype: torch.dtype, device: torch.device, options: dict[str, Any]
) -> Iterator[tuple[str, Call]]:
    batch = _batch(device)
    target, bias = batch.target, options.get("bias")
    operands = [
        x.to(device, dtype) for x in (torch.randn(S, T, H), torch.randn(V, H) / 4, torch.randn(S, T, V))
    ]
    hidden, weight, logits = operands

    def leaves(frozen: bool = False) -> tuple[list[Tensor], dict[str, Any]]:
        found = [hidden.clone().requires_grad_(), weight.clone().requires_grad_(not frozen)]
        if bias is None:
            return found, options
        found.append(bias.clone().requires_grad_(not frozen))
        return found, {**options, "bias": found[2]}

    def score(plan: str) -> list[Tensor]:
        return _flat(fa.token_stats(hidden, weight, target, entropy=True, lse=True, plan=plan, **options))

    def stats(frozen: bool, entropy: bool) -> list[Tensor]:
        found, head = leaves(frozen)
        out = fa.token_stats(found[0], found[1], target, entropy=entropy, **head)
        (out.logp if out.entropy is None else out.logp + out.entropy).sum().backward()
        return _flat(out) + _grads(found)

    def loss(which: fa.Loss) -> list[Tensor]:
        found, head = leaves()
        out = fa.align_loss(found[0], found[1], batch, which, **head)
        out.loss.backward()
        return [out.loss.detach(), *out.metrics.values(), *_grads(found)]

    def logit_stats(overwrite: bool) -> list[Tensor]:
        leaf = logits.clone().requires_grad_()
        out = fa.stats_from_logits(leaf * 1, target, backend=backend, entropy=True, overwrite=overwrite)
        assert out.entropy is not None
        (out.logp + out.entropy).sum().backward()
        return _flat(out) + _grads([leaf])

    for plan in ("score", "fused") if backend == "triton" else ("score",):
        yield plan, partial(score, plan)
    for frozen, entropy in itertools.product((False, True), repeat=2):
        yield f"stats frozen={frozen} entropy={entropy}", partial(stats, frozen, entropy)
    for which in LOSSES:
        yield which.name, partial(loss, which)
    for overwrite in (False, True):
        yield f"logits overwrite={overwrite}", partial(logit_stats, overwrite)


def _batch(device: torch.device) -> fa.Batch:
    target = torch.randint(V, (S, T))
    target[:, ::4] = -100
    columns = {name: -7 + torch.rand(S, T) for name in ("old_logp", "ref_logp", "sampler_logp")}
    columns |= {
        "advantage": torch.randn(S), "desirable": torch.arange(S) % 2 == 0, "kl": torch.zeros(()),
        "margin": torch.randn(S // 2),
    }  # fmt: skip
    return fa.Batch(target.to(device), **{name: x.to(device) for name, x in columns.items()})


def _flat(out: fa.TokenStats) -> list[Tensor]:
    return [x.detach() for x in out if x is not None]


def _grads(leaves: list[Tensor]) -> list[Tensor]:
    return [leaf.grad for leaf in leaves if leaf.grad is not None]


def main() -> None:
    parser = argparse.ArgumentParser(description="Launches every kernel once or more at small sizes.")
    parser.add_argument("backends", nargs="*", help="triton, cuda; by default all that can run here")
    parser.add_argument("--dtypes", nargs="+", default=[str(x).removeprefix("torch.") for x in DTYPES])
    given = parser.parse_args()
    for name in given.backends or [each for each in kernels.BACKENDS if kernels.why_not(each) is None]:
        reason = kernels.why_not(name)
        if reason is not None:
            parser.error(f"{name} cannot run here: {reason}.")
        if name == "cuda" and kernels.DEVICE.type == "cpu":
            cuda_.module = emulated.load()
        torch.manual_seed(0)
        for _, call in calls(name, kernels.DEVICE, [getattr(torch, dtype) for dtype in given.dtypes]):
            call()
        if kernels.DEVICE.type == "cuda":
            torch.cuda.synchronize()
        print(f"every kernel of {name} ran on {kernels.DEVICE}")


if __name__ == "__main__":
    main()
