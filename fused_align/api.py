"""align_loss: the whole pipeline. Read this first."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import backends
from .backends.operands import Head
from .batch import Batch
from .humanline import Humanline, HumanlineSampling, RatioClip
from .linear.fused import Call, fused_loss, item_sizes, kernel_loss
from .linear.logp import autocast_dtype, check_call, waist
from .linear.ops import make_problem
from .linear.plan import COMPLETE, Problem, choose
from .losses.base import Loss, Normalizer, Objective, coarsest
from .rows import Rows


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
    humanline: RatioClip | None = None,
    bias: Tensor | None = None,  # [V]
    temperature: float | Tensor = 1.0,  # target's shape
    logit_scale: float = 1.0,
    softcap: float | None = None,
    normalizer: Normalizer = None,
    grad_scale: float | None = None,
    backend: str = "auto",
    plan: str = "auto",
    precision: str = "high",
    workspace_bytes: int | None = None,
    max_live: int | None = None,
    main_grad: Tensor | None = None,  # [V, H]
) -> AlignOutput:
    """An alignment loss straight from hidden states and the language-model head, without logits [N, V].

    hidden, weight --linear_logp--> logp --minus anchor--> log_ratio --humanline--> log_ratio --loss--> items
    --dot with weights fixed before the forward, over normalizer--> scalar.

    Args:
        hidden ... main_grad, where not below: as for `linear_logp`; hidden[i] predicts batch.target[i].
        loss: one of `Loss.registry`, a `Sum` of some, or a dataclass of your own that derives `Loss`.
        humanline: clips the log-ratio of a loss that has an anchor (arXiv 2509.24207).
        normalizer: what the sum is divided by instead of this batch's own count of `loss.unit`: that of the
            whole optimizer step, so that micro-batches add up. Several units take a dict (`loss.counts`).
        grad_scale: what the loss will be multiplied by before backward (a loss scaler's factor, 1 over the
            accumulation steps), where that is known: gradients formed in the forward are scaled once, then.
            With main_grad such plans need it (1.0 if nothing multiplies the loss), and add to it in the
            forward. A CPU checks the promise in backward.
        plan: "auto", or one of `fused_align.linear.plan` by name. "single" and "window" form the gradients in
            the forward: their backward may run once, and rounds a 16-bit gradient once more unless the
            upstream gradient is a power of two.

    Returns:
        AlignOutput(loss, metrics). loss is float32 (float64 for float64 inputs). No_grad only scores.

    Raises:
        ValueError, TypeError: shapes, dtypes or options that do not fit; a batch field that the loss needs is
            missing; humanline with a loss without an anchor; a plan that cannot serve.
    """
    _check_kinds(batch, loss, humanline)
    check_call(
        "align_loss", hidden, weight, batch.target, bias=bias, temperature=temperature,
        logit_scale=logit_scale, softcap=softcap, precision=precision, workspace_bytes=workspace_bytes,
        max_live=max_live, main_grad=main_grad, packed=batch.cu_seqlens is not None,
    )  # fmt: skip
    live = batch.live(max_live)
    objective = Objective(loss, live, humanline, normalizer)
    backend = backends.pick(backend, hidden.device)
    operand = autocast_dtype(hidden, weight)
    head = Head(weight, bias, logit_scale, softcap, operand, precision == "bf16", backend)
    flat = hidden.reshape(-1, hidden.shape[-1])
    problem = loss_problem(
        head, flat, live, loss, humanline, main_grad=main_grad is not None, scale_known=grad_scale is not None
    )
    chosen = choose(problem, plan, workspace_bytes)
    temper = temperature.detach().reshape(-1) if isinstance(temperature, Tensor) else temperature
    kernel = head.steps.loss_kernel(loss, humanline)
    if chosen.name in COMPLETE and backend != "eager":
        call = Call(head, objective, chosen, problem, temper, main_grad, grad_scale, kernel)
        return AlignOutput(*fused_loss(flat, weight, bias, call))
    stats = waist(
        flat, weight, batch.target.reshape(-1), bias, temper, logit_scale, softcap, backend, chosen.name,
        precision, workspace_bytes, max_live, main_grad,
        stats=[name for name in loss.reads if name != "lse"], learnt=loss.learnt,
    )  # fmt: skip
    if kernel is not None:  # it reads the batch where it lies
        return AlignOutput(*kernel_loss(kernel, stats["logp"], batch, objective))
    rows = Rows(live.rows, flat.shape[0], live.valid)
    return AlignOutput(*objective.evaluate({name: rows.take(stats[name]) for name in ("logp", *loss.reads)}))


def loss_problem(
    head: Head,
    hidden: Tensor,  # [N, H]
    live: Batch,
    loss: Loss,
    humanline: RatioClip | None,
    *,
    main_grad: bool,
    scale_known: bool,
) -> Problem:
    """What the planner is to know of a loss on a batch."""
    grad = torch.is_grad_enabled()
    grad_hidden = grad and hidden.requires_grad
    grad_head = grad and any(t is not None and t.requires_grad for t in (head.weight, head.bias))
    static = live.valid is not None
    coupling = coarsest([loss.item, "token" if humanline is None else humanline.item])
    whole = coupling in ("sequence", "pair") and not static and (grad_hidden or grad_head)
    return make_problem(
        head,
        hidden,
        live.rows.numel(),
        stats=loss.reads,
        learnt=loss.learnt,
        grad_hidden=grad_hidden,
        grad_head=grad_head,
        coupling=coupling,
        sizes=tuple(item_sizes(live, coupling)) if whole else (),
        main_grad=main_grad,
        scale_known=scale_known,
        static=static,
        sparse=loss.sparse(humanline),
    )


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
    if humanline is not None and not isinstance(humanline, (Humanline, HumanlineSampling)):
        raise TypeError(
            "align_loss: humanline must be a fused_align.Humanline, a HumanlineSampling or None; got "
            f"{humanline!r}."
        )
