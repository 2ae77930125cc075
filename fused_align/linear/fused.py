"""Plans `single` and `window`: gradients formed during the forward, while a chunk's exponentials are at hand.

A chunk is some whole items (tokens, sequences or pairs). Its log-probs give its part of the loss and, by
autograd on [r]-sized vectors, the coefficients dLoss/dlogp; rows whose coefficient is 0 are dropped, and the
gradient GEMMs of the others run at once: 3 passes at most, where a log-prob whose coefficient comes later
needs 4. An item with more tokens than a chunk holds is walked in parts, whose tiles are computed again.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..backends.operands import STATS, Chunk, Coefficients, Head, Upstream
from ..batch import Batch
from ..losses.base import Objective, Some
from ..rows import Rows
from .gradients import Gradients, Targets, live_places
from .ops import check_range, check_temperature, per_row, run_walk
from .passes import Walk, load
from .plan import Plan, Problem

if TYPE_CHECKING:
    from ..backends.kernel_losses import Evaluated, LossKernel

PROMISE = 1e-5  # how far from grad_scale the upstream gradient may be: factors are multiplied in float32


@dataclass(frozen=True)
class Call:
    """What does not change between the chunks of one call."""

    head: Head
    objective: Objective
    plan: Plan
    problem: Problem
    temperature: float | Tensor  # [M]
    main_grad: Tensor | None = None  # [V, H]
    grad_scale: float | None = None
    kernel: LossKernel | None = None  # of the objective; None: autograd on [r]-sized vectors


class FusedLoss(torch.autograd.Function):
    """(hidden [M, H], weight, bias) -> loss [], and STATS [5, n] of the live rows (not differentiable)."""

    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: Call
    ) -> tuple[Tensor, Tensor]:
        # the tensors as autograd hands them over: detached
        call = replace(call, head=replace(call.head, weight=weight, bias=bias))
        run = _Run(call, hidden, ctx.needs_input_grad[:3])
        run_walk(call.head, call.plan, call.problem, run.all)
        ctx.grads, ctx.grad_scale = run.grads, call.grad_scale
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        ctx.mark_non_differentiable(run.stats)
        return run.loss.to(call.problem.work), run.stats

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss: Tensor, _dstats: Tensor | None):  # type: ignore[override]
        if ctx.grads is None:
            raise RuntimeError(
                "align_loss: backward ran a second time. Plans 'single' and 'window' form the gradients in "
                "the forward and hand them over once; call align_loss again, or pass plan='recompute'."
            )
        grads, ctx.grads = ctx.grads, None
        known = 1.0 if ctx.grad_scale is None else ctx.grad_scale
        # on a CPU reading the scalar costs nothing and saves a pass; elsewhere it would stall the device
        on_cpu = dloss.device.type == "cpu"
        off = abs(dloss.item() - known) if on_cpu and ctx.grad_scale is not None else 0.0
        if PROMISE * abs(known) < off < float("inf"):  # inf and NaN are an overflow of the scale
            raise RuntimeError(
                f"align_loss: the loss was multiplied by {dloss.item():.8g} before backward, and grad_scale="
                f"{known:.8g} was promised; the gradients are formed with that already. Pass the factor "
                "as grad_scale."
            )
        if ctx.grad_scale is None and not (on_cpu and dloss.item() == 1):
            for grad in grads:
                if grad is not None:
                    grad.mul_(dloss)
        grads = (None if g is None else g.to(dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True))
        return *grads, None


def fused_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, call: Call
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss [], by `FusedLoss`, and its metrics.

    A compiler that went on into the walks would meet views of one workspace in several dtypes, and gives up
    on those (torch 2.13).
    """
    value, found = _opaque(FusedLoss.apply)(hidden, weight, bias, call)
    objective = call.objective
    stats: dict[str, Tensor] = dict(zip(STATS, found.unbind(0), strict=True))
    if call.kernel is None:
        return objective.evaluate({name: stats[name] for name in ("logp", *objective.loss.reads)}, value)
    count = objective.parts[0].count
    sums = _opaque(call.kernel.evaluate)(stats["logp"], objective.batch, count, grad=False)
    return objective.checked(value), call.kernel.metrics(sums, objective.batch)


class KernelLoss(torch.autograd.Function):
    """(logp, ...) -> loss [] by the kernel of the loss, which finds dloss/dlogp in the same launch."""

    @staticmethod
    def forward(ctx, logp: Tensor, found: Evaluated) -> Tensor:
        ctx.c = found.c
        return found.loss.to(logp.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss: Tensor):  # type: ignore[override]
        return ctx.c * dloss, None


