"""What every provider is held against: loss formulas on log-probs, and dense float64 values and gradients.

Nothing here calls the package: the formulas are written a second time, and the gradients come from
dloss/dz = c (1[target] - softmax), with c = dloss/dlogp by autograd on the log-probs. Slices of the
vocabulary keep the memory small. Gradients of a large problem are compared on a sample of their rows,
log-probs and loss on all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from .cases import Case, Inputs

IGNORE = -100
SEQUENCE = 128  # tokens of each packed sequence
HUMANLINE = (-1.5, 1.5)  # nats
BETA, TAU, CLIP = 0.1, 0.1, 0.2  # of DPO and KTO; of IPO; of GRPO: the defaults of this package and of TRL

WHOLE = 2**31  # N V H up to which gradients are compared whole
SAMPLE_ROWS, SAMPLE_COLS = 256, 1024  # otherwise: rows of dhidden, of dweight
SLICE_BYTES = 256 * 2**20  # float64 logits at a time


@dataclass(frozen=True)
class Log:
    """Per row, float64: logp (0 where ignored) and logsumexp of the logits, nats."""

    logp: Tensor  # [N]
    lse: Tensor  # [N]


@dataclass(frozen=True)
class Truth:
    """value [] or [N]; coefficients [N]; dhidden and dweight at some of their rows; all float64."""

    value: Tensor
    coefficients: Tensor  # [N]
    rows: Tensor  # [R] rows of hidden
    dhidden: Tensor  # [R, H]
    cols: Tensor  # [C] rows of the weight
    dweight: Tensor  # [C, H]


def loss_of(name: str, logp: Tensor, inputs: Inputs, humanline: bool, length: int = SEQUENCE) -> Tensor:
    """The scalar loss from log-probs [N] (any value where ignored), as trainers write it on top of them.

    sft and grpo count tokens (grpo: their mean per sequence), dpo and ipo pairs, kto and gspo sequences.
    """
    live = (inputs.target != IGNORE).view(-1, length)  # [S, T]
    logp = logp.view(-1, length)

    def per_sequence(x: Tensor) -> Tensor:  # [S, T] -> [S]
        return torch.where(live, x, 0).sum(1)

    if name == "sft":
        return -per_sequence(logp).sum() / live.sum()
    anchor = (inputs.old_logp if name in ("grpo", "gspo") else inputs.ref_logp).view(-1, length)
    ratio = logp - anchor.to(logp.dtype)
    if humanline:
        ratio = ratio.clamp(*HUMANLINE)
    if name in ("grpo", "gspo"):
        rho, advantage = ratio.exp(), inputs.advantage[:, None].to(logp.dtype)
        if name == "gspo":
            rho = (per_sequence(ratio) / live.sum(1)).exp()[:, None]
        items = -torch.min(rho * advantage, rho.clamp(1 - CLIP, 1 + CLIP) * advantage)
        return (per_sequence(items) / live.sum(1)).mean()
    summed = per_sequence(ratio)
    if name == "kto":
        sign = torch.where(inputs.desirable, 1, -1)
        return torch.sigmoid(-BETA * sign * (summed - inputs.kl.to(logp.dtype))).mean()
    if name == "ipo":
        summed = summed / live.sum(1)
    chosen, rejected = summed.chunk(2)
    if name == "dpo":
        return -F.logsigmoid(BETA * (chosen - rejected)).mean()
    if name == "ipo":
        return (chosen - rejected - 1 / (2 * TAU)).square().mean()
    raise ValueError(f"loss_of: no formula for the loss {name!r}.")


def slices(vocab: int, rows: int) -> list[slice]:
    """Slices of the vocabulary whose float64 logits of so many rows fit SLICE_BYTES."""
    step = max(256, SLICE_BYTES // (8 * max(rows, 1)))
    return [slice(start, min(start + step, vocab)) for start in range(0, vocab, step)]


@torch.no_grad()
def true_log(hidden: Tensor, weight: Tensor, target: Tensor) -> Log:
    """Log-probs and logsumexps in float64 of operands in any dtype."""
    rows = (target != IGNORE).nonzero().squeeze(1)
    x, y = hidden[rows].double(), target[rows]
    lse = torch.full_like(x[:, 0], -torch.inf)
    for part in slices(weight.shape[0], rows.numel()):
        lse = torch.logaddexp(lse, (x @ weight[part].double().t()).logsumexp(1))
    chosen = (x * weight[y].double()).sum(1)
    zeros = torch.zeros(target.numel(), dtype=torch.float64, device=hidden.device)
    return Log(zeros.index_copy(0, rows, chosen - lse), zeros.index_copy(0, rows, lse))


def truth(case: Case, inputs: Inputs) -> Truth:
    """The float64 value, coefficients and gradients of a case."""
    logp = inputs.true.logp.clone().requires_grad_()
    live = inputs.target != IGNORE
    if case.loss is None:
        value, c = inputs.true.logp, torch.where(live, inputs.coefficients.double(), 0)
    else:
        value = loss_of(case.loss, logp, inputs, case.humanline)
        (c,) = torch.autograd.grad(value, logp)
    rows, cols = _sample(case, inputs, c)
    hidden_at = _dhidden(inputs, c, rows) if case.grad_hidden else inputs.hidden.new_zeros(0)
    weight_at = _dweight(inputs, c, cols) if case.grad_weight else inputs.hidden.new_zeros(0)
    return Truth(value.detach(), c, rows, hidden_at, cols, weight_at)


def _sample(case: Case, inputs: Inputs, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of hidden and of the weight to compare: all, or some with a gradient and some of any kind."""
    device = inputs.hidden.device
    if case.rows * case.vocab * case.hidden <= WHOLE:
        return torch.arange(case.rows, device=device), torch.arange(case.vocab, device=device)
    generator = torch.Generator().manual_seed(3)

    def some(of: Tensor, count: int) -> Tensor:
        return of.cpu()[torch.randperm(of.numel(), generator=generator)[:count]]

    nonzero, targets = coefficients.nonzero().squeeze(1), inputs.target[coefficients != 0].unique()
    rows = [some(nonzero, SAMPLE_ROWS), some(torch.arange(case.rows), SAMPLE_ROWS // 8)]
    cols = [some(targets, SAMPLE_COLS // 2), some(torch.arange(case.vocab), SAMPLE_COLS // 2)]
    return torch.cat(rows).unique().to(device), torch.cat(cols).unique().to(device)


@torch.no_grad()
def _dhidden(inputs: Inputs, c: Tensor, rows: Tensor) -> Tensor:
    x, y, lse = inputs.hidden[rows].double(), inputs.target[rows].clamp(min=0), inputs.true.lse[rows]
    found = inputs.weight[y].double()
    for part in slices(inputs.weight.shape[0], rows.numel()):
        weight = inputs.weight[part].double()
        found -= (x @ weight.t() - lse[:, None]).exp() @ weight
    # where, not a product: an ignored row has no logsumexp, and exp of its logits may be inf
    return torch.where(c[rows, None] != 0, c[rows, None] * found, 0)


@torch.no_grad()
def _dweight(inputs: Inputs, c: Tensor, cols: Tensor) -> Tensor:
    rows = c.nonzero().squeeze(1)
    x, y, lse, c = inputs.hidden[rows].double(), inputs.target[rows], inputs.true.lse[rows], c[rows]
    found = []
    for part in slices(cols.numel(), rows.numel()):
        at = cols[part]
        dz = -(x @ inputs.weight[at].double().t() - lse[:, None]).exp()
        dz += y[:, None] == at
        found.append((dz * c[:, None]).t() @ x)
    return torch.cat(found)
