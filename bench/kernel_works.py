"""What the suite `kernels` runs: each step that is a kernel, on inputs of a real size, without its GEMM.

A Work makes its inputs from a seed, for as many sets as it takes to miss the caches, and says how many bytes
its call must move: each input once, each output once. The call takes the steps of any backend: those of the
kernels, and torch's, which their results are held against.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import fused_align as fa
from fused_align.backends import torch_
from fused_align.backends.operands import LOG2E, Chunk, Coefficients, Head, Scratch, Upstream, reference

from .providers import LOSSES
from .reference import SEQUENCE, loss_of

FLOAT, HALF = torch.float32, torch.bfloat16
LAUNCH = 20e-6  # seconds that all launches of a loss may take together, at 16384 tokens


@dataclass(frozen=True)
class Made:
    """One set of inputs. call: steps of a backend -> what it found. nbytes: what it has to move."""

    call: Callable[[Any], tuple[Tensor | None, ...]]
    nbytes: int


@dataclass(frozen=True)
class Work:
    """name: kernel[variant]. launch: its name in Triton's tuning.py, if its block sizes stand there.

    seconds: what it is to stay below on a GPU, if its time is its launches' and not its bytes'.
    """

    name: str
    make: Callable[[int], Made]
    launch: str | None = None
    seconds: float | None = None


def size(*tensors: Tensor | None) -> int:
    return sum(x.nbytes for x in tensors if x is not None)


@dataclass(frozen=True)
class Sizes:
    """rows x cols: a tile of logits, as the planner has it on a GPU. tokens: of a whole step."""

    tokens: int
    hidden: int
    vocab: int
    rows: int
    cols: int
    device: str

    @classmethod
    def of(cls, tokens: int, hidden: int, vocab: int, device: str) -> Sizes:
        return cls(tokens, hidden, vocab, min(tokens, 8192), min(vocab // 2, 4096), device)

    # ---- tensors ----

    def generator(self, seed: int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(seed)

    def randn(self, seed: int, *shape: int, dtype: torch.dtype = FLOAT) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device).normal_(generator=self.generator(seed))

    def integers(self, seed: int, high: int, count: int) -> Tensor:
        return torch.randint(high, (count,), device=self.device, generator=self.generator(seed))

    # ---- what all sets of inputs share: too large to have many, or hardly read ----

    @cached_property
    def head(self) -> Head:
        return Head(self.randn(0, self.vocab, self.hidden, dtype=HALF).mul_(self.hidden**-0.5), None)

    @cached_property
    def x(self) -> Tensor:  # [r, H]
        return self.randn(1, self.rows, self.hidden, dtype=HALF)

    @cached_property
    def kept(self) -> Tensor:  # [r, V], exponentials
        found = torch.empty(self.rows, self.vocab, dtype=HALF, device=self.device)
        for part in found.split(256):
            part.copy_(torch.exp2(self.randn(2, *part.shape) - 58))
        return found

    @cached_property
    def scratch(self) -> Scratch:
        area = 4 * self.rows * self.cols
        memory = torch.empty(4 * area, dtype=torch.uint8, device=self.device)
        return Scratch(memory, area, FLOAT, memory[:0])

    def chunk(self, seed: int, *, moment: bool = False) -> Chunk:
        """Rows as a walk leaves them: S is what random logits give."""
        z = self.randn(seed, self.rows)
        ref, target = reference(z), self.integers(seed, self.vocab, self.rows)
        total = torch.exp2(math.log2(1.65 * self.vocab) - ref)
        found = Chunk(self.x, target, LOG2E, torch.ones_like(z), z, ref, total)
        if moment:
            found.pivot = found.offset()
            found.moment = total.double() * 1.5
        return found

    def coefficients(self, seed: int, rows: int, mixed: bool = False) -> Coefficients:
        c = self.randn(seed, rows)
        mix = (self.randn(seed + 1, rows), self.randn(seed + 2, rows)) if mixed else None
        return Coefficients(c, c.neg(), mix)


@contextmanager
def without_products() -> Iterator[None]:
    """The steps find their logits where a GEMM would have left them."""

    def leave(out: Tensor, *_: Tensor, alpha: float = 1.0, **__: object) -> None:
        if alpha != 1:
            out.mul_(alpha)

    before = torch_.gemm
    torch_.gemm = leave  # the kernels' steps call it too
    try:
        yield
    finally:
        torch_.gemm = before


# ---- tiles ----------------------------------------------------------------------------------------------


def exp_tiles(s: Sizes) -> Iterator[Work]:
    def work(name: str, out: str | None, **options: bool) -> Work:
        def make(seed: int) -> Made:
            tile, chunk = s.randn(seed, s.rows, s.cols), s.chunk(seed, moment=options.get("entropy", False))
            into = tile if out == "tile" else None
            if out == "bf16":
                into = torch.empty_like(tile, dtype=HALF)
            product = s.randn(seed, s.rows, s.hidden) if options.get("watch") else None
            bias = s.randn(seed, s.cols, dtype=HALF) if options.get("bias") else None
            head = replace(s.head, softcap=30.0) if options.get("softcap") else s.head
            if head.softcap is not None:
                chunk = replace(chunk, gain=head.softcap * LOG2E, slope=torch.ones_like(chunk.z))
            start = s.cols  # the second tile of the vocabulary

            def call(steps: Any) -> tuple[Tensor | None, ...]:
                steps.exp_tile(
                    head, chunk, s.head.weight[start : start + s.cols], bias, start, tile, into, product,
                    s.scratch, watch=options.get("watch", False), static=False,
                )  # fmt: skip
                return chunk.total, chunk.moment, into

            rows = size(chunk.target, chunk.ref, chunk.factor) + 2 * size(chunk.total, chunk.moment)
            return Made(call, size(tile, into, bias) + rows)

        return Work(f"exp_tile[{name}]", make, "exp_tile")

    yield work("sums", None)
    yield work("in place", "tile")
    yield work("to bf16", "bf16")
    yield work("to bf16, watched", "bf16", watch=True)
    yield work("sums, entropy", None, entropy=True)
    yield work("to bf16, softcap", "bf16", softcap=True)
    yield work("to bf16, bias", "bf16", bias=True)


def grad_tiles(s: Sizes) -> Iterator[Work]:
    def work(name: str, mixed: bool) -> Work:
        def make(seed: int) -> Made:
            tile, chunk = s.randn(seed, s.rows, s.cols), s.chunk(seed)
            coef = s.coefficients(seed, s.rows, mixed)
            out, start = torch.empty_like(tile, dtype=HALF), s.cols

            def call(steps: Any) -> tuple[Tensor | None, ...]:
                weight = s.head.weight[start : start + s.cols]
                steps.grad_tile(s.head, chunk, coef, weight, None, start, tile, out, s.scratch)
                return (out,)

            return Made(call, size(tile, out, chunk.target, chunk.ref, *(coef.mix or ())))

        return Work(f"grad_tile[{name}]", make, "grad_tile")

    yield work("to bf16", False)
    yield work("to bf16, entropy", True)


def kept_tiles(s: Sizes) -> Iterator[Work]:
    def work(name: str, listed: bool) -> Work:
        def make(seed: int) -> Made:
            chunk = s.chunk(seed)
            live, ref = None, chunk.ref + 1
            if listed:  # half of the rows, whose references have not moved
                live = s.randn(seed, s.rows).argsort()[: max(1, s.rows // 2)].sort().values
                chunk = chunk.part(live)
                ref = chunk.ref
            tiles = s.vocab // s.cols
            kept = s.kept[:, (first := s.cols * (seed % tiles)) : first + s.cols]
            out = torch.empty(chunk.z.numel(), s.cols, dtype=HALF, device=s.device)
            coef = s.coefficients(seed, chunk.z.numel())

            def call(steps: Any) -> tuple[Tensor | None, ...]:
                steps.kept_tile(chunk, coef, ref, kept, live, out, s.scratch)
                return (out,)

            return Made(call, 2 * size(out) + size(live))

        return Work(f"kept_tile[{name}]", make, "kept_tile")

    yield work("half of the rows", True)
    yield work("all rows, moved", False)


# ---- rows of size H -------------------------------------------------------------------------------------


def hidden_rows(s: Sizes) -> Iterator[Work]:
    def scaled(seed: int) -> Made:
        x, c = s.randn(seed, s.rows, s.hidden, dtype=HALF), s.randn(seed, s.rows)
        return Made(lambda steps: (steps.scaled_rows(x, c, HALF),), 2 * size(x) + size(c))

    def closed(seed: int) -> Made:
        product, chunk = s.randn(seed, s.rows, s.hidden), s.chunk(seed)
        # 1 / Z of about 1: a call after the other multiplies the same product
        chunk = replace(chunk, ref=(chunk.z.double() * LOG2E).float(), total=torch.full_like(chunk.z, 1e-3))

        def call(steps: Any) -> tuple[Tensor | None, ...]:
            steps.close_product(product, chunk)
            return (product,)

        return Made(call, 2 * size(product) + size(chunk.z, chunk.ref, chunk.total, chunk.factor))

    def stored(seed: int) -> Made:
        product, c = s.randn(seed, s.rows, s.hidden), s.coefficients(seed, s.rows)
        out = torch.zeros(s.tokens, s.hidden, dtype=HALF, device=s.device)
        index = s.randn(seed, s.tokens).argsort()[: s.rows].sort().values
        target, scale = s.integers(seed, s.vocab, s.rows), s.randn(seed, s.rows)

        def call(steps: Any) -> tuple[Tensor | None, ...]:
            steps.store_hidden(out, index, product, scale, s.head, target, c, None)
            return (out,)

        written = HALF.itemsize * product.numel()
        return Made(call, size(product, index, target, scale, c.target) + 2 * written)

    def opened(seed: int) -> Made:
        x, target = s.randn(seed, s.rows, s.hidden, dtype=HALF), s.integers(seed, s.vocab, s.rows)
        call = lambda steps: steps.open_rows(s.head, x, target, 1.0, FLOAT)[:1]  # noqa: E731
        return Made(call, 2 * size(x) + size(target) + 2 * 4 * s.rows)

    yield Work("scaled_rows", scaled, "scaled_rows")
    yield Work("close_product", closed, "close_product")
    yield Work("store_hidden", stored, "store_hidden")
    yield Work("open_rows", opened, "open_rows")
    yield Work("add_rows[with its sort]", _added(s, False), "add_rows")
    yield Work("add_rows", _added(s, True), "add_rows")


def _added(s: Sizes, sorted_already: bool) -> Callable[[int], Made]:
    """The targets' rows of dweight, in a slice of twice as many columns as there are rows."""

    def make(seed: int) -> Made:
        x, c = s.randn(seed, s.rows, s.hidden, dtype=HALF), s.randn(seed, s.rows)
        out = torch.zeros(2 * s.rows, s.hidden, device=s.device)
        column = s.integers(seed, 2 * s.rows, s.rows)
        rising, order = column.sort(stable=True)

        def call(steps: Any) -> tuple[Tensor | None, ...]:
            if steps is torch_ or not sorted_already:
                steps.add_hidden_rows(out, column, x, c)
            else:
                steps.launches.add_rows(
                    (s.rows, s.hidden), out, rising, order, c, x, None, s.rows, s.rows, *out.shape,
                    *out.stride(), *x.stride(), OPERAND=None,
                )  # fmt: skip
            return (out,)

        touched = 4 * s.hidden * int(column.unique().numel())
        return Made(call, size(x, c, rising, order) + 2 * touched)

    return make


