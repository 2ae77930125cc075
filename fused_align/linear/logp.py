"""The waist: per-token log-probabilities of a linear head, differentiable, without logits [N, V].

`linear_logp` and `token_stats` validate, then run one forward custom op; autograd runs one backward (ops.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..backends.eager import dense_stats
from ..backends.operands import STATS, work_dtype
from ..batch import IGNORE_INDEX
from ..rows import Rows
from . import ops
from .plan import check_plan

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class TokenStats(NamedTuple):
    """Per-token results, each [...] in nats, 0 where ignored; None where not asked for."""

    logp: Tensor
    entropy: Tensor | None
    lse: Tensor | None


def linear_logp(
    hidden: Tensor,  # [..., H]
    weight: Tensor,  # [V, H]
    target: Tensor,  # [...] int64
    *,
    bias: Tensor | None = None,  # [V]
    temperature: float | Tensor = 1.0,  # [...]
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = IGNORE_INDEX,
    backend: str = "auto",
    plan: str = "auto",
    precision: str = "high",
    workspace_bytes: int | None = None,
    max_live: int | None = None,
    main_grad: Tensor | None = None,  # [V, H]
) -> Tensor:
    """log p(target | hidden) of a linear head, per token, in nats; logits [N, V] never exist.

    a = hidden @ weight.T + bias; z = softcap * tanh(logit_scale * a / softcap) / temperature (no tanh without
    softcap); logp = z[target] - logsumexp(z). hidden[i] predicts target[i]: shift first.

    Args:
        hidden, weight, bias: float64, float32, bfloat16 or float16, and they may differ. Differentiable.
            Under autocast the operands are rounded to its dtype, as torch's linear would.
        target: positions equal to `ignore_index` cost nothing and give 0 and no gradient.
        temperature: one number, or one per token; positive; not differentiable.
        backend: "auto" | "triton" | "torch" | "eager" (dense; the oracle); see `fused_align.backends`.
        plan: "auto" | "score" | "fused" | "jacobian" | "recompute"; see `fused_align.linear.plan`.
        precision: "high": float32 logits whatever the operands; "bf16": the 16-bit GEMM's rounded output.
        workspace_bytes: bound on scratch memory, beyond inputs and outputs; "jacobian" also keeps a float32
            product of hidden's shape for the backward. A budget below the smallest tile is raised to it.
            Default: 256 MiB on a CPU. (A hidden that can't be viewed as [N, H] is copied first: instead of
            hidden[:, :-1] pass all of it, with an ignored last target, as `Batch.from_labels` makes it.)
        max_live: a bound on the number of targets that are not ignored. With it nothing is read back from a
            GPU: rows are padded to that number, and none is dropped for a coefficient of 0. More live targets
            raise on a CPU; on a GPU those beyond are NaN.
        main_grad: [V, H] float32 (float64 for float64 inputs): the backward adds the weight's gradient to it,
            and returns none for the weight. (A compiled function takes its backward before its next call.)

    Returns:
        logp [...] float32; float64 if hidden or weight is. Gradients come in their inputs' dtypes; that of
        the weight is accumulated in float32 and rounded once.

    Raises:
        ValueError, TypeError: shapes, dtypes or options that do not fit; on a CPU also targets outside [0, V)
            (on CUDA such a row is NaN: reading targets would stall the device).
    """
    return _stats(
        "linear_logp", hidden, weight, target, bias, temperature, logit_scale, softcap, ignore_index,
        backend, plan, precision, workspace_bytes, max_live, main_grad, entropy=False, lse=False,
    ).logp  # fmt: skip


def token_stats(
    hidden: Tensor,  # [..., H]
    weight: Tensor,  # [V, H]
    target: Tensor,  # [...] int64
    *,
    bias: Tensor | None = None,  # [V]
    temperature: float | Tensor = 1.0,  # [...]
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = IGNORE_INDEX,
    backend: str = "auto",
    plan: str = "auto",
    precision: str = "high",
    workspace_bytes: int | None = None,
    max_live: int | None = None,
    main_grad: Tensor | None = None,  # [V, H]
    entropy: bool = False,
    lse: bool = False,
) -> TokenStats:
    """`linear_logp` with, from the same pass, the entropy of the next-token distribution and the logsumexp.

    Same arguments and errors. All three outputs are differentiable, [...] in nats and 0 where ignored. The
    entropy's gradient needs the logits once more, so with it only plan "recompute" serves.
    """
    return _stats(
        "token_stats", hidden, weight, target, bias, temperature, logit_scale, softcap, ignore_index,
        backend, plan, precision, workspace_bytes, max_live, main_grad, entropy=entropy, lse=lse,
    )  # fmt: skip


def _stats(
    who: str,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    temperature: float | Tensor,
    logit_scale: float,
    softcap: float | None,
    ignore_index: int,
    backend: str,
    plan: str,
    precision: str,
    workspace_bytes: int | None,
    max_live: int | None,
    main_grad: Tensor | None,
    *,
    entropy: bool,
    lse: bool,
) -> TokenStats:
    check_call(
        who, hidden, weight, target, bias=bias, temperature=temperature, logit_scale=logit_scale,
        softcap=softcap, precision=precision, workspace_bytes=workspace_bytes, max_live=max_live,
        main_grad=main_grad,
    )  # fmt: skip
    shape = target.shape
    y = target.reshape(-1)
    if ignore_index != IGNORE_INDEX:
        y = torch.where(y == ignore_index, IGNORE_INDEX, y)
    found = waist(
        hidden.reshape(-1, hidden.shape[-1]), weight, y, bias,
        temperature.detach().reshape(-1) if isinstance(temperature, Tensor) else temperature, logit_scale,
        softcap, backends.pick(backend, hidden.device), plan, precision, workspace_bytes, max_live, main_grad,
        stats=("entropy",) if entropy else (),
    )  # fmt: skip
    return TokenStats(
        found["logp"].reshape(shape),
        found["entropy"].reshape(shape) if entropy else None,
        found["lse"].reshape(shape) if lse else None,
    )


def waist(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    target: Tensor,  # [N], ignored ones -100
    bias: Tensor | None,  # [V]
    temperature: float | Tensor,  # [N]
    logit_scale: float,
    softcap: float | None,
    backend: str,  # as picked
    plan: str,
    precision: str,
    workspace_bytes: int | None,
    max_live: int | None,
    main_grad: Tensor | None,
    *,
    stats: Sequence[str] = (),
    learnt: Sequence[str] | None = None,
) -> dict[str, Tensor]:
    """logp, lse and the stats asked for, [N] each, of checked arguments.

    stats: of "entropy", "average" (the mean logit), "squares" (log sum_v p_v^2, never differentiable).
    learnt: those that are differentiable; None: all.
    """
    grad = torch.is_grad_enabled()
    if backend == "eager":
        check_plan(plan)
        if main_grad is not None and grad and weight.requires_grad:
            weight = IntoMainGrad.apply(weight, main_grad)
        return _eager(hidden, weight, bias, target, temperature, logit_scale, softcap, max_live)
    is_tensor = isinstance(temperature, Tensor)
    found = torch.ops.fused_align.linear_logp_forward(
        hidden,
        weight,
        bias,
        target,
        temperature if is_tensor else None,
        main_grad,
        1.0 if is_tensor else float(temperature),
        float(logit_scale),
        None if softcap is None else float(softcap),
        autocast_dtype(hidden, weight),
        precision == "bf16",
        backend,
        workspace_bytes,
        max_live,
        plan,
        " ".join(stats),
        " ".join(stats if learnt is None else learnt),
        grad and hidden.requires_grad,
        grad and (weight.requires_grad or (bias is not None and bias.requires_grad)),
    )
    named: dict[str, Tensor] = dict(zip(STATS, found[: len(STATS)], strict=True))  # the backward's follow
    return {name: named[name] for name in ("logp", "lse", *stats)}


class IntoMainGrad(torch.autograd.Function):
    """The weight itself; its gradient is added to main_grad and ends there."""

    @staticmethod
    def forward(ctx, weight: Tensor, main_grad: Tensor) -> Tensor:
        ctx.main_grad = main_grad
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        ctx.main_grad.add_(grad)
        return None, None


def _eager(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    temperature: float | Tensor,
    logit_scale: float,
    softcap: float | None,
    max_live: int | None,
) -> dict[str, Tensor]:
    rows = Rows.where(target != IGNORE_INDEX, max_live)
    y = ops.check_range(rows.take(target), weight.shape[0])
    temperature = ops.per_row(temperature, rows)
    if isinstance(temperature, Tensor):
        ops.check_temperature(temperature)
    dtype, operand = work_dtype(hidden, weight), autocast_dtype(hidden, weight)
    if operand is not None:
        hidden, weight = hidden.to(operand), weight.to(operand)
    with torch.autocast(hidden.device.type, enabled=False):
        live = dense_stats(rows.take(hidden), weight, bias, y, temperature, logit_scale, softcap, dtype)
    return {name: rows.spread(x) for name, x in live.items()}


# ---- validation ----------------------------------------------------------------------------------------


def check_call(
    who: str,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None,
    temperature: float | Tensor,
    logit_scale: float,
    softcap: float | None,
    precision: str,
    workspace_bytes: int | None,
    max_live: int | None,
    main_grad: Tensor | None,
    packed: bool = False,
) -> None:
    """Raises with a sentence if the arguments that all public functions share do not fit together."""
    if packed and isinstance(hidden, Tensor) and hidden.dim() == 3 and hidden.shape[0] == 1:
        raise ValueError(
            f"{who}: hidden must be [N, H] for a packed batch (with cu_seqlens); got {list(hidden.shape)}. "
            "Pass hidden[0]."
        )
    check_head(who, hidden, weight, bias, logit_scale, softcap, precision, workspace_bytes)
    check_target(who, hidden, target, temperature)
    if max_live is not None and (not isinstance(max_live, int) or max_live < 0):
        raise ValueError(f"{who}: max_live must be a number of tokens or None; got {max_live!r}.")
    check_main_grad(who, hidden, weight, main_grad)


def check_head(
    who: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    precision: str,
    workspace_bytes: int | None,
) -> None:
    """Raises with a sentence if hidden, weight, bias and the head's options do not fit together."""
    check_tensors(who, hidden=hidden, weight=weight, bias=bias)
    if hidden.dim() < 1 or weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        size = hidden.shape[-1] if hidden.dim() else "?"
        swapped = weight.dim() == 2 and weight.shape[0] == size
        raise ValueError(
            f"{who}: weight must be [V, H] with H={size} to match hidden {list(hidden.shape)}; got "
            f"{list(weight.shape)}.{' Did you pass weight.T?' if swapped else ''}"
        )
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype not in FLOATS:
            raise TypeError(
                f"{who}: {name} must be float64, float32, bfloat16 or float16; got {tensor.dtype}."
            )
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{who}: {name} is on {tensor.device}, hidden on {hidden.device}; move one.")
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"{who}: bias must be [V] = [{weight.shape[0]}]; got {list(bias.shape)}.")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"{who}: softcap must be positive, or None for no cap; got {softcap}.")
    if isinstance(logit_scale, Tensor):
        raise TypeError(
            f"{who}: logit_scale must be a number, and is not differentiable; got a tensor. Pass "
            "logit_scale.item(), or multiply hidden by it."
        )
    if logit_scale == 0:
        raise ValueError(f"{who}: logit_scale must not be 0, which makes all logits equal.")
    if workspace_bytes is not None and not isinstance(workspace_bytes, int):
        raise TypeError(f"{who}: workspace_bytes must be an int or None; got {workspace_bytes!r}.")
    check_precision(who, precision)


