"""What Triton's and CUDA's kernels over logits that exist already have in common: checks and outputs."""

from __future__ import annotations

import torch
from torch import Tensor

from .torch_logits import LogitStats


def new_stats(logits: Tensor, entropy: bool) -> LogitStats:
    """Places for the statistics of every row of logits [M, V]."""
    work = torch.float64 if logits.dtype == torch.float64 else torch.float32
    logp, lse, largest, total = (logits.new_empty(logits.shape[0], dtype=work) for _ in range(4))
    return LogitStats(logp, lse, torch.empty_like(logp) if entropy else None, largest, total)


def check_columns(tensor: Tensor, name: str) -> None:
    if tensor.dim() != 2 or (tensor.stride(1) != 1 and tensor.shape[1] > 1):
        raise ValueError(
            f"{name} must be [M, V] with adjacent columns; got {list(tensor.shape)} with strides "
            f"{list(tensor.stride())}. Call .contiguous()."
        )


def check_gradient(logits: Tensor, out: Tensor, dentropy: Tensor | None, stats: LogitStats) -> None:
    check_columns(logits, "logits")
    check_columns(out, "out")
    if dentropy is not None and stats.entropy is None:
        raise ValueError(
            "logit_gradient: dentropy needs the entropy among the stats; ask for it (entropy=True)."
        )
