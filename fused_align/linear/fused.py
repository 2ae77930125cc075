"""Plans `single` and `window`: gradients formed during the forward, while a chunk's exponentials are at hand.

A chunk is some whole items (tokens, sequences or pairs). Its log-probs give its part of the loss and, by
autograd on [r]-sized vectors, the coefficients dLoss/dlogp; its gradient GEMMs run at once: 3 passes, where
a log-prob whose coefficient comes later needs 4.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..batch import Batch
from ..losses.base import Objective
from .ops import check_range, check_temperature, run_walk
from .passes import Gradients, Head, Index, Walk, coefficients, load
from .plan import Plan, Problem


class FusedLoss(torch.autograd.Function):
    """(hidden [M, H], weight, bias) -> loss [], logp [n] of the live rows (not differentiable)."""

    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        temperature: float | Tensor,  # [M]
        head: Head,
        objective: Objective,
        plan: Plan,
        problem: Problem,
    ) -> tuple[Tensor, Tensor]:
        needs = ctx.needs_input_grad[:3]
        batch = objective.batch
        everything = batch.rows.numel() == hidden.shape[0]
        head = Head(weight, bias, head.logit_scale, head.softcap, head.operand, head.rounded)
        grads = Gradients(head, hidden, batch.rows.numel(), needs, complete=True)
        logp = torch.zeros(batch.rows.numel(), dtype=problem.work, device=hidden.device)
        loss = torch.zeros((), dtype=torch.float64, device=hidden.device)
        if isinstance(temperature, Tensor):
            check_temperature(temperature[batch.rows])

        def body(walk: Walk) -> None:
            nonlocal loss
            done = 0
            for part, places, weights in chunks(objective, plan, problem.coupling):
                rows: Index = (
                    slice(places.start, places.stop)
                    if everything and isinstance(places, slice)
                    else part.rows
                )
                y = check_range(part.target, weight.shape[0])
                temper = temperature if not isinstance(temperature, Tensor) else temperature[rows]
                chunk = load(head, hidden, rows, y, temper)
                kept = walk.complete(y.numel())
                walk.forward(chunk, keep=kept)
                value = chunk.finish()[0].to(problem.work)
                if y is not part.target:
                    value = torch.where(y == part.target, value, torch.nan)
                logp[places] = value
                with torch.enable_grad():
                    leaf = value.detach().requires_grad_()
                    total = objective.total(leaf, part, weights)
                dlogp = torch.zeros_like(leaf)
                if total.requires_grad:  # a loss may be constant in these tokens
                    (dlogp,) = torch.autograd.grad(total, leaf)
                loss = loss + total.detach().double()
                scale = chunk.tame(dlogp)
                if bool((scale != 1).any()):
                    kept.mul_(scale[:, None])
                coef, mine = coefficients(chunk, dlogp), walk.by_tile(y)
                walk.backward(chunk, slice(done, done + y.numel()), coef, mine, grads, kept=kept)
                done += y.numel()

        run_walk(head, plan, problem, body)  # items without tokens count too, when there is none at all
        if not batch.rows.numel():
            grads.clear()
        ctx.grads = grads.finish()
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        ctx.mark_non_differentiable(logp)
        return loss.to(problem.work), logp

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss: Tensor, _dlogp: Tensor | None):  # type: ignore[override]
        if ctx.grads is None:
            raise RuntimeError(
                "align_loss: backward ran a second time. Plans 'single' and 'window' form the gradients in "
                "the forward and hand them over once; call align_loss again, or pass plan='recompute'."
            )
        grads, ctx.grads = ctx.grads, None
        # on a CPU reading the scalar costs nothing and saves a pass; elsewhere it would stall the device
        if dloss.device.type != "cpu" or dloss.item() != 1:
            for grad in grads:
                if grad is not None:
                    grad.mul_(dloss)
        grads = (None if g is None else g.to(dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True))
        return *grads, None, None, None, None, None


def chunks(
    objective: Objective, plan: Plan, coupling: str | None
) -> Iterator[tuple[Batch, slice | Tensor, Tensor]]:
    """Parts of the batch of at most plan.rows live tokens: (part, its places, its items' weights)."""
    batch, weights = objective.batch, objective.weights
    if coupling == "token":
        for start in range(0, batch.rows.numel(), plan.rows):
            index = torch.arange(start, min(start + plan.rows, batch.rows.numel()), device=batch.rows.device)
            place = slice(start, start + index.numel())
            yield batch.take_tokens(index), place, weights[place]
        return
    sizes = item_sizes(batch, coupling)
    start = 0
    while start < len(sizes):
        stop, rows = start, 0
        while stop < len(sizes) and (stop == start or rows + sizes[stop] <= plan.rows):
            rows += sizes[stop]
            stop += 1
        items = torch.arange(start, stop, device=batch.rows.device)
        part, places = batch.take_pairs(items) if coupling == "pair" else batch.take_sequences(items)
        yield part, places, weights[start:stop]
        start = stop


def item_sizes(batch: Batch, coupling: str | None) -> list[int]:
    """Live tokens of each item; one small copy to the host."""
    lengths = batch.lengths
    if coupling == "pair":
        lengths = batch.chosen(lengths) + batch.rejected(lengths)
    return lengths.tolist()
