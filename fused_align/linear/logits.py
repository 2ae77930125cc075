"""`logp_from_logits`: per-token log-probs of logits that exist already, in one pass and no softmax copy."""

from __future__ import annotations

import torch
from torch import Tensor

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
    y = target.reshape(-1)
    if ignore_index != IGNORE_INDEX:
        y = torch.where(y == ignore_index, IGNORE_INDEX, y)
    per_row = isinstance(temperature, Tensor)
    inverse = 1 / temperature.detach().reshape(-1) if per_row else None
    logp, _ = torch.ops.fused_align.logp_from_logits(
        logits.reshape(-1, logits.shape[-1]), y, inverse, 1.0 if per_row else 1 / float(temperature)
    )
    return logp.reshape(target.shape)


def _block(logits: Tensor, rows: Tensor, inverse: Tensor | None, scalar: float, work: torch.dtype) -> Tensor:
    z = logits[rows].to(work)
    return z.mul_(scalar) if inverse is None else z.mul_(inverse[rows, None].to(work))


def _blocks(logits: Tensor, target: Tensor, work: torch.dtype) -> tuple[Tensor, ...]:
    rows = (target != IGNORE_INDEX).nonzero().squeeze(1)
    return rows.split(max(1, BLOCK_BYTES // (logits.shape[1] * work.itemsize)))


@torch.library.custom_op("fused_align::logp_from_logits", mutates_args=())
def _forward(
    logits: Tensor,  # [M, V]
    target: Tensor,  # [M]
    inverse: Tensor | None,  # [M], 1 / temperature
    scalar: float,  # 1 / temperature
) -> tuple[Tensor, Tensor]:
    """-> logp [M], lse [M]."""
    work = torch.float64 if logits.dtype == torch.float64 else torch.float32
    logp, lse = (logits.new_zeros(target.shape, dtype=work) for _ in range(2))
    for rows in _blocks(logits, target, work):
        y = check_range("logp_from_logits", target[rows], logits.shape[1])[:, None]
        z = _block(logits, rows, inverse, scalar, work)
        z_y, top = z.gather(1, y).squeeze(1), z.amax(1)
        # the target apart from the others, so that log(p) of a sure token keeps its digits
        others = z.sub_(top[:, None]).exp_().scatter_(1, y, 0.0).sum(1)
        value = -torch.nn.functional.softplus(others.double().log() + (top.double() - z_y.double())).to(work)
        if logits.device.type != "cpu":
            value = torch.where(y.squeeze(1) == target[rows], value, torch.nan)
        logp[rows], lse[rows] = value, z_y - value
    return logp, lse


@_forward.register_fake
def _(logits, target, inverse, scalar):
    work = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return logits.new_empty(target.shape, dtype=work), logits.new_empty(target.shape, dtype=work)


@torch.library.custom_op("fused_align::logp_from_logits_backward", mutates_args=())
def _backward(
    dlogp: Tensor,  # [M]
    logits: Tensor,  # [M, V]
    target: Tensor,  # [M]
    lse: Tensor,  # [M]
    inverse: Tensor | None,
    scalar: float,
) -> Tensor:
    grad = torch.zeros_like(logits, memory_format=torch.contiguous_format)
    work = lse.dtype
    for rows in _blocks(logits, target, work):
        y = target[rows].clamp(0, logits.shape[1] - 1)[:, None]
        p = _block(logits, rows, inverse, scalar, work).sub_(lse[rows, None]).exp_().scatter_(1, y, 0.0)
        miss = p.sum(1, keepdim=True)  # 1 - p_y
        coef = (dlogp[rows] * (scalar if inverse is None else inverse[rows].to(work)))[:, None]
        grad[rows] = p.mul_(-coef).scatter_(1, y, coef * miss).to(grad.dtype)
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
