"""The waist as two custom ops, one forward and one backward, opaque to torch.compile through their fakes.

Absent outputs have size 0. Gradients of gradients are not defined, and asking for them raises.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from ..backends.operands import FAR, STATS, Chunk, Coefficients, Head, Upstream, work_dtype
from ..batch import IGNORE_INDEX
from ..rows import Rows
from .gradients import Gradients, Targets, live_places
from .passes import Walk, load, reload
from .plan import Plan, Problem, choose
from .workspace import lease


def check_range(target: Tensor, vocab: int) -> Tensor:  # [n] live
    """The targets, dense and safe to gather with. Raises ValueError on a CPU if one lies outside [0, V)."""
    if target.device.type != "cpu":
        return target.clamp(0, vocab - 1).contiguous()
    if target.numel():
        low, high = int(target.min()), int(target.max())
        if low < 0 or high >= vocab:
            raise ValueError(
                f"target must lie in [0, {vocab}) or equal ignore_index; got "
                f"{low if low < 0 else high}."
                " Is the vocabulary padded, or another ignore_index in use?"
            )
    return target.contiguous()


def check_temperature(temperature: Tensor) -> Tensor:  # [n] live
    """The temperatures. Raises ValueError on a CPU if one is not positive."""
    if temperature.device.type == "cpu" and not bool((temperature > 0).all()):
        raise ValueError(f"temperature must be positive; got {temperature.min().item():.4g}.")
    return temperature


def make_problem(
    head: Head,
    hidden: Tensor,
    live: int,
    *,
    stats: Sequence[str],
    learnt: Sequence[str],
    grad_hidden: bool,
    grad_head: bool,
    **more: object,
) -> Problem:
    """stats: what is wanted besides logp and lse; learnt: those of them that are differentiated."""
    grad = grad_hidden or grad_head
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
        backend=head.backend,
        device=hidden.device,
        grad_hidden=grad_hidden,
        grad_head=grad_head,
        capped=head.softcap is not None,
        adjacent=hidden.stride(1) == head.weight.stride(1) == 1,
        entropy="entropy" in stats,
        average="average" in stats,
        squares="squares" in stats,
        entropy_grad="entropy" in learnt and grad,
        average_grad="average" in learnt and grad,
        **more,  # type: ignore[arg-type]
    )


def run_walk(head: Head, plan: Plan, problem: Problem, body: Callable[[Walk], None]) -> None:
    """Runs body on a Walk with its scratch, without autocast: the steps choose their own dtypes."""
    nbytes = sum(problem.scratch(plan.name, plan.rows, plan.cols))
    kind = problem.device.type
    plain = torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()
    with plain, lease(nbytes, problem.device) as scratch:
        body(Walk(head, plan, problem, scratch))


def per_row(temperature: float | Tensor, rows: Rows) -> float | Tensor:  # [M] -> [r]
    """The temperatures of some rows; 1 in padding."""
    if not isinstance(temperature, Tensor):
        return temperature
    found = rows.take(temperature)
    return found if rows.valid is None else torch.where(rows.valid, found, 1.0)


def _is_jacobian(plan: str, frozen: bool, learnt: str, capped: bool) -> bool:
    """Whether the forward must keep E @ W: from flags alone, so that shapes are known when tracing."""
    served = "entropy" not in learnt and not (capped and "average" in learnt)
    return frozen and (plan == "jacobian" or (plan == "auto" and served))


@torch.library.custom_op("fused_align::linear_logp_forward", mutates_args=())
def _forward(
    hidden: Tensor,  # [M, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    target: Tensor,  # [M]
    temperature: Tensor | None,  # [M]
    main_grad: Tensor | None,  # [V, H], for the backward
    scalar_temperature: float,
    logit_scale: float,
    softcap: float | None,
    operand: torch.dtype | None,
    rounded: bool,
    backend: str,
    workspace_bytes: int | None,
    max_live: int | None,
    plan: str,
    stats: str,  # words, of STATS[2:]: an op takes no list of them
    learnt: str,
    grad_hidden: bool,
    grad_head: bool,
) -> list[Tensor]:
    """-> STATS, [M] | [0] each; state [3 or 4, M]; product [M, H] | [0].

    state: z, ref, S and, under a cap, the target's slope. All are 0 where ignored.
    """
    head = Head(weight, bias, logit_scale, softcap, operand, rounded, backend)
    work = work_dtype(hidden, weight)
    rows = Rows.where(target != IGNORE_INDEX, max_live)
    y = rows.take(target)
    safe = check_range(y, weight.shape[0])
    temper = scalar_temperature if temperature is None else per_row(temperature, rows)
    if isinstance(temper, Tensor):
        check_temperature(temper)
    jacobian = _is_jacobian(plan, grad_hidden and not grad_head, learnt, softcap is not None)
    problem = make_problem(
        head, hidden, len(rows), stats=stats.split(), learnt=learnt.split(), grad_hidden=grad_hidden,
        grad_head=grad_head, static=max_live is not None, main_grad=main_grad is not None,
    )  # fmt: skip
    chosen = choose(problem, "jacobian" if jacobian else plan, workspace_bytes)
    means = head.average(chosen.cols, work) if "average" in stats else None
    found = _Found(head, hidden, rows, stats, jacobian)

    def body(walk: Walk) -> None:
        for part, at in rows.split(chosen.rows):
            heat = temper[at] if isinstance(temper, Tensor) else temper
            x = part.take(hidden)
            chunk = load(head, x, safe[at], heat, stats=stats, average=means, valid=part.valid)
            product = found.product_of(part) if jacobian else None
            walk.forward(chunk, product=product)
            found.put(part, chunk, None if safe is y else safe[at] == y[at], product)

    if len(rows):
        run_walk(head, chosen, problem, body)
    if rows.valid is not None:  # rows beyond max_live, where that was no error
        surplus = (target != IGNORE_INDEX) & (rows.spread(rows.valid.to(work)) == 0)
        found.table[0, : rows.size].masked_fill_(surplus, torch.nan)
    return found.outputs()


class _Found:
    """What the forward returns, under construction; padding writes to a spare row at the end."""

    def __init__(self, head: Head, hidden: Tensor, rows: Rows, stats: str, jacobian: bool) -> None:
        self.steps, self.stats, self.size = head.steps, ("logp", "lse", *stats.split()), rows.size
        width = rows.size + (rows.valid is not None)
        count = len(STATS) + (3 if head.softcap is None else 4)
        work = work_dtype(hidden, head.weight)
        self.table = hidden.new_zeros((count, width), dtype=work)  # STATS, and the state
        self.product = hidden.new_zeros((width, hidden.shape[1]) if jacobian else 0, dtype=work)

    def product_of(self, part: Rows) -> Tensor:
        """Where E @ W of a chunk is summed: in place where it can be."""
        if isinstance(part.index, slice):
            return self.product[part.index]
        return self.product.new_empty(len(part), self.product.shape[1])

    def put(self, part: Rows, chunk: Chunk, inside: Tensor | None, product: Tensor | None) -> None:
        """The results of a chunk. inside: which targets lie in the vocabulary, where it is not checked."""
        found = self.steps.finish_rows(chunk)
        if inside is not None:
            found[0] = torch.where(inside, found[0], torch.nan)
        state = [chunk.z, chunk.ref, chunk.total] + ([] if chunk.slope is None else [chunk.slope])
        self.table[:, part.index] = torch.cat([found, torch.stack(state)])
        if product is not None:
            self.steps.close_product(product, chunk)
            if not isinstance(part.index, slice):
                self.product[part.index] = product

    def outputs(self) -> list[Tensor]:
        table = self.table[:, : self.size]
        stats = [
            table[i].clone() if name in self.stats else table.new_empty(0) for i, name in enumerate(STATS)
        ]
        return [*stats, table[len(STATS) :].clone(), self.product[: self.size]]


@_forward.register_fake
def _(
    hidden, weight, bias, target, temperature, main_grad, scalar_temperature, logit_scale, softcap, operand,
    rounded, backend, workspace_bytes, max_live, plan, stats, learnt, grad_hidden, grad_head,
):  # fmt: skip
    work, rows = work_dtype(hidden, weight), target.shape[0]
    jacobian = _is_jacobian(plan, grad_hidden and not grad_head, learnt, softcap is not None)

    def new(*shape):
        return hidden.new_empty(shape, dtype=work)

    return [
        *(new(rows if name in ("logp", "lse", *stats.split()) else 0) for name in STATS),
        new(3 if softcap is None else 4, rows), new(*hidden.shape) if jacobian else new(0),
    ]  # fmt: skip


@torch.library.custom_op("fused_align::linear_logp_backward", mutates_args=("main_grad",))
def _backward(
    dlogp: Tensor,  # [M]
    dentropy: Tensor | None,  # [M]
    dlse: Tensor | None,  # [M]
    daverage: Tensor | None,  # [M]
    hidden: Tensor,  # [M, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    target: Tensor,  # [M]
    temperature: Tensor | None,  # [M]
    main_grad: Tensor | None,  # [V, H], added to
    entropy: Tensor,  # [M] | [0]
    state: Tensor,  # [3 or 4, M]
    product: Tensor,  # [M, H] | [0]
    scalar_temperature: float,
    logit_scale: float,
    softcap: float | None,
    operand: torch.dtype | None,
    rounded: bool,
    backend: str,
    workspace_bytes: int | None,
    max_live: int | None,
    grad_hidden: bool,
    grad_weight: bool,
    grad_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> dhidden [M, H], dweight [V, H], dbias [V], each [0] where not needed."""
    head = Head(weight, bias, logit_scale, softcap, operand, rounded, backend)
    jacobian = product.numel() > 0
    every = Upstream(dlogp, dlse, dentropy, daverage)
    learnt = [name for name, d in (("entropy", dentropy), ("average", daverage)) if d is not None]
    live = target != IGNORE_INDEX
    rows = Rows.where(live, max_live)
    if not jacobian and max_live is None:
        places = live_places(rows.take(every.alive()))
        rows = rows if places.numel() == len(rows) else rows[places]
    y = check_range(rows.take(target), weight.shape[0])
    problem = make_problem(
        head, hidden, len(rows), stats=(), learnt=learnt, grad_hidden=grad_hidden,
        grad_head=grad_weight or grad_bias, main_grad=main_grad is not None, static=max_live is not None,
    )  # fmt: skip
    chosen = choose(problem, "jacobian" if jacobian else "recompute", workspace_bytes)
    up = Upstream(*(None if c is None else rows.take(c) for c in (dlogp, dlse, dentropy, daverage)))  # type: ignore[arg-type]
    temper = scalar_temperature if temperature is None else per_row(temperature, rows)
    whole = reload(head, y, temper, rows.take(state.t()).t().contiguous())
    if rows.valid is not None:  # padding, of which nothing was saved: E is 0 whatever the bias
        whole.ref = torch.where(rows.valid, whole.ref, FAR)
        whole.total = torch.where(rows.valid, whole.total, 1.0)
    known = None if dentropy is None else rows.take(entropy)
    coef = head.steps.coefficients(whole, up, known, vocab=weight.shape[0])
    means = None if daverage is None or softcap is not None else head.average(chosen.cols, problem.work)[0]
    parts = list(rows.split(chosen.rows))
    grads = [hidden.new_empty(0) for _ in range(3)]

    def chunk_of(part: Rows, at: slice) -> tuple[Chunk, Coefficients]:
        return whole.part(at, head.operands(part.take(hidden))), coef.part(at)

    def body(walk: Walk) -> None:
        into = Gradients(
            walk, hidden, (grad_hidden, grad_weight, grad_bias), main_grad=main_grad, average=means,
            by_slice=True, waiting=len(rows) if len(parts) > 1 and not chosen.apart else 0,
            padded=rows.valid is not None,
        )  # fmt: skip
        if jacobian:
            for part, at in parts:
                others = -up.logp[at] if up.lse is None else up.lse[at] - up.logp[at]
                into.add_jacobian(part, whole.part(at), part.take(product), others, coef.part(at))
        else:
            ends = Targets(walk, hidden, rows, y, coef.target, problem.static) if into.sliced else None
            into.add_all(parts, chunk_of, ends, apart=chosen.apart)
        for place, grad in enumerate(into.finish()):
            if grad is not None:
                grads[place] = grad

    run_walk(head, chosen, problem, body)
    return grads[0], grads[1], grads[2]