# ---- vectors --------------------------------------------------------------------------------------------


def vectors(s: Sizes) -> Iterator[Work]:
    def finished(seed: int) -> Made:
        chunk = s.chunk(seed, moment=True)
        read = size(chunk.z, chunk.ref, chunk.total, chunk.moment, chunk.pivot)
        return Made(lambda steps: (steps.finish_rows(chunk),), read + 5 * size(chunk.z))

    def weighed(seed: int) -> Made:
        chunk, c = s.chunk(seed), s.randn(seed, s.rows)
        c = torch.where(c.abs() < 0.5, 0.0, c)  # rows that are dropped

        def call(steps: Any) -> tuple[Tensor | None, ...]:
            found = steps.coefficients(chunk, Upstream(c), None, vocab=s.vocab)
            return found.rows, found.target, found.counts

        return Made(call, size(chunk.z, chunk.ref, chunk.total, chunk.factor, c) + (4 * 4 + 4 + 8) * s.rows)

    def added(seed: int) -> Made:
        tile, c = s.randn(seed, s.rows, s.cols, dtype=HALF), s.randn(seed, s.rows)
        out = torch.zeros(s.cols, device=s.device)

        def call(steps: Any) -> tuple[Tensor | None, ...]:
            steps.add_products(out, tile, c)
            return (out,)

        return Made(call, size(tile, c, out))

    yield Work("add_products", added, "add_products")
    yield Work("finish_rows", finished, "finish_rows")
    yield Work("coefficients and compact", weighed)


