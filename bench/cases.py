"""What is benchmarked: cases, their tensors, and named lists of cases (suites).

The tensors come from fixed seeds on the CPU, so that every provider, process and device sees the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import product
from typing import Any

import torch
from torch import Tensor

from fused_align import backends

from .reference import IGNORE, SEQUENCE, Log, true_log

SHAPES = {  # hidden size, vocabulary of the head
    "SmolLM2-135M": (576, 49152),
    "Qwen2.5-0.5B": (896, 151936),
    "Qwen2.5-7B": (3584, 152064),
    "Llama-3-8B": (4096, 128256),
    "Gemma-3-1B": (1152, 262144),
    "Gemma-2B": (2048, 256000),
}
LOSSES = ("sft", "dpo", "ipo", "kto", "grpo", "gspo")
PER_TOKEN = ("score", "frozen", "trainable")
MODES = (*PER_TOKEN, *LOSSES, *(f"{loss}-frozen" for loss in LOSSES))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEAD_BY = ("sequences", "humanline")
ANCHORED = ("dpo", "ipo", "kto", "grpo", "gspo")  # losses of a log-ratio, which Humanline can clip


@dataclass(frozen=True)
class Case:
    """One computation.

    shape: name of the head's shape. rows: tokens N, ignored ones included. hidden, vocab: H, V.
    dtype: of hidden and weight. logits: "randn", N(0, 1), or "peaked", like a trained model's: `operands`.
    mode: "score" (log-probs, no gradient), "frozen" and "trainable" (log-probs and, for coefficients
        dloss/dlogp drawn at random, the gradient of hidden, of hidden and weight), or a whole loss with a
        trainable head, or with a frozen one ("dpo-frozen").
    live: share of each sequence's tokens that are not ignored; the prompt, at its start, is ignored.
    dead: share of zero coefficients among the live tokens. dead_by: "sequences" (GRPO's advantage, or the
        coefficients of "frozen" and "trainable", are exactly 0 in that share of the sequences) or "humanline"
        (Humanline clips, and that share of the tokens' log-ratios lies outside its bounds).
    """

    shape: str
    rows: int
    hidden: int
    vocab: int
    dtype: str
    logits: str
    mode: str
    live: float = 1.0
    dead: float = 0.0
    dead_by: str = "sequences"

    def __post_init__(self) -> None:
        for name, allowed in (("dtype", DTYPES), ("logits", ("randn", "peaked")), ("mode", MODES),
                              ("dead_by", DEAD_BY)):  # fmt: skip
            if getattr(self, name) not in allowed:
                raise ValueError(f"Case: {name} must be one of {list(allowed)}; got {getattr(self, name)!r}.")
        if self.rows % (2 * SEQUENCE) or self.rows <= 0:
            raise ValueError(
                f"Case: rows must be a multiple of {2 * SEQUENCE}, pairs of sequences of {SEQUENCE} tokens; "
                f"got {self.rows}."
            )
        if not 0 < self.live <= 1 or not 0 <= self.dead < 1:
            raise ValueError(
                f"Case: live must be in (0, 1] and dead in [0, 1); got {self.live} and {self.dead}."
            )
        if self.dead and not self.can_be_dead:
            raise ValueError(f"Case: no coefficient of {self.mode} can be zero by {self.dead_by}.")

    @property
    def can_be_dead(self) -> bool:
        if self.dead_by == "humanline":
            return self.loss in ANCHORED
        return self.loss in ("grpo", "gspo") or self.mode in ("frozen", "trainable")

    @property
    def loss(self) -> str | None:
        """The whole loss, or None for a per-token mode."""
        return None if self.mode in PER_TOKEN else self.mode.split("-")[0]

    @property
    def grad_hidden(self) -> bool:
        return self.mode != "score"

    @property
    def grad_weight(self) -> bool:
        return self.grad_hidden and not self.mode.endswith("frozen")

    @property
    def passes(self) -> int:
        """GEMM passes that an exact method needs at least: logits, dhidden, dweight."""
        return 1 + self.grad_hidden + self.grad_weight

    @property
    def humanline(self) -> bool:
        return self.dead > 0 and self.dead_by == "humanline"

    @property
    def live_rows(self) -> int:
        return self.rows // SEQUENCE * _live_of(self.live)

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def label(self) -> str:
        """One line that names the case."""
        parts = [
            f"{self.shape} {self.rows} x {self.hidden} x {self.vocab}",
            self.dtype,
            self.logits,
            self.mode,
        ]
        parts += [f"live {self.live:g}"] * (self.live < 1)
        parts += [f"dead {self.dead:g} by {self.dead_by}"] * (self.dead > 0)
        return ", ".join(parts)

    def fields(self) -> dict[str, object]:
        return asdict(self)


def of_shape(shape: str, rows: int, dtype: str = "float32", logits: str = "randn", mode: str = "sft") -> Case:
    """A case with the head of a real model."""
    hidden, vocab = SHAPES[shape]
    return Case(shape, rows, hidden, vocab, dtype, logits, mode)


# ---- tensors --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inputs:
    """The tensors of a case. Sequence i is chosen and i + S/2 rejected; even sequences are desirable."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    target: Tensor  # [N] int64, -100 ignored
    coefficients: Tensor  # [N] float32: dloss/dlogp of the per-token modes
    ref_logp: Tensor  # [N] float32
    old_logp: Tensor  # [N] float32
    advantage: Tensor  # [S] float32
    desirable: Tensor  # [S] bool
    kl: Tensor  # []: KTO's reference point z0
    cu_seqlens: Tensor  # [S+1] int64
    true: Log  # float64 log-probs and logsumexps, which the anchors are made from and the gate reads


def operands(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [N, H], weight [V, H] in float32 and target [N] on the CPU; logits are N(0, 1) for "randn".

    peaked: hidden rows lie near the weight row of their target, as a trained model's do, so that most
    exponents are far below zero; on such logits a naive exp is slow and randn does not show it.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(case.vocab, case.hidden, generator=generator) / math.sqrt(case.hidden)
    hidden = torch.randn(case.rows, case.hidden, generator=generator)
    target = torch.randint(0, case.vocab, (case.rows,), generator=generator)
    if (
        case.logits == "peaked"
    ):  # the target's logit leads by about 8 for half of the rows and by 40 for others
        lead = torch.where(torch.arange(case.rows) % 2 == 0, 8.0, 40.0)
        hidden = 3 * hidden + lead[:, None] * weight[target]
    return hidden, weight, target


def make_inputs(case: Case, device: str) -> Inputs:
    """The case's tensors on a device."""
    # what does not depend on the mode is kept between the modes of a shape
    plain = replace(case, mode="score", dead=0.0, dead_by="sequences")
    hidden, weight, target, true = _base(plain, device)
    rows, sequences = case.rows, case.rows // SEQUENCE
    generator = torch.Generator().manual_seed(1)
    coefficients = torch.randn(rows, generator=generator)
    # log-ratios within +-0.1: GRPO's own clip at 0.2 would zero the coefficients of some tokens unasked
    ratio = 0.2 * torch.rand(rows, generator=generator) - 0.1
    advantage = torch.linspace(0.2, 1, sequences) * torch.where(torch.arange(sequences) % 2 == 0, 1, -1)
    if case.dead and case.dead_by == "sequences":
        zero = _share(sequences, case.dead)
        advantage[zero] = 0
        coefficients[zero.repeat_interleave(SEQUENCE)] = 0
    elif case.dead:  # 3 nats above and below in turn, so that a sequence's sum stays in the loss's range
        clipped = _share(rows, case.dead)
        ratio = torch.where(clipped, 3.0 * (1 - 2 * (clipped.cumsum(0) % 2)), ratio)
    anchor = true.logp.float() - ratio.to(device)
    return Inputs(
        hidden, weight, target, coefficients.to(device), ref_logp=anchor, old_logp=anchor,
        advantage=advantage.to(device), desirable=(torch.arange(sequences) % 2 == 0).to(device),
        kl=torch.tensor(0.1, device=device),
        cu_seqlens=torch.arange(0, rows + 1, SEQUENCE, device=device), true=true,
    )  # fmt: skip


def without_reference(inputs: Inputs) -> Inputs:
    """The same with reference log-probs of 0, for peers that cannot take them.

    z0 then is the mean log-prob of a sequence, or KTO's sigmoids would all saturate.
    """
    summed = inputs.true.logp.view(-1, SEQUENCE).sum(1)
    return replace(inputs, ref_logp=torch.zeros_like(inputs.ref_logp), kl=summed.mean().float())


def _share(count: int, share: float) -> Tensor:
    """[count] bool, true for `share` of the places but not for all, at random, the same in every run."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(2))
    return order < min(round(share * count), count - 1)


def _live_of(live: float) -> int:
    """Live tokens of each sequence."""
    return max(1, round(SEQUENCE * live))


@lru_cache(maxsize=1)
def _base(case: Case, device: str) -> tuple[Tensor, Tensor, Tensor, Log]:
    hidden, weight, target = _placed(replace(case, live=1.0), device)
    prompt = torch.arange(case.rows, device=device) % SEQUENCE < SEQUENCE - _live_of(case.live)
    target = target.masked_fill(prompt, IGNORE)
    return hidden, weight, target, true_log(hidden, weight, target)


@lru_cache(maxsize=1)  # shared by all live shares: drawing the weight of a large head takes seconds
def _placed(case: Case, device: str) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight, target = (x.to(device) for x in operands(case))
    return hidden.to(case.torch_dtype), weight.to(case.torch_dtype), target


# ---- suites ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Suite:
    """Cases, the providers they are for (globs), and for this package's the workspaces (MiB) and the sizes of
    tiles (most rows, MiB). None: its own.

    bound: the ratio to the bare GEMMs that this package's best backend of kernels is to keep on a GPU.
    parts: suites that this one consists of, the most important first. minutes: what it may take; 0: any.
    """

    about: str
    cases: tuple[Case, ...] = ()
    providers: tuple[str, ...] = ("*",)
    workspaces: tuple[int | None, ...] = (None,)
    tiles: tuple[tuple[int, int] | None, ...] = (None,)
    bound: float | None = None
    parts: tuple[Suite, ...] = ()
    minutes: float = 0.0

    def of_shape(self, shape: str) -> Suite:
        """The parts that are about one head."""
        return replace(self, parts=tuple(part for part in self.parts if part.cases[0].shape == shape))


SMOL = of_shape("SmolLM2-135M", 2048)
TINY = Case("tiny", 256, 64, 4096, "float32", "randn", "sft")
OURS = ("fused_align*",)
PEER_MODES = ("sft", "trainable", "score", "frozen", "dpo", "kto", "grpo")


def _modes(case: Case, modes: tuple[str, ...], **values: tuple) -> Iterator[Case]:
    """The case in several modes, for every combination of the values of other fields."""
    for combination in product(*values.values()):
        changes: dict[str, Any] = dict(zip(values, combination, strict=True))
        yield from (replace(case, mode=mode, **changes) for mode in modes)


def _sparse() -> Iterator[Case]:
    yield from _modes(SMOL, ("score", "frozen", "trainable", "sft", "dpo", "grpo"), live=(1.0, 0.5, 0.25))
    yield from _modes(SMOL, ("frozen", "trainable", "grpo", "grpo-frozen"), dead=(0.5, 0.9))
    yield from _modes(SMOL, ("dpo", "dpo-frozen", "kto", "grpo"), dead=(0.5, 0.9), dead_by=("humanline",))


HEADS = (  # of the suites for a GPU
    of_shape("Llama-3-8B", 16384, "bfloat16"),
    of_shape("Gemma-2B", 8192, "bfloat16"),
    of_shape("Qwen2.5-7B", 32768, "bfloat16"),
)
PROMISED = {  # mode: plan, MiB of the workspace, ratio to the bare GEMMs of the plan
    "score": ("score", None, 1.08),
    "frozen": ("jacobian", None, 1.06),
    "grpo": ("single", 6144, 1.08),
    "dpo": ("window", 6144, 1.08),
    "trainable": ("recompute", 1024, 1.08),
    "sft": ("single", 6144, 1.08),
    "kto": ("window", 6144, 1.08),
}
SKIPPING = 1.4  # times as fast, at least, with half of the coefficients zero as with none
RIVALS = ("eager", "liger[cross_entropy]", "liger[compiled=False]", "cce", "cce[exact]", "trl", "quack")
SLOW_TO_START = ("torch.compile", "liger", "torch.linear_cross_entropy[chunked]")


def _by(backends: tuple[str, ...], *plans: str) -> tuple[str, ...]:
    return tuple(f"fused_align[{backend},{plan}]" for backend, plan in product(backends, plans))


def _held(case: Case, backends: tuple[str, ...]) -> Iterator[Suite]:
    """What is promised of a head, by each backend in turn."""
    for mode, (plan, mib, bound) in PROMISED.items():
        plans = (plan, "fused") if plan == "score" else (plan,)
        part = replace(case, mode=mode)
        yield Suite(f"{part.label}, by {plan}", (part,), _by(backends, *plans), (mib,), bound=bound)


def _against(case: Case, rivals: tuple[str, ...]) -> Iterator[Suite]:
    """Peers at the same work; what this package takes by itself, with more memory and with less."""
    less = {"score": ("fused_align[triton,fused]",), "frozen": _by(backends.KERNELS, "recompute")}
    for mode in PROMISED:
        part = replace(case, mode=mode)
        mib = (None, 64, 16) if mode in less else (6144, 1024, 64)
        own = ("fused_align[auto,auto]", *less.get(mode, ()))
        yield Suite(f"{part.label}, and peers", (part,), (*own, *rivals), mib)


def _dead(case: Case) -> Iterator[Suite]:
    """Half of the coefficients zero, by advantages and by Humanline."""
    for mode, by in (("grpo", "sequences"), ("trainable", "sequences"), ("dpo", "humanline"),
                     ("kto", "humanline"), ("grpo", "humanline")):  # fmt: skip
        part = replace(case, mode=mode, dead=0.5, dead_by=by)
        plan, mib, _ = PROMISED[mode]
        yield Suite(part.label, (part,), (*_by(backends.KERNELS, plan), *RIVALS), (mib,))


def _gpu() -> Iterator[Suite]:
    """What is promised first, then peers, zero coefficients, masks, peaked logits: of each head."""
    for case in HEADS:
        yield from _held(case, (*backends.KERNELS, "torch"))
        yield from _against(case, (*RIVALS, *SLOW_TO_START))
        yield from _dead(case)
        for live in (0.5, 0.25):
            yield from _against(replace(case, live=live), RIVALS)
        yield from _held(replace(case, logits="peaked"), backends.KERNELS)


def _tune() -> Iterator[Suite]:
    """For the planner's constants: tiles around what a cache holds, chunks, plans, budgets."""
    small = (128, 64, 32, 16)
    tiles = (
        None,
        *((8192, mib) for mib in small[1:]),
        *((rows, mib) for rows in (4096, 2048) for mib in small),
    )
    budgets = (768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288)
    for case in HEADS:
        for mode in ("score", "frozen", "trainable", "grpo"):
            part, (plan, mib, _) = replace(case, mode=mode), PROMISED[mode]
            # the chunks of single are its tiles' rows: other rows are another number of sums of dweight
            sizes = tiles[:4] if plan == "single" else tiles
            yield Suite(f"{part.label}, tiles", (part,), _by(backends.KERNELS, plan), (mib,), sizes)
        for mode, plan in (("grpo", "single"), ("dpo", "window")):
            part = replace(case, mode=mode)
            own = ("fused_align[auto,auto]", *_by(backends.KERNELS, plan, "recompute"))
            yield Suite(f"{part.label}, plans", (part,), own, (1024, 6144))
            yield Suite(f"{part.label}, budgets", (part,), ("fused_align[auto,auto]",), (None, *budgets))


SUITES = {
    "smoke": Suite("every mode, tiny, in seconds", tuple(_modes(TINY, MODES)), (*OURS, "eager")),
    "core": Suite(
        "this package's plans at 2048 tokens of SmolLM2's head, float32",
        tuple(_modes(SMOL, MODES, logits=("randn", "peaked"))),
        OURS,
    ),
    "peers": Suite(
        "every provider that runs here, float32 and bfloat16",
        tuple(_modes(SMOL, PEER_MODES, dtype=("float32", "bfloat16"))),
    ),
    "sparse": Suite("ignored tokens and zero coefficients", tuple(_sparse()), (*OURS, "eager")),
    "bf16": Suite(
        "this package's plans in bfloat16",
        tuple(_modes(SMOL, MODES, dtype=("bfloat16",), logits=("randn", "peaked"))),
        (*OURS, "eager"),
    ),
    "memory": Suite(
        "budgets of the workspace",
        tuple(_modes(SMOL, ("score", "frozen", "trainable", "sft", "dpo", "grpo"))),
        ("fused_align[auto,auto]",),
        (16, 64, 1024),
    ),
    "gpu": Suite("three large heads in bfloat16, for one GPU", parts=tuple(_gpu())),
    "tune": Suite("the same heads, sizes of tiles and budgets, for the planner", parts=tuple(_tune())),
    "kernels": Suite("each elementwise kernel by itself, against the bandwidth of a copy", minutes=2.0),
}
