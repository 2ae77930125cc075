"""`logp_from_logits` and `stats_from_logits`: what `linear_logp` gives, of logits that exist already."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .. import backends
from ..backends.torch_logits import LogitStats
from ..batch import IGNORE_INDEX
from .logp import FLOATS, TokenStats, check_tensors
from .ops import check_range, check_temperature


def logp_from_logits(
    logits: Tensor,  # [..., V]
    target: Tensor,  # [...] int64
    *,
    temperature: float | Tensor = 1.0,  # [...]
    ignore_index: int = IGNORE_INDEX,
    backend: str = "auto",
    overwrite: bool = False,
) -> Tensor:
    """log softmax(logits / temperature)[target], per token, in nats, from materialised logits.

    Reads the logits once and copies none of them; the backward reads them again and writes the gradient.

    Args:
        logits: float64, float32, bfloat16 or float16. Differentiable; the gradient has their dtype.
        target: positions equal to `ignore_index` give 0 and no gradient.
        temperature: one number, or one per token; positive; not differentiable.
        backend: "auto" | "torch" (blocks of rows) | "triton", "cuda" (one kernel).
        overwrite: the backward writes the gradient over the logits: for logits that nothing else reads. It
            may run once.

    Returns:
        logp [...] float32 (float64 for float64 logits).

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit; on a CPU also targets outside [0, V)
            (on CUDA such a row is NaN).
    """
    return _stats("logp_from_logits", logits, target, temperature, ignore_index, backend, overwrite, False)[0]


def stats_from_logits(
    logits: Tensor,  # [..., V]
    target: Tensor,  # [...] int64
    *,
    temperature: float | Tensor = 1.0,  # [...]
    ignore_index: int = IGNORE_INDEX,
    backend: str = "auto",
    overwrite: bool = False,
    entropy: bool = False,
    lse: bool = False,
) -> TokenStats:
    """`logp_from_logits` with, from the same read, the entropy of softmax(logits / temperature) and the lse.

    Same arguments and errors. All three outputs are differentiable, [...] in nats and 0 where ignored.
    """
    who = "stats_from_logits"
    found = _stats(who, logits, target, temperature, ignore_index, backend, overwrite, entropy)
    return TokenStats(found[0], found[2] if entropy else None, found[1] if lse else None)


def _stats(
    who: str,
    logits: Tensor,
    target: Tensor,
    temperature: float | Tensor,
    ignore_index: int,
    backend: str,
    overwrite: bool,
    entropy: bool,
) -> list[Tensor]:
    """logp, lse, entropy | [0], of checked arguments."""
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
    picked = backends.pick(backend, logits.device)
    if backend == "auto" and (picked == "eager" or logits.stride(-1) != 1):
        picked = "torch"  # a kernel takes adjacent columns, and eager is no backend of logits that exist
    if picked == "eager":
        raise ValueError(f'{who}: backend must be "auto", "torch", "triton" or "cuda"; got "eager".')
    shape = target.shape
    if not shape:
        logits, target = logits[None], target[None]
    y = target
    if ignore_index != IGNORE_INDEX:
        y = torch.where(y == ignore_index, IGNORE_INDEX, y)
    inverse, scalar = None, 1.0
    if isinstance(temperature, Tensor):
        work = torch.float64 if logits.dtype == torch.float64 else torch.float32
        inverse = 1 / temperature.detach().to(work).reshape(y.shape)
    else:
        scalar = 1 / float(temperature)
    found = torch.ops.fused_align.logits_forward(logits, y, inverse, scalar, entropy, overwrite, picked)
    return [x.reshape(shape) if x.numel() == y.numel() else x for x in found[:3]]


def _matrices(
    wide: Sequence[Tensor],  # [..., V] each
    vectors: Sequence[Tensor | None],  # [...] each
) -> Iterator[tuple[list[Tensor], list[Tensor | None]]]:
    """The same as [M, V] and [M]: in parts where some can't be viewed as one matrix, and are not copied."""
    if all(_joined(x) for x in wide):
        yield [x.flatten(0, -2) for x in wide], [None if x is None else x.reshape(-1) for x in vectors]
        return
    for i in range(wide[0].shape[0]):
        yield from _matrices([x[i] for x in wide], [None if x is None else x[i] for x in vectors])


def _joined(x: Tensor) -> bool:
    """Whether the rows of [..., V] lie at equal distances."""
    return all(x.stride(i) == x.stride(i + 1) * x.shape[i + 1] for i in range(x.dim() - 2))