@_backward.register_fake
def _(
    dlogp, dentropy, dlse, daverage, hidden, weight, bias, target, temperature, main_grad, entropy, state,
    product, scalar_temperature, logit_scale, softcap, operand, rounded, backend, workspace_bytes, max_live,
    grad_hidden, grad_weight, grad_bias,
):  # fmt: skip
    def like(tensor, needed):
        return hidden.new_empty(tensor.shape if needed else 0, dtype=tensor.dtype if needed else hidden.dtype)

    return (
        like(hidden, grad_hidden),
        like(weight, grad_weight and main_grad is None),
        like(weight if bias is None else bias, grad_bias and bias is not None),
    )


def _setup(ctx, inputs, output) -> None:
    hidden, weight, bias, target, temperature, main_grad = inputs[:6]
    entropy, state, product = output[2], *output[5:]
    ctx.set_materialize_grads(False)  # zeros of product's size, for an output that no one differentiates
    ctx.save_for_backward(hidden, weight, bias, target, temperature, entropy, state, product)
    ctx.main_grad = main_grad  # not saved: other backwards may have added to it meanwhile
    ctx.options = inputs[6:14]
    ctx.learnt = inputs[16].split()


def _autograd(ctx, grads):
    dlogp, dlse, dentropy, daverage = grads[:4]
    *saved, entropy, state, product = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    if dlogp is None:
        dlogp = torch.zeros_like(state[0])
    # a traced backward gets zeros for every output
    dentropy = dentropy if "entropy" in ctx.learnt else None
    daverage = daverage if "average" in ctx.learnt else None
    found = torch.ops.fused_align.linear_logp_backward(
        dlogp, dentropy, dlse, daverage, *saved, ctx.main_grad, entropy, state, product, *ctx.options, *needs
    )
    into_main = ctx.main_grad is not None
    dhidden, dweight, dbias = (
        grad if need and not (into_main and place == 1) else None
        for place, (grad, need) in enumerate(zip(found, needs, strict=True))
    )
    return dhidden, dweight, dbias, *(None,) * 16


_forward.register_autograd(_autograd, setup_context=_setup)
