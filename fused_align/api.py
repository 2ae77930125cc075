"""align_loss: the whole pipeline. Read this first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from . import backends
from .batch import Batch
from .humanline import Humanline
from .linear.fused import FusedLoss, item_sizes
from .linear.logp import autocast_dtype, check_head, check_target, linear_logp
from .linear.ops import make_problem
from .linear.passes import Head
from .linear.plan import choose
from .losses.base import Loss, Objective


class AlignOutput(NamedTuple):
    """loss: scalar, differentiable. metrics: detached scalars under the trainers' usual names."""

    loss: Tensor
    metrics: dict[str, Tensor]


def align_loss(
    hidden: Tensor,  # [B, T, H] | [N, H]
    weight: Tensor,  # [V, H]
    batch: Batch,
    loss: Loss,
    *,
    humanline: Humanline | None = None,
    bias: Tensor | None = None,  # [V]
    temperature: float | Tensor = 1.0,  # target's shape
    logit_scale: float = 1.0,
    softcap: float | None = None,
    normalizer: float | Tensor | Mapping[str, float | Tensor] | None = None,
    backend: str = "auto",
    plan: str = "auto",
    precision: str = "high",
    workspace_bytes: int | None = None,
) -> AlignOutput:
    """An alignment loss straight from hidden states and the language-model head, without logits [N, V].

    hidden, weight --linear_logp--> logp --minus anchor--> log_ratio --humanline--> log_ratio --loss--> items
    --dot with weights fixed before the forward, over normalizer--> scalar.

    Args:
        hidden, weight, bias, temperature, logit_scale, softcap, backend, precision, workspace_bytes: as for
            `linear_logp`; differentiable in hidden, weight and bias. hidden[i] predicts batch.target[i].
        loss: one of `Loss.registry`, or a dataclass of your own that derives `Loss`.
        humanline: clips the log-ratio of a loss that has an anchor (arXiv 2509.24207).
        normalizer: what the sum of items is divided by instead of this batch's own count of `loss.unit`; pass
            the count over the whole optimizer step and micro-batches add up to the full batch. A dict gives
            the count per unit.
        plan: "auto", or one of `fused_align.linear.plan` by name. "single" and "window" form the gradients in
            the forward: their backward may run once, and rounds a 16-bit gradient once more unless the
            upstream gradient is a power of two.

    Returns:
        AlignOutput(loss, metrics). loss is float32 (float64 for float64 inputs). Under no_grad it
        only scores.

    Raises:
        ValueError, TypeError: shapes, dtypes or options that do not fit; a batch field that the loss needs is
            missing; humanline with a loss without an anchor; a plan that cannot serve.
    """
    _check_kinds(batch, loss, humanline)
    if batch.cu_seqlens is not None and hidden.dim() == 3 and hidden.shape[0] == 1:
        raise ValueError(
            f"align_loss: hidden must be [N, H] for a packed batch (with cu_seqlens); got "
            f"{list(hidden.shape)}. Pass hidden[0]."
        )
    check_head("align_loss", hidden, weight, bias, logit_scale, softcap, precision, workspace_bytes)
    check_target("align_loss", hidden, batch.target, temperature)
    live = batch.live()
    objective = Objective(loss, live, humanline, normalizer)
    head = Head(weight, bias, logit_scale, softcap, autocast_dtype(hidden, weight), precision == "bf16")
    flat = hidden.reshape(-1, hidden.shape[-1])
    grad = torch.is_grad_enabled()
    problem = make_problem(
        head,
        flat,
        live.rows.numel(),
        grad_hidden=grad and hidden.requires_grad,
        grad_head=grad and (weight.requires_grad or (bias is not None and bias.requires_grad)),
        coupling=loss.item,
        longest=1 if loss.item == "token" else max(item_sizes(live, loss.item), default=1),
    )
    backend = backends.pick(backend, hidden.device)
    chosen = choose(problem, plan, workspace_bytes)
    per_row = temperature.detach().reshape(-1) if isinstance(temperature, Tensor) else temperature
    if chosen.name in ("single", "window") and backend != "eager":
        value, logp = FusedLoss.apply(flat, weight, bias, per_row, head, objective, chosen, problem)
    else:
        every = linear_logp(
            flat, weight, batch.target.reshape(-1), bias=bias, temperature=per_row, logit_scale=logit_scale,
            softcap=softcap, backend=backend, plan=chosen.name, precision=precision,
            workspace_bytes=workspace_bytes,
        )  # fmt: skip
        logp = every[live.rows]
        value = objective.total(logp, live, objective.weights)
    return AlignOutput(value, objective.metrics(logp))


def _check_kinds(batch: object, loss: object, humanline: object) -> None:
    """Raises TypeError with a sentence for what is no batch, loss or clip at all."""
    if not isinstance(batch, Batch):
        raise TypeError(
            f"align_loss: batch must be a fused_align.Batch; got a {type(batch).__name__}. Wrap the targets: "
            "Batch(target, ...)."
        )
    if not isinstance(loss, Loss):
        kind = (
            f"the class {loss.__name__}" if isinstance(loss, type) else f"{loss!r}, a {type(loss).__name__}"
        )
        raise TypeError(f"align_loss: loss must be a fused_align.Loss object, such as DPO(); got {kind}.")
    if humanline is not None and not isinstance(humanline, Humanline):
        raise TypeError(f"align_loss: humanline must be a fused_align.Humanline or None; got {humanline!r}.")
