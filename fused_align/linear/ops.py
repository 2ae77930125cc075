"""The waist as two custom ops, one forward and one backward, opaque to torch.compile through their fakes.

Absent outputs have size 0. Gradients of gradients are not defined, and asking for them raises.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..batch import IGNORE_INDEX
from .passes import Chunk, Coefficients, Gradients, Head, Index, Walk, coefficients, load, work_dtype
from .plan import Plan, Problem, choose
from .workspace import lease


def check_range(target: Tensor, vocab: int) -> Tensor:  # [n] live
    """The targets, safe to gather with. Raises ValueError on a CPU if one lies outside [0, V)."""
    if target.device.type != "cpu":
        return target.clamp(0, vocab - 1)
    if target.numel():
        low, high = int(target.min()), int(target.max())
        if low < 0 or high >= vocab:
            raise ValueError(
                f"target must lie in [0, {vocab}) or equal ignore_index; got "
                f"{low if low < 0 else high}."
                " Is the vocabulary padded, or another ignore_index in use?"
            )
    return target


def check_temperature(temperature: Tensor) -> Tensor:  # [n] live
    """The temperatures. Raises ValueError on a CPU if one is not positive."""
    if temperature.device.type == "cpu" and not bool((temperature > 0).all()):
        raise ValueError(f"temperature must be positive; got {temperature.min().item():.4g}.")
    return temperature


def live_index(target: Tensor) -> tuple[Index, Tensor]:  # [M]
    """The live rows (a slice where that is all of them) and their targets."""
    rows = (target != IGNORE_INDEX).nonzero().squeeze(1)
    if rows.numel() == target.numel():
        return slice(0, target.numel()), target
    return rows, target[rows]


def chunked(index: Index, step: int) -> list[tuple[Index, slice]]:
    """index in chunks of at most `step` rows, each with its place among the live ones."""
    count = index.stop - index.start if isinstance(index, slice) else index.numel()
    places = [slice(a, min(a + step, count)) for a in range(0, count, step)]
    return [(place if isinstance(index, slice) else index[place], place) for place in places]


def make_problem(
    head: Head, hidden: Tensor, live: int, *, grad_hidden: bool, grad_head: bool, **more: object
) -> Problem:
    return Problem(
        rows=live,
        given=hidden.shape[0],
        hidden=hidden.shape[1],
        vocab=head.weight.shape[0],
        work=work_dtype(hidden, head.weight),
        hidden_dtype=hidden.dtype,
        weight_dtype=head.weight.dtype,
        operand=head.operand,
        rounded=head.rounded,
        device=hidden.device,
        grad_hidden=grad_hidden,
        grad_head=grad_head,
        capped=head.softcap is not None,
        **more,  # type: ignore[arg-type]
    )


def run_walk(head: Head, plan: Plan, problem: Problem, body: Callable[[Walk], None]) -> None:
    """Runs body on a Walk with its scratch, without autocast: the steps choose their own dtypes."""
    elements = plan.rows * plan.cols * problem.scratch(plan.name)
    if plan.name in ("single", "window"):
        elements += plan.rows * problem.vocab
    device = problem.device
    with torch.autocast(device.type, enabled=False), lease(elements, problem.work, device) as scratch:
        body(Walk(head, plan, scratch))


def _at(vector: Tensor | None, index: Index, otherwise: Any = None) -> Any:  # [M] -> [r]
    return otherwise if vector is None else vector[index]


@torch.library.custom_op("fused_align::linear_logp_forward", mutates_args=())
def _forward(
    hidden: Tensor,  # [M, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    target: Tensor,  # [M]
    temperature: Tensor | None,  # [M]
    scalar_temperature: float,
    logit_scale: float,
    softcap: float | None,
    operand: torch.dtype | None,
    rounded: bool,
    plan: str,
    workspace_bytes: int | None,
    entropy: bool,
    grad_hidden: bool,
    grad_head: bool,
) -> list[Tensor]:
    """-> logp [M], entropy [M] or [0], lse [M], state [3 or 4, M] (see `load`), product [M, H] or [0]."""
    head = Head(weight, bias, logit_scale, softcap, operand, rounded)
    work = work_dtype(hidden, weight)
    index, y = live_index(target)
    safe = check_range(y, weight.shape[0])
    if temperature is not None:
        check_temperature(temperature[index])
    problem = make_problem(
        head, hidden, y.numel(), grad_hidden=grad_hidden, grad_head=grad_head, entropy=entropy,
        entropy_grad=entropy and (grad_hidden or grad_head),
    )  # fmt: skip
    chosen = choose(problem, plan, workspace_bytes)
    logp, entropies, lse = (hidden.new_zeros(target.shape, dtype=work) for _ in range(3))
    state = hidden.new_zeros((3 if softcap is None else 4, target.numel()), dtype=work)
    jacobian = chosen.name == "jacobian"
    fresh = hidden.new_zeros if problem.masked else hidden.new_empty
    product = fresh(hidden.shape if jacobian else (0,), dtype=work)

    def body(walk: Walk) -> None:
        for rows, place in chunked(index, chosen.rows):
            chunk = load(
                head,
                hidden,
                rows,
                safe[place],
                _at(temperature, rows, scalar_temperature),
                entropy=entropy,
            )
            part = None
            if jacobian:
                part = (
                    product[rows] if isinstance(rows, slice) else chunk.x.new_empty(chunk.x.shape, dtype=work)
                )
            walk.forward(chunk, product=part)
            value, lse_rows, _, inverse = chunk.finish()
            if safe is not y:
                value = torch.where(safe[place] == y[place], value, torch.nan)
            logp[rows], lse[rows] = value.to(work), lse_rows.to(work)
            state[0, rows], state[1, rows], state[2, rows] = chunk.z, chunk.ref, chunk.total
            if chunk.slope is not None:
                state[3, rows] = chunk.slope
            if entropy:
                entropies[rows] = chunk.entropy().to(work)
            if part is not None:
                part.mul_((inverse * chunk.factor).to(work)[:, None])
                if not isinstance(rows, slice):
                    product[rows] = part

    run_walk(head, chosen, problem, body)
    return [logp, entropies if entropy else entropies.new_empty(0), lse, state, product]


@_forward.register_fake
def _(
    hidden, weight, bias, target, temperature, scalar_temperature, logit_scale, softcap, operand, rounded,
    plan, workspace_bytes, entropy, grad_hidden, grad_head,
):  # fmt: skip
    work = work_dtype(hidden, weight)
    logp, lse = (hidden.new_empty(target.shape, dtype=work) for _ in range(2))
    # as the planner chooses: from the flags alone, so that shapes are known when tracing
    jacobian = grad_hidden and not grad_head and (plan == "jacobian" or (plan == "auto" and not entropy))
    return [
        logp,
        hidden.new_empty(target.shape if entropy else (0,), dtype=work),
        lse,
        hidden.new_empty((3 if softcap is None else 4, target.shape[0]), dtype=work),
        hidden.new_empty(hidden.shape if jacobian else (0,), dtype=work),
    ]


@torch.library.custom_op("fused_align::linear_logp_backward", mutates_args=())
def _backward(
    dlogp: Tensor,  # [M]
    dentropy: Tensor | None,  # [M]
    dlse: Tensor | None,  # [M]
    hidden: Tensor,  # [M, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    target: Tensor,  # [M]
    temperature: Tensor | None,  # [M]
    entropy: Tensor,  # [M] | [0]
    state: Tensor,  # [3 or 4, M]
    product: Tensor,  # [M, H] | [0]
    scalar_temperature: float,
    logit_scale: float,
    softcap: float | None,
    operand: torch.dtype | None,
    rounded: bool,
    workspace_bytes: int | None,
    grad_hidden: bool,
    grad_weight: bool,
    grad_bias: bool,
) -> list[Tensor]:
    """-> dhidden [M, H], dweight [V, H], dbias [V], each [0] where not needed."""
    head = Head(weight, bias, logit_scale, softcap, operand, rounded)
    index, y = live_index(target)
    y = check_range(y, weight.shape[0])
    problem = make_problem(
        head, hidden, y.numel(), grad_hidden=grad_hidden, grad_head=grad_weight or grad_bias,
        entropy_grad=dentropy is not None,
    )  # fmt: skip
    jacobian = product.numel() > 0
    chosen = choose(problem, "jacobian" if jacobian else "recompute", workspace_bytes)
    needs = (grad_hidden, grad_weight, grad_bias)
    grads = Gradients(head, hidden, y.numel(), needs, complete=False, apart=chosen.apart)

    def reload(rows: Index, place: slice) -> tuple[Chunk, Coefficients]:
        temper = _at(temperature, rows, scalar_temperature)
        chunk = load(head, hidden, rows, y[place], temper, saved=state[:, rows])
        c, c_lse, c_entropy = dlogp[rows], _at(dlse, rows), _at(dentropy, rows)
        chunk.tame(sum((extra.abs() for extra in (c_lse, c_entropy) if extra is not None), c.abs()))
        return chunk, coefficients(
            chunk, c, c_lse, c_entropy, entropy[rows] if c_entropy is not None else None
        )

    def body(walk: Walk) -> None:
        parts = chunked(index, chosen.rows)
        if jacobian:
            for rows, place in parts:
                chunk, coef = reload(rows, place)
                others = -dlogp[rows] if dlse is None else dlse[rows] - dlogp[rows]
                grads.add_jacobian(chunk, place, product[rows], others, coef.target)
            return
        mine = [walk.by_tile(y[place]) for _, place in parts]

        def round_of(only: int | None, which: tuple[bool, bool]) -> None:
            for (rows, place), targets in zip(parts, mine, strict=True):
                chunk, coef = reload(rows, place)
                walk.backward(chunk, place, coef, targets, grads, only=only, parts=which)

        if not grads.sliced or chosen.apart:  # all tiles of a chunk
            round_of(None, (True, not grads.sliced))
        for number, (start, _) in enumerate(walk.tiles() if grads.sliced else ()):  # all chunks of a tile
            round_of(number, (not chosen.apart, True))
            grads.round_slice(start)

    if y.numel():
        run_walk(head, chosen, problem, body)
    else:
        grads.clear()
    return [hidden.new_empty(0) if grad is None else grad for grad in grads.finish()]


@_backward.register_fake
def _(
    dlogp, dentropy, dlse, hidden, weight, bias, target, temperature, entropy, state,
    product, scalar_temperature, logit_scale, softcap, operand, rounded, workspace_bytes,
    grad_hidden, grad_weight, grad_bias,
):  # fmt: skip
    absent = hidden.new_empty(0)
    return [
        torch.empty_like(hidden, memory_format=torch.contiguous_format) if grad_hidden else absent,
        torch.empty_like(weight, memory_format=torch.contiguous_format) if grad_weight else absent.clone(),
        bias.new_empty(bias.shape) if grad_bias and bias is not None else absent.clone(),
    ]


def _setup(ctx, inputs, output) -> None:
    hidden, weight, bias, target, temperature = inputs[:5]
    _, entropy, _, state, product = output
    ctx.set_materialize_grads(False)  # zeros of product's size, for an output that no one differentiates
    ctx.save_for_backward(hidden, weight, bias, target, temperature, entropy, state, product)
    ctx.options = inputs[5:10], inputs[11]


def _autograd(ctx, grads):
    dlogp, dentropy, dlse, _, _ = grads
    hidden, weight, bias, target, temperature, entropy, state, product = ctx.saved_tensors
    options, workspace_bytes = ctx.options
    needs = ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[2]
    if dlogp is None:
        dlogp = torch.zeros_like(state[0])
    if entropy.numel() == 0:  # a traced backward gets zeros for every output
        dentropy = None
    found = torch.ops.fused_align.linear_logp_backward(
        dlogp, dentropy, dlse, hidden, weight, bias, target, temperature, entropy, state, product,
        *options, workspace_bytes, *needs,
    )  # fmt: skip
    dhidden, dweight, dbias = (grad if need else None for grad, need in zip(found, needs, strict=True))
    return dhidden, dweight, dbias, *(None,) * 12


_forward.register_autograd(_autograd, setup_context=_setup)