# ---- losses ---------------------------------------------------------------------------------------------


def losses(s: Sizes) -> Iterator[Work]:
    """Many short sequences, a few long ones, and as few as can be: a program has a sequence, or a pair."""
    for name, kernel in (("grpo", "policy_loss"), ("gspo", "policy_loss"), ("dpo", "preference_loss"),
                         ("kto", "judged_loss")):  # fmt: skip
        for count in dict.fromkeys((s.tokens // SEQUENCE, 8, 2 if name == "dpo" else 1)):
            title = f"{kernel}[{name}, {count} x {s.tokens // count}]"
            yield Work(title, _loss(s, name, count), seconds=LAUNCH if s.tokens <= 16384 else None)


def _loss(s: Sizes, name: str, count: int) -> Callable[[int], Made]:
    """A whole loss of padded log-probs: value, coefficients and the sums of its metrics."""

    def make(seed: int) -> Made:
        shape = count, s.tokens // count
        target = s.integers(seed, s.vocab, s.tokens).masked_fill(s.randn(seed, s.tokens) < -1, -100)
        logp = s.randn(seed, s.tokens).sub_(9)
        anchor = logp - 0.1 * s.randn(seed + 1, s.tokens)
        even = torch.arange(count, device=s.device) % 2 == 0
        advantage, kl = s.randn(seed, count), torch.full((), 0.1, device=s.device)
        given: dict[str, Any] = {"advantage": advantage, "desirable": even, "kl": kl}
        batch = fa.Batch(
            target.view(shape), old_logp=anchor.view(shape), ref_logp=anchor.view(shape), **given
        )
        divisor = float(count // 2 if name == "dpo" else count)

        def call(steps: Any) -> tuple[Tensor | None, ...]:
            if steps is torch_:
                wide = logp.double().requires_grad_()
                plain: Any = SimpleNamespace(target=target, old_logp=anchor, ref_logp=anchor, **given)
                return _with_gradient(loss_of(name, wide, plain, False, shape[1]), wide)
            kernel = steps.loss_kernel(LOSSES[name], None)
            found = kernel.evaluate(logp.view(shape), batch, divisor)
            return found.loss, found.c.view(-1)

        columns = 2 if name == "kto" or name == "dpo" else 3  # log-probs, their anchors, c
        return Made(call, size(target) + (columns + 1) * size(logp))

    return make


def _with_gradient(value: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    return value.detach(), torch.autograd.grad(value, at)[0]


# ---- logits that exist ----------------------------------------------------------------------------------


def whole_logits(s: Sizes) -> Iterator[Work]:
    rows = min(s.rows, 4096)

    def inputs(seed: int) -> tuple[Tensor, Tensor]:
        return s.randn(seed, rows, s.vocab, dtype=HALF), s.integers(seed, s.vocab, rows)

    def forward(entropy: bool) -> Callable[[int], Made]:
        def make(seed: int) -> Made:
            logits, target = inputs(seed)

            def call(steps: Any) -> tuple[Tensor | None, ...]:
                found = steps.logit_stats(logits, target, None, 1.0, entropy=entropy)
                return found.logp, found.lse, found.entropy

            return Made(call, size(logits, target) + (4 + entropy) * 4 * rows)

        return make

    def backward(in_place: bool) -> Callable[[int], Made]:
        def make(seed: int) -> Made:
            logits, target = inputs(seed)
            c = s.randn(seed, rows)
            stats = torch_.logit_stats(logits, target, None, 1.0)
            out = logits if in_place else torch.empty_like(logits)

            def call(steps: Any) -> tuple[Tensor | None, ...]:
                steps.logit_gradient(c, None, None, logits, target, stats, None, 1.0, out=out)
                return (out,)

            return Made(call, size(logits, out, target, c) + 4 * 4 * rows)

        return make

    yield Work("logit_stats", forward(False))
    yield Work("logit_stats[entropy]", forward(True))
    yield Work("logit_gradient", backward(False))
    yield Work("logit_gradient[in place]", backward(True))


def works(s: Sizes) -> list[Work]:
    """All of them, the heavy ones first."""
    found: list[Work] = []
    for group in (exp_tiles, grad_tiles, kept_tiles, hidden_rows, whole_logits, losses, vectors):
        found += group(s)
    return found
