"""Dense logits and torch's own autograd: the oracle the other backends are held against.

Holds several tensors [N, V]. Never chosen by backend="auto".
"""

from __future__ import annotations

import torch
from torch import Tensor


def why_not(device: torch.device) -> str | None:
    """None: dense torch runs anywhere, memory permitting."""
    return None


def dense_stats(
    hidden: Tensor,  # [n, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    target: Tensor,  # [n], all live
    temperature: float | Tensor,  # [n]
    logit_scale: float,
    softcap: float | None,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """logp, entropy, lse, average (the mean logit) and squares (log sum_v p_v^2), [n] each in `dtype`.

    Of full logits; differentiable through autograd.
    """
    logits = hidden.to(dtype) @ weight.to(dtype).t()
    if bias is not None:
        logits = logits + bias.to(dtype)
    logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits / (temperature[:, None] if isinstance(temperature, Tensor) else temperature)
    lse = logits.logsumexp(1)
    logps = logits - lse[:, None]
    entropy = -(logps.exp() * logps.clamp(min=torch.finfo(dtype).min)).sum(1)  # 0 for what a bias forbids
    return {
        "logp": logps.gather(1, target[:, None]).squeeze(1),
        "entropy": entropy,
        "lse": lse,
        "average": logits.mean(1),
        "squares": (2 * logps).logsumexp(1),
    }