def kernel_loss(
    kernel: LossKernel, logp: Tensor, batch: Batch, objective: Objective
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss [], differentiable by logp, and its metrics; of the batch as it was given."""
    found = _opaque(kernel.evaluate)(logp, batch, objective.parts[0].count, grad=logp.requires_grad)
    value: Tensor = KernelLoss.apply(logp, found)  # type: ignore[assignment]
    return objective.checked(value), kernel.metrics(found, batch)


def _opaque(function: Callable[..., Any]) -> Callable[..., Any]:
    """Run eagerly under torch.compile too: losses are Python, so the graph breaks here in any case.

    Where the compiler is not loaded it is not imported.
    """
    dynamo = sys.modules.get("torch._dynamo")
    return function if dynamo is None else dynamo.disable(function)


@dataclass(frozen=True)
class _Walked:
    stats: Tensor  # [5, r], as STATS
    loss: Tensor  # []
    coef: Coefficients
    ref: Tensor  # [r] the references before steep coefficients moved some


class _Run:
    """The forward of one call: chunk after chunk, their losses and their gradients."""

    def __init__(self, call: Call, hidden: Tensor, needs: tuple[bool, bool, bool]) -> None:
        self.call, self.hidden, self.needs = call, hidden, needs
        batch, work = call.objective.batch, call.problem.work
        self.reads = ("logp", *call.objective.loss.reads)
        self.stats = torch.zeros(len(STATS), batch.rows.numel(), dtype=work, device=hidden.device)
        self.loss = torch.zeros((), dtype=torch.float64, device=hidden.device)
        self.grads: tuple[Tensor | None, ...] = ()
        # all of it before anything is added to main_grad
        self.target = check_range(batch.target, call.problem.vocab)
        if isinstance(call.temperature, Tensor):
            rows = Rows(batch.rows, call.problem.given, batch.valid)
            check_temperature(per_row(call.temperature, rows))  # type: ignore[arg-type]

    def all(self, walk: Walk) -> None:
        call, problem = self.call, self.call.problem
        self.average = call.head.average(walk.cols, problem.work) if "average" in self.reads else None
        into = Gradients(
            walk, self.hidden, self.needs, main_grad=call.main_grad,
            average=None if self.average is None or problem.capped else self.average[0],
            by_slice=problem.rows <= call.plan.rows, late=call.grad_scale is None,
            padded=problem.static,
        )  # fmt: skip
        for part, some in chunks(call.objective, call.plan.rows, problem):
            places = some.tokens
            everything = len(part.rows) and problem.rows == problem.given and isinstance(places, slice)
            rows = Rows(places if everything and not problem.static else part.rows, problem.given, part.valid)
            pieces = list(rows.split(call.plan.rows))
            if len(pieces) > 1:
                self._apart(walk, into, part, some, rows, pieces)
            else:
                self._together(walk, into, part, some, rows)
        self.grads = into.finish()

    def _load(self, places: slice | Tensor, rows: Rows, at: slice) -> Chunk:
        call = self.call
        x, y = rows.take(self.hidden), self.target[places][at]
        heat = per_row(call.temperature, rows)
        return load(call.head, x, y, heat, stats=self.reads, average=self.average, valid=rows.valid)

    def _stats(self, chunk: Chunk, target: Tensor) -> Tensor:  # -> [5, r]
        found = self.call.head.steps.finish_rows(chunk)
        if self.target is not self.call.objective.batch.target:  # not checked, but made safe
            found[0] = torch.where(chunk.target == target, found[0], torch.nan)
        return found

    def _upstream(self, stats: Tensor, part: Batch, some: Some) -> tuple[Tensor, Upstream]:
        """The part of the loss of whole items, and its gradients by their statistics."""
        scale = 1.0 if self.call.grad_scale is None else self.call.grad_scale
        if self.call.kernel is not None:
            count = self.call.objective.parts[0].count
            found = self.call.kernel.evaluate(stats[0], part, count, metrics=False)
            assert found.c is not None
            return found.loss, Upstream(found.c if scale == 1 else found.c * scale)
        weights = self.call.objective.weights_of(some)
        with torch.enable_grad():
            read = {name: stat for name, stat in zip(STATS, stats, strict=True) if name in self.reads}
            learnt = "logp", *self.call.objective.loss.learnt
            leaves = {name: read[name].detach().requires_grad_() for name in learnt}
            total = self.call.objective.total(read | leaves, part, weights)
        up: dict[str, Tensor] = {}
        if total.requires_grad:  # a loss may be constant in these tokens
            found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
            up = {name: grad * scale for name, grad in zip(leaves, found, strict=True) if grad is not None}
        return total.detach().double(), Upstream(up.pop("logp", torch.zeros_like(stats[0])), **up)

    def _together(self, walk: Walk, into: Gradients, part: Batch, some: Some, rows: Rows) -> None:
        """Whole items that fit: their exponentials are kept, and those of live rows multiplied."""
        chunk = self._load(some.tokens, rows, slice(None))
        kept = walk.complete(len(rows))
        walk.walk(chunk, kept, None, watch=walk.watches)
        found = self._evaluate(chunk, part, some)
        count, moved = len(rows), True
        if not self.call.problem.static:
            count, lost, moved = found.coef.tally()  # one small copy to the host
            if lost and not walk.watches:
                chunk.restart(self.call.head)
                walk.walk(chunk, kept, None, watch=True)
                found = self._evaluate(chunk, part, some)
                count, _, moved = found.coef.tally()
        if not moved:
            chunk.ref = found.ref
        self.loss += found.loss
        self.stats[:, some.tokens] = found.stats
        if not count:
            return
        coef, live = found.coef, None
        if count < len(rows):
            assert coef.order is not None
            live = coef.order[:count]
            rows, chunk, coef = rows[live], chunk.part(live), coef.part(live)
        ends = None
        if into.sliced:
            ends = Targets(walk, self.hidden, rows, chunk.target, coef.target, self.call.problem.static)
        into.add(rows, slice(0), chunk, coef, kept=kept, live=live, ends=ends)

    def _evaluate(self, chunk: Chunk, part: Batch, some: Some) -> _Walked:
        """A chunk's loss and coefficients after its walk."""
        stats, ref = self._stats(chunk, part.target), chunk.ref
        loss, up = self._upstream(stats, part, some)
        return _Walked(stats, loss, self._coefficients(chunk, up, stats), ref)

    def _coefficients(self, chunk: Chunk, up: Upstream, stats: Tensor) -> Coefficients:
        entropy = stats[STATS.index("entropy")]
        return self.call.head.steps.coefficients(chunk, up, entropy, vocab=self.call.problem.vocab)

    def _apart(
        self,
        walk: Walk,
        into: Gradients,
        part: Batch,
        some: Some,
        rows: Rows,
        pieces: list[tuple[Rows, slice]],
    ) -> None:
        """One item too large to keep: walked piece by piece, and again once its coefficients are known."""
        walked, found = [], []
        for piece, at in pieces:
            chunk = self._load(some.tokens, piece, at)
            walk.forward(chunk)
            found.append(self._stats(chunk, part.target[at]))
            walked.append(replace(chunk, x=None))
        stats = torch.cat(found, 1)
        loss, up = self._upstream(stats, part, some)
        self.loss += loss
        self.stats[:, some.tokens] = stats
        for (piece, at), chunk in zip(pieces, walked, strict=True):
            own = up.part(at)
            live = live_places(own.alive())
            if not live.numel():
                continue
            coef = self._coefficients(chunk, own, stats[:, at])
            piece = piece[live]
            x = self.call.head.operands(piece.take(self.hidden))
            into.add(piece, slice(0), chunk.part(live, x), coef.part(live))


def chunks(objective: Objective, most: int, problem: Problem) -> Iterator[tuple[Batch, Some]]:
    """Parts of the batch of at most `most` live tokens, and which these are.

    An item with more tokens is a part of its own.
    """
    batch = objective.batch
    if problem.coupling == "token":
        for start in range(0, batch.rows.numel(), most):
            index = torch.arange(start, min(start + most, batch.rows.numel()), device=batch.rows.device)
            place = slice(start, start + index.numel())
            yield batch.take_tokens(index), Some(place)
        return
    sizes, start = problem.sizes, 0
    pairs = problem.coupling == "pair"
    while start < len(sizes):
        stop, rows = start, 0
        while stop < len(sizes) and (stop == start or rows + sizes[stop] <= most):
            rows += sizes[stop]
            stop += 1
        index = torch.arange(start, stop, device=batch.rows.device)
        part, places = batch.take_pairs(index, rows) if pairs else batch.take_sequences(index, rows)
        sequences = torch.cat([index, index + batch.pairs]) if pairs else index
        yield part, Some(places, sequences, slice(start, stop))
        start = stop


def item_sizes(batch: Batch, coupling: str | None) -> list[int]:
    """Live tokens of each item; one small copy to the host."""
    lengths = batch.lengths
    if coupling == "pair":
        lengths = batch.chosen(lengths) + batch.rejected(lengths)
    return lengths.tolist()
