"""`logp_from_logits`: per-token log-probs of logits that exist already, in one pass and no softmax copy."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ..batch import IGNORE_INDEX
from .logp import FLOATS
from .ops import check_range

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
    logp, _ = torch.ops.fused_align.logp_from_logits(logits, y, inverse, scalar)
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
) -> tuple[Tensor, Tensor]:
    """-> logp, lse, [...] each."""
    work = torch.float64 if logits.dtype == torch.float64 else torch.float32
    logp, lse = (logits.new_zeros(target.shape, dtype=work) for _ in range(2))
    for at in _blocks(logits, target, work):
        y = check_range("logp_from_logits", target[at], logits.shape[-1])[:, None]
        z = _load(logits, at, inverse, scalar, work)
        top = z.amax(1)
        gap = (z.gather(1, y).squeeze(1).double() - top.double()).clamp(max=0)
        # the target apart from the others, so that log(p) of a sure token keeps its digits
        others = z.sub_(top[:, None]).exp_().scatter_(1, y, 0.0).sum(1).double()
        value = -softplus(others.log() - gap, threshold=700).to(work)
        if logits.device.type != "cpu":
            value = torch.where(y.squeeze(1) == target[at], value, torch.nan)
        logp[at], lse[at] = value, (top.double() + (others + gap.exp()).log()).to(work)
    return logp, lse


@_forward.register_fake
def _(logits, target, inverse, scalar):
    work = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return logits.new_empty(target.shape, dtype=work), logits.new_empty(target.shape, dtype=work)


@torch.library.custom_op("fused_align::logp_from_logits_backward", mutates_args=())
def _backward(
    dlogp: Tensor,  # [...]
    logits: Tensor,  # [..., V]
    target: Tensor,  # [...]
    lse: Tensor,  # [...]
    inverse: Tensor | None,  # [...]
    scalar: float,
) -> Tensor:
    grad = torch.zeros_like(logits, memory_format=torch.contiguous_format)
    for at in _blocks(logits, target, lse.dtype):
        y = target[at].clamp(0, logits.shape[-1] - 1)[:, None]
        p = _load(logits, at, inverse, scalar, lse.dtype).sub_(lse[at][:, None]).exp_().scatter_(1, y, 0.0)
        miss = p.sum(1, keepdim=True)  # 1 - p_y
        coef = (dlogp[at] * (scalar if inverse is None else inverse[at]))[:, None]
        grad[at] = p.mul_(-coef).scatter_(1, y, coef * miss).to(grad.dtype)
    return grad


@_backward.register_fake
def _(dlogp, logits, target, lse, inverse, scalar):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _setup(ctx, inputs, output) -> None:
    logits, target, inverse, ctx.scalar = inputs
    ctx.save_for_backward(logits, target, output[1], inverse)


def _autograd(ctx, dlogp, _dlse):
    logits, target, lse, inverse = ctx.saved_tensors
    grad = torch.ops.fused_align.logp_from_logits_backward(dlogp, logits, target, lse, inverse, ctx.scalar)
    return grad, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup)