@torch.library.custom_op("fused_align::logits_forward", mutates_args=())
def _forward(
    logits: Tensor,  # [..., V]
    target: Tensor,  # [...]
    inverse: Tensor | None,  # [...], 1 / temperature
    scalar: float,  # 1 / temperature
    entropy: bool,
    overwrite: bool,  # what the backward is to do
    backend: str,
) -> list[Tensor]:
    """-> logp, lse, entropy | [0], the largest logit and the sum of exponentials against it, [M] each."""
    if target.device.type == "cpu":  # elsewhere a look would wait for the device
        live = target != IGNORE_INDEX
        check_range(target[live], logits.shape[-1])
        if inverse is not None:
            check_temperature(1 / inverse[live])
    step, parts = backends.steps(backend).logit_stats, []
    for (z,), (y, heat) in _matrices([logits], [target, inverse]):
        assert y is not None
        parts.append(step(z, y, heat, scalar, entropy=entropy))
    if not parts:
        return _empty(logits, target, entropy)
    none = parts[0].logp.new_empty(0)
    columns = zip(*(tuple(none if x is None else x for x in part) for part in parts), strict=True)
    return [torch.cat(column) if len(parts) > 1 else column[0] for column in columns]


def _empty(logits: Tensor, target: Tensor, entropy: bool) -> list[Tensor]:
    work = torch.float64 if logits.dtype == torch.float64 else torch.float32
    sizes = [target.numel()] * 5
    sizes[2] *= entropy
    return [logits.new_empty(size, dtype=work) for size in sizes]


@_forward.register_fake
def _(logits, target, inverse, scalar, entropy, overwrite, backend):
    return _empty(logits, target, entropy)


def _gradient(
    grads: Sequence[Tensor | None],  # of logp, lse, entropy, [M] each
    logits: Tensor,  # [..., V]
    out: Tensor,  # [..., V]
    target: Tensor,  # [...]
    stats: Sequence[Tensor],  # as forward gave them
    inverse: Tensor | None,  # [...]
    scalar: float,
    backend: str,
) -> None:
    columns: list[Tensor | None] = [*grads, *stats]
    shaped = [None if x is None or x.numel() != target.numel() else x.reshape(target.shape) for x in columns]
    step = backends.steps(backend).logit_gradient
    for (z, into), (y, heat, dlogp, dlse, dentropy, *found) in _matrices(
        [logits, out], [target, inverse, *shaped]
    ):
        step(dlogp, dlse, dentropy, z, y, LogitStats(*found), heat, scalar, out=into)  # type: ignore[arg-type]


@torch.library.custom_op("fused_align::logits_backward", mutates_args=())
def _backward(
    dlogp: Tensor,  # [M]
    dlse: Tensor | None,  # [M]
    dentropy: Tensor | None,  # [M]
    logits: Tensor,  # [..., V]
    target: Tensor,  # [...]
    stats: list[Tensor],
    inverse: Tensor | None,  # [...]
    scalar: float,
    backend: str,
) -> Tensor:
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    _gradient((dlogp, dlse, dentropy), logits, out, target, stats, inverse, scalar, backend)
    return out


@_backward.register_fake
def _(dlogp, dlse, dentropy, logits, target, stats, inverse, scalar, backend):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@torch.library.custom_op("fused_align::logits_backward_", mutates_args=("logits",))
def _backward_(
    dlogp: Tensor,  # [M]
    dlse: Tensor | None,  # [M]
    dentropy: Tensor | None,  # [M]
    logits: Tensor,  # [..., V], overwritten
    target: Tensor,  # [...]
    stats: list[Tensor],
    inverse: Tensor | None,  # [...]
    scalar: float,
    backend: str,
) -> None:
    _gradient((dlogp, dlse, dentropy), logits, logits, target, stats, inverse, scalar, backend)


def _setup(ctx, inputs, output) -> None:
    logits, target, inverse, ctx.scalar, ctx.entropy, ctx.overwrite, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, target, inverse, *output)


def _autograd(ctx, grads):
    logits, target, inverse, *stats = ctx.saved_tensors
    dlogp, dlse, dentropy = grads[:3]
    dlogp = torch.zeros_like(stats[0]) if dlogp is None else dlogp
    dentropy = dentropy if ctx.entropy else None  # a traced backward gets zeros for every output
    op = torch.ops.fused_align.logits_backward_ if ctx.overwrite else torch.ops.fused_align.logits_backward
    grad = op(dlogp, dlse, dentropy, logits, target, stats, inverse, ctx.scalar, ctx.backend)
    return logits if ctx.overwrite else grad, *(None,) * 6


_forward.register_autograd(_autograd, setup_context=_setup)
