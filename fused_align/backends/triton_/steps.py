"""The steps as Triton kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..kernel_steps import KernelSteps, inner
from ..operands import Chunk, Head
from . import score, tuning
from .logits import logit_gradient, logit_stats

if TYPE_CHECKING:
    from ...linear.plan import Problem


class TritonSteps(KernelSteps):
    logit_stats = staticmethod(logit_stats)
    logit_gradient = staticmethod(logit_gradient)

    def fused_score(self, head: Head, chunk: Chunk) -> None:
        assert chunk.x is not None
        chunk.ref, chunk.total, chunk.moment, chunk.pivot = score.fused_score(
            chunk.x, head.weight, head.bias, chunk.target, chunk.ref, inner=inner(head) or 1.0,
            gain=chunk.gain, capped=head.softcap is not None, entropy=chunk.moment is not None,
            pivot=chunk.pivot,
        )  # fmt: skip

    def why_not_fused(self, problem: Problem) -> str | None:
        x, weight = problem.operand or problem.hidden_dtype, problem.weight_dtype
        if torch.version.hip is not None:
            return "fused has no sizes for AMD's GPUs"
        if problem.squares or (problem.average and problem.capped):
            return "fused sums no more than log-probs and entropies need"
        if x != weight or weight == torch.float64:
            return f"fused multiplies operands of one dtype, and not float64; got {x} and {weight}"
        if problem.on_cpu and x == torch.float16:  # a CPU's float16 products are made in float32
            return "fused multiplies float16 on a GPU only"
        if not problem.adjacent:
            return "fused takes hidden and weight with adjacent columns"
        return None

    def fused_bytes(self, problem: Problem, rows: int) -> int:
        return score.partial_bytes(rows, problem.vocab, problem.device, problem.weight_dtype, problem.entropy)


STEPS = TritonSteps(tuning)
