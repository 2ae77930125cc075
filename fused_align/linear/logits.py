"""`logp_from_logits`: per-token log-probs of logits that exist already, in one pass and no softmax copy."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ..batch import IGNORE_INDEX
from .logp import FLOATS, check_tensors
from .ops import check_range, check_temperature

BLOCK_BYTES = 8 << 20  # rows are upcast and exponentiated in blocks of this size


def logp_from_logits(
    logits: Tensor,  # [..., V]
    target: Tensor,  # [...] int64
    *,
    temperature: float | Tensor = 1.0,  # [...]
    ignore_index: int = IGNORE_INDEX,
) -> Tensor:
    """log softmax(logits / temperature)[target], per token, in nats, from materialised logits.

    Reads the logits once, a block of rows at a time; the backward reads them again and writes the gradient.

    Args:
        logits: float64, float32, bfloat16 or float16. Differentiable; the gradient has their dtype.
        target: positions equal to `ignore_index` give 0 and no gradient.
        temperature: one number, or one per token; positive; not differentiable.

    Returns:
        logp [...] float32 (float64 for float64 logits).

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit; on a CPU also targets outside [0, V).
    """
    who = "logp_from_logits"
    check_tensors(who, logits=logits, target=target)
    if logits.dim() < 1 or logits.shape[:-1] != target.shape:
        raise ValueError(
            f"{who}: logits must be [..., V] with target [...]; got {list(logits.shape)} and "
            f"{list(target.shape)}."
        )
    if logits.dtype not in FLOATS:
        raise TypeError(f"{who}: logits must be float64, float32, bfloat16 or float16; got {logits.dtype}.")
    if target.dtype != torch.int64:
        raise TypeError(f"{who}: target must be int64; got {target.dtype}. Call target.long().")
    if isinstance(temperature, Tensor) and temperature.shape != target.shape:
        raise ValueError(
            f"{who}: temperature must be a number or {list(target.shape)}, one per token; got "
            f"{list(temperature.shape)}."
        )
    if not isinstance(temperature, Tensor) and not temperature > 0:
        raise ValueError(f"{who}: temperature must be positive; got {temperature}.")
    if logits.dim() == 1:
        one = temperature[None] if isinstance(temperature, Tensor) else temperature
        return logp_from_logits(logits[None], target[None], temperature=one, ignore_index=ignore_index)[0]
    y = target
    if ignore_index != IGNORE_INDEX:
        y = torch.where(y == ignore_index, IGNORE_INDEX, y)
    inverse, scalar = None, 1.0
    if isinstance(temperature, Tensor):
        inverse = 1 / temperature.detach().to(
            torch.float64 if logits.dtype == torch.float64 else torch.float32
        )
    else:
        scalar = 1 / float(temperature)
    logp, _, _ = torch.ops.fused_align.logp_from_logits(logits, y, inverse, scalar)
    return logp


def _blocks(logits: Tensor, target: Tensor, work: torch.dtype) -> Iterator[tuple[Tensor, ...]]:
    """Indices of the live positions, a block at a time; logits are never reshaped, which could copy them."""
    live = (target != IGNORE_INDEX).nonzero()
    for block in live.split(max(1, BLOCK_BYTES // (logits.shape[-1] * work.itemsize))):
        yield block.unbind(1)


def _load(
    logits: Tensor, at: tuple[Tensor, ...], inverse: Tensor | None, scalar: float, work: torch.dtype
) -> Tensor:
    z = logits[at].to(work)
    return z.mul_(scalar) if inverse is None else z.mul_(inverse[at][:, None])


@torch.library.custom_op("fused_align::logp_from_logits", mutates_args=())
def _forward(
    logits: Tensor,  # [..., V]
    target: Tensor,  # [...]
    inverse: Tensor | None,  # [...], 1 / temperature
    scalar: float,  # 1 / temperature
) -> tuple[Tensor, Tensor, Tensor]:
    """-> logp, the largest logit, the sum of the exponentials against it, [...] each."""
    work = torch.float64 if logits.dtype == torch.float64 else torch.float32
    logp, largest, total = (logits.new_zeros(target.shape, dtype=work) for _ in range(3))
    for at in _blocks(logits, target, work):
        if inverse is not None:
            check_temperature(1 / inverse[at])
        y = check_range(target[at], logits.shape[-1])[:, None]
        z = _load(logits, at, inverse, scalar, work)
        top = z.amax(1)
        gap = (z.gather(1, y).squeeze(1).double() - top.double()).clamp(max=0)
        # the target apart from the others, so that log(p) of a sure token keeps its digits
        others = z.sub_(top[:, None]).exp_().scatter_(1, y, 0.0).sum(1).double()
        value = -softplus(others.log() - gap, threshold=700).to(work)
        if logits.device.type != "cpu":
            value = torch.where(y.squeeze(1) == target[at], value, torch.nan)
        logp[at], largest[at], total[at] = value, top, (others + gap.exp()).to(work)
    return logp, largest, total


@_forward.register_fake
def _(logits, target, inverse, scalar):
    work = torch.float64 if logits.dtype == torch.float64 else torch.float32
    logp, largest, total = (logits.new_empty(target.shape, dtype=work) for _ in range(3))
    return logp, largest, total


@torch.library.custom_op("fused_align::logp_from_logits_backward", mutates_args=())
def _backward(
    dlogp: Tensor,  # [...]
    logits: Tensor,  # [..., V]
    target: Tensor,  # [...]
    largest: Tensor,  # [...]
    total: Tensor,  # [...]
    inverse: Tensor | None,  # [...]
    scalar: float,
) -> Tensor:
    grad, work = torch.zeros_like(logits, memory_format=torch.contiguous_format), total.dtype
    for at in _blocks(logits, target, work):
        y = target[at].clamp(0, logits.shape[-1] - 1)[:, None]
        # against the largest and not their logsumexp, whose rounding would scale the row
        e = _load(logits, at, inverse, scalar, work).sub_(largest[at][:, None]).exp_().scatter_(1, y, 0.0)
        coef = (dlogp[at] * (scalar if inverse is None else inverse[at]) / total[at])[:, None]
        others = e.sum(1, keepdim=True)  # (1 - p_y) * total
        grad[at] = e.mul_(-coef).scatter_(1, y, coef * others).to(grad.dtype)
    return grad


@_backward.register_fake
def _(dlogp, logits, target, largest, total, inverse, scalar):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _setup(ctx, inputs, output) -> None:
    logits, target, inverse, ctx.scalar = inputs
    ctx.save_for_backward(logits, target, output[1], output[2], inverse)


def _autograd(ctx, dlogp, _dlargest, _dtotal):
    *saved, inverse = ctx.saved_tensors
    grad = torch.ops.fused_align.logp_from_logits_backward(dlogp, *saved, inverse, ctx.scalar)
    return grad, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup)
