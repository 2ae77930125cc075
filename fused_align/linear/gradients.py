"""Gradients under construction: dhidden, dweight and dbias from chunks of rows and their coefficients."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..backends.operands import Chunk, Coefficients, Head
from ..rows import Rows
from .passes import Walk

# A GEMM of fewer rows may add in another order than that of a whole chunk. Where logits are large, E that is
# built again would then not fit the sums of the first walk. So dead rows are dropped down to this many.
FEW = 16


class Gradients:
    """The gradients of one call, allocated once; chunks add to them.

    dweight is summed in the dtype of the logits and rounded once. Where the two dtypes are the same, or the
    caller gives main_grad, it is its own sum. Else a sum [V, H] is held; or, `sliced`, one slice of the
    vocabulary is finished over all chunks before the next begins, so that a slice is all there is to hold.
    dhidden of all rows then waits in `self.rows`, unless there is one chunk or the plan forms it apart.
    """

    def __init__(
        self,
        walk: Walk,
        hidden: Tensor,  # [M, H]
        needs: Sequence[bool],  # hidden, weight, bias
        *,
        main_grad: Tensor | None = None,  # [V, H]
        average: Tensor | None = None,  # [H] mean row of weight, where the mean logit has a gradient
        by_slice: bool,
        waiting: int = 0,  # rows whose dhidden waits for the last slice
        late: bool = False,  # the upstream gradient comes later
        padded: bool = False,  # Rows with padding, which write to a spare row
    ) -> None:
        self.walk, self.head, self.steps, self.average = walk, walk.head, walk.steps, average
        weight, work, device = self.head.weight, walk.work, hidden.device
        rows, size = hidden.shape

        def dtype(tensor: Tensor) -> torch.dtype:
            # scaling by the upstream gradient may lift it into float16's range
            return work if late and tensor.dtype == torch.float16 else tensor.dtype

        self.count = rows
        self.hidden = self.weight = self.bias = self.sum = self.rows = self.uniform = None
        if needs[0]:
            self.hidden = torch.zeros(rows + padded, size, dtype=dtype(hidden), device=device)
        if needs[1]:
            self.sum = main_grad
        if needs[1] and main_grad is None:
            self.weight = torch.empty(weight.shape, dtype=dtype(weight), device=device)
            if self.weight.dtype == work:
                self.sum = self.weight
            elif not by_slice:
                self.sum = torch.empty(weight.shape, dtype=work, device=device)
        self.sliced = self.weight is not None and self.sum is None
        if needs[2]:
            self.bias = torch.zeros(weight.shape[0], dtype=work, device=device)
        if self.sliced and self.hidden is not None and waiting:
            self.rows = torch.empty(waiting, size, dtype=work, device=device)
        if average is not None and needs[1]:
            self.uniform = torch.zeros(size, dtype=work, device=device)
        self.slice: Tensor | None = None
        # the first chunk writes a tile of dweight, the others add
        self.written = set() if main_grad is None else {start for start, _ in walk.tiles()}

    def add(
        self,
        rows: Rows,
        places: slice,  # of the chunk among the waiting rows
        chunk: Chunk,
        coef: Coefficients,
        *,
        kept: Tensor | None = None,  # [r', V], what forward kept; None: tiles are computed again
        live: Tensor | None = None,  # [r] the chunk's rows among those of kept; None: all
        only: int | None = None,  # the number of one tile; the last one completes dhidden
        ends: Targets | None = None,  # this is the only chunk: its slices of dweight are complete at once
        parts: tuple[bool, bool] = (True, True),  # dhidden; dweight and dbias
    ) -> None:
        """Adds the gradients of a chunk."""
        assert chunk.x is not None
        spans = self.walk.spans(chunk, coef, kept, live)
        scaled = None
        if parts[1] and (self.sum is not None or self.sliced):
            scaled = self.steps.scaled_rows(chunk.x, coef.rows, self.walk.gemm_dtype)
        dhidden = self._rows_of_hidden(rows, places) if parts[0] else None
        if parts[1] and only in (None, 0):
            self._add_vectors(rows, chunk, coef)
        for number, (start, stop) in enumerate(spans):
            if only not in (None, number):
                continue
            span = self.walk.gradient_tile(chunk, coef, start, stop, kept, live)
            if dhidden is not None:
                self.walk.gemm(dhidden, span, self.head.tile(start, stop)[0], start > 0)
            if self.bias is not None and parts[1]:
                self.steps.add_products(self.bias[start:stop], span, coef.rows)
            if scaled is not None:
                self._add_weight(start, span, scaled, ends)
        if scaled is not None and self.sum is not None:
            column = columns(rows, chunk.target, self.sum.shape[0])
            self.steps.add_hidden_rows(self.sum, column, chunk.x, coef.target)
        if dhidden is not None and only in (None, len(spans) - 1):
            self._store_hidden(rows, dhidden, coef.rows, chunk, coef)

    def _add_weight(self, first: int, span: Tensor, scaled: Tensor, ends: Targets | None) -> None:
        """Adds span^T [v, r] @ scaled [r, H] to dweight from row `first` on, slice by slice."""
        for start in range(first, first + span.shape[1], self.walk.cols):
            stop = min(start + self.walk.cols, first + span.shape[1])
            tile = span[:, start - first : stop - first]
            self.walk.gemm(self._part(start, stop), tile.t(), scaled, start in self.written)
            self.written.add(start)
            if ends is not None:
                self.round_slice(start, stop, ends)

    def add_all(
        self,
        parts: Sequence[tuple[Rows, slice]],
        chunk_of: Callable[[Rows, slice], tuple[Chunk, Coefficients]],
        ends: Targets | None,  # given if `sliced`
        *,
        apart: bool,
    ) -> None:
        """Adds the gradients of all chunks, computed again: chunk by chunk, or slice by slice if `sliced`."""
        if ends is None or len(parts) == 1:
            for part, at in parts:
                self.add(part, at, *chunk_of(part, at), ends=ends)
            return
        if apart:
            for part, at in parts:
                self.add(part, at, *chunk_of(part, at), parts=(True, False))
        for number, (start, stop) in enumerate(self.walk.tiles()):
            for part, at in parts:
                self.add(part, at, *chunk_of(part, at), only=number, parts=(not apart, True))
            self.round_slice(start, stop, ends)

    def _part(self, start: int, stop: int) -> Tensor:
        """Where a slice of dweight is summed."""
        if self.sum is not None:
            return self.sum[start:stop]
        if self.slice is None:
            shape = self.walk.cols, self.head.weight.shape[1]
            self.slice = torch.empty(shape, dtype=self.walk.work, device=self.head.weight.device)
        return self.slice[: stop - start]

    def _add_vectors(self, rows: Rows, chunk: Chunk, coef: Coefficients) -> None:
        assert chunk.x is not None
        if self.bias is not None:
            column = columns(rows, chunk.target, self.bias.numel())
            self.steps.add_hidden_rows(self.bias[:, None], column, None, coef.target)
            if coef.average is not None:
                self.bias.add_(coef.average.sum() / self.bias.numel())
        if self.uniform is not None and coef.average is not None:
            self.uniform.addmv_(chunk.x.t().to(self.walk.work), coef.average.to(self.walk.work))

    def _in_place(self, rows: Rows) -> bool:
        return (
            isinstance(rows.index, slice) and self.hidden is not None and self.hidden.dtype == self.walk.work
        )

    def _rows_of_hidden(self, rows: Rows, places: slice) -> Tensor | None:
        """Where dhidden of a chunk is summed: in place where it can be."""
        if self.hidden is None:
            return None
        if self._in_place(rows):
            return self.hidden[rows.index]  # a view
        if self.rows is not None:
            return self.rows[places]
        return self.hidden.new_empty(len(rows), self.hidden.shape[1], dtype=self.walk.work)

    def _store_hidden(
        self, rows: Rows, product: Tensor, scale: Tensor, chunk: Chunk, coef: Coefficients
    ) -> None:
        """Completes dhidden of a chunk: scale [r] * product [r, H] and what does not come through E."""
        assert self.hidden is not None
        self.steps.store_hidden(
            self.hidden, rows.index, product, scale, self.head, chunk.target, coef, self.average
        )

    def add_jacobian(
        self, rows: Rows, chunk: Chunk, product: Tensor, others: Tensor, coef: Coefficients
    ) -> None:
        """dhidden of a chunk: others [r] times product [r, H] = (1/Z) (E f) @ W, and the targets' rows."""
        if self.hidden is not None:
            self._store_hidden(rows, product, others, chunk, coef)

    def round_slice(self, start: int, stop: int, targets: Targets) -> None:
        """Writes a slice of dweight, complete now but for the targets in it."""
        part = self._part(start, stop)
        targets.add(part, start, self.head)
        if self.uniform is not None:
            part.add_(self.uniform, alpha=1 / self.head.weight.shape[0])
        if self.weight is not None:
            self.weight[start:stop] = part.to(self.weight.dtype)

    def finish(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """dhidden, dweight, dbias, in the dtypes of what they are gradients of; no dweight with main_grad."""
        if not self.written:  # no live row at all
            for grad in (self.weight, self.sum):
                if grad is not None:
                    grad.zero_()
        if self.sum is not None:
            if self.uniform is not None:
                self.sum.add_(self.uniform, alpha=1 / self.head.weight.shape[0])
            if self.weight is not None and self.weight is not self.sum:
                self.weight.copy_(self.sum)
        hidden = None if self.hidden is None else self.hidden[: self.count]
        bias = None if self.bias is None or self.head.bias is None else self.bias.to(self.head.bias.dtype)
        return hidden, self.weight, bias


class Targets:
    """The targets' columns of dweight by slices of the vocabulary, for gradients that are `sliced`."""

    def __init__(
        self, walk: Walk, hidden: Tensor, rows: Rows, target: Tensor, coef: Tensor, static: bool
    ) -> None:
        self.hidden, self.rows, self.coef = hidden, rows, coef
        self.target = columns(rows, target, walk.head.weight.shape[0])
        self.bounds, self.order = None, None
        if not static:  # one small copy to the host
            self.order = target.argsort(stable=True)
            edges = torch.arange(1, len(list(walk.tiles())) + 1, device=target.device) * walk.cols
            self.bounds = [0, *torch.searchsorted(target[self.order], edges).tolist()]
            self.cols = walk.cols

    def add(self, part: Tensor, start: int, head: Head) -> None:  # part [v, H]
        """part[y] += coef h for the rows whose target y lies in the slice that begins at start."""
        if self.bounds is None or self.order is None:
            mine = torch.arange(len(self.rows), device=part.device)
        else:
            number = start // self.cols
            mine = self.order[self.bounds[number] : self.bounds[number + 1]]
        column = self.target[mine] - start
        column = torch.where(column < 0, part.shape[0], column)  # in no slice but its own
        head.steps.add_hidden_rows(part, column, self.hidden, self.coef[mine], self.rows[mine], head)


def columns(rows: Rows, target: Tensor, vocab: int) -> Tensor:  # [r] -> [r]
    """Where the targets' gradients go; V for padding, which has none."""
    return target if rows.valid is None else torch.where(rows.valid, target, vocab)


def live_places(alive: Tensor) -> Tensor:  # [n] bool -> [k] int64
    """Places of the rows to build again: those alive and, where these are few, some others."""
    places = alive.nonzero().squeeze(1)
    if not 0 < places.numel() < FEW:
        return places
    return torch.sort(~alive, stable=True).indices[:FEW].sort().values