def check_target(who: str, hidden: Tensor, target: Tensor, temperature: float | Tensor) -> None:
    """Raises with a sentence if target or temperature do not fit hidden."""
    check_tensors(who, target=target)
    if target.dtype != torch.int64:
        raise TypeError(f"{who}: target must be int64; got {target.dtype}. Call target.long().")
    if target.shape != hidden.shape[:-1]:
        raise ValueError(
            f"{who}: target must be {list(hidden.shape[:-1])} to match hidden {list(hidden.shape)}; got "
            f"{list(target.shape)}."
        )
    if target.device != hidden.device:
        raise ValueError(f"{who}: target is on {target.device}, hidden on {hidden.device}; move one.")
    if isinstance(temperature, Tensor):
        if temperature.shape != target.shape:
            raise ValueError(
                f"{who}: temperature must be a number or {list(target.shape)}, one per token; got "
                f"{list(temperature.shape)}."
            )
    elif not temperature > 0:
        raise ValueError(f"{who}: temperature must be positive; got {temperature}.")


def check_main_grad(who: str, hidden: Tensor, weight: Tensor, main_grad: Tensor | None) -> None:
    """Raises with a sentence if main_grad cannot take the gradient of weight."""
    check_tensors(who, main_grad=main_grad)
    if main_grad is None:
        return
    work = work_dtype(hidden, weight)
    if main_grad.shape != weight.shape or main_grad.dtype != work or main_grad.device != weight.device:
        raise ValueError(
            f"{who}: main_grad must be {work} {list(weight.shape)} on {weight.device}, as the sum of the "
            f"weight's gradients; got {main_grad.dtype} {list(main_grad.shape)} on {main_grad.device}."
        )
    if torch.is_grad_enabled() and not weight.requires_grad:
        raise ValueError(
            f"{who}: main_grad takes the gradient of weight, and weight needs none. Call "
            "weight.requires_grad_(), or drop main_grad."
        )


def check_precision(who: str, precision: str) -> None:
    if precision not in ("high", "bf16"):
        raise ValueError(f'{who}: precision must be "high" or "bf16"; got {precision!r}.')


def check_tensors(who: str, **given: object) -> None:
    """Raises TypeError with a sentence for what is neither a tensor nor None."""
    for name, value in given.items():
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"{who}: {name} must be a torch.Tensor; got {type(value).__name__}.")


def autocast_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype | None:
    """The dtype that autocast rounds GEMM operands to, or None. float64 stays, as in torch's own linear."""
    kind = hidden.device.type
    # is_autocast_available would tell which devices have none, but torch before 2.13 cannot trace it
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return None
    if work_dtype(hidden, weight) == torch.float64:
        return None
    return torch.get_autocast_dtype(kind)
