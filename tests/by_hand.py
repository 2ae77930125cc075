"""Cases whose numbers can be worked out by hand: hidden = 0, so that words are equally likely, or nearly."""

from __future__ import annotations

import math

import torch
from cases import Case, leaves_of, uniform_case
from torch import Tensor

import fused_align as fa
import oracles

X = oracles.IGNORE
LOG4 = math.log(4)
WORDS = (1 / 2, 1 / 4, 1 / 8, 1 / 8)  # of skewed_case: entropy 1.75 log 2, squares 11/32


def skewed_case(target: list[list[int]], uniform: list[list[int]] | None = None, **columns: Tensor) -> Case:
    """Every token has the probabilities WORDS; those marked in `uniform` have 1/4 for every word."""
    y = torch.tensor(target)
    mark = torch.zeros_like(y) if uniform is None else torch.tensor(uniform)
    hidden = torch.stack([1 - mark, mark], -1).double()
    weight = torch.tensor([WORDS, (1 / 4,) * 4], dtype=torch.float64).log().T.contiguous()
    return Case(hidden, weight, y, columns=columns)


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def value(case: Case, loss: fa.Loss, **options) -> float:
    return float(fa.align_loss(case.hidden, case.weight, case.batch(), loss, **options).loss)


def learn(case: Case, loss: fa.Loss) -> float:
    """The value, and the loss' state moves on."""
    at = case.with_operands(leaves_of(case))
    out = fa.align_loss(at.hidden, at.weight, case.batch(), loss)
    out.loss.backward()
    return float(out.loss.detach())


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def cost(x: float) -> float:
    """-log s(x)"""
    return -math.log(sigmoid(x))


def pair_case(chosen: tuple[float, float] = (0.5, 1.0), rejected: float = -2.0, **columns: Tensor) -> Case:
    """One pair. As it stands L_w = 1.5 of two tokens, L_l = -2 of one, D = 3.5."""
    return uniform_case([[*chosen], [rejected, 99.0]], [[1, 2], [3, X]], **columns)


def two_pairs(chosen: tuple[float, float], rejected: tuple[float, float], **columns: Tensor) -> Case:
    """Two pairs of single tokens, with these log-ratios."""
    ref = [[ratio, 99.0] for ratio in (*chosen, *rejected)]
    return uniform_case(ref, [[1, X], [2, X], [3, X], [0, X]], **columns)
