"""Per-token statistics of logits that exist already: one read forward, one read and one write backward.

`torch_logits` has the formulas, csrc/online.cuh their arithmetic, csrc/logits.cu the kernels. Here `largest`
is the largest logit as it stands in memory, before the temperature; `total` is against it all the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernel_steps import dense
from ..logit_steps import check_columns, check_gradient, new_stats
from ..torch_logits import LogitStats
from .launches import launch

# Columns of a block. A row of more is shared by several, for few rows of a large vocabulary would leave most
# of a GPU idle. By the columns alone, so that a row's sums do not depend on how many other rows there are.
COLUMNS = 32768
FIELDS = 3  # of the partial sums of a block: Online of csrc/online.cuh


def logit_stats(
    logits: Tensor,  # [M, V], rows any stride apart
    target: Tensor,  # [M] int64
    inverse: Tensor | None,  # [M], 1 / temperature
    scalar: float,  # 1 / temperature where inverse is None
    *,
    entropy: bool = False,
) -> LogitStats:
    """logp, lse, entropy (or None), and what the backward needs besides, of every row; 0 of ignored ones.

    logits are float64, float32, bfloat16 or float16; they are read once, ignored rows not at all. A target
    outside [0, V) gives a logp of NaN.
    """
    check_columns(logits, "logits")
    stats = new_stats(logits, entropy)
    rows, vocab = logits.shape
    if not rows:
        return stats
    parts = _parts(vocab)
    launch(
        "logit_stats",
        logits.device,
        logits,
        target.contiguous(),
        dense(inverse),
        stats.logp,
        stats.lse,
        stats.entropy,
        stats.largest,
        stats.total,
        stats.logp.new_empty(rows, parts, FIELDS) if parts > 1 else None,
        torch.zeros(rows, dtype=torch.int32, device=logits.device) if parts > 1 else None,
        float(scalar),
        rows,
        vocab,
        logits.stride(0),
        parts,
    )
    return stats


def logit_gradient(
    dlogp: Tensor,  # [M]
    dlse: Tensor | None,  # [M]
    dentropy: Tensor | None,  # [M]
    logits: Tensor,  # [M, V]
    target: Tensor,  # [M] int64
    stats: LogitStats,
    inverse: Tensor | None,  # [M]
    scalar: float,
    *,
    out: Tensor,  # [M, V]
) -> None:
    """Writes the gradient of the logits to out, which may be the logits themselves.

    Rows that are ignored, or whose coefficients are all 0, are not read and get zeros.
    """
    check_gradient(logits, out, dentropy, stats)
    rows, vocab = logits.shape
    if not rows:
        return
    launch(
        "logit_gradient",
        logits.device,
        dense(dlogp),
        dense(dlse),
        dense(dentropy),
        logits,
        target.contiguous(),
        stats.logp,
        None if dentropy is None else stats.entropy,
        stats.largest,
        stats.total,
        dense(inverse),
        out,
        float(scalar),
        rows,
        vocab,
        logits.stride(0),
        out.stride(0),
        _parts(vocab),
    )


def _parts(vocab: int) -> int:
    """Blocks that share a row."""
    return -(-vocab // COLUMNS)
