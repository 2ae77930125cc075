"""Whatever the batch holds, the loss and its gradients are finite."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from cases import LOSSES, Case, loss_id, make_case, oracle_loss, randn, run_loss
from tolerances import GRAD, check_loss
from torch import Tensor

import fused_align as fa
import oracles

DTYPES = [torch.float64, torch.float32]
ANCHORED = [loss for loss in LOSSES if loss.anchor is not None]
LENGTHS = [5, 3, 1, 0, 4, 2]


def small_case(lengths: list[int] | None = None) -> Case:
    return make_case(LENGTHS if lengths is None else lengths, width=6, H=5, V=11, seed=3)


def signs(case: Case) -> dict[str, Tensor]:  # each broadcasts to [S, T]
    """Which way each token goes: all of them, sides of pairs against each other, neighbours, at random."""
    S, T = case.target.shape
    side = torch.ones(S, 1, dtype=torch.float64)
    side[S // 2 :] = -1
    neighbours = 1.0 - 2 * (torch.arange(T) % 2)
    coin = torch.where(randn(S, T, seed=1) > 0, 1.0, -1.0)
    return {
        "up": abs(side),
        "down": -abs(side),
        "won": side,
        "lost": -side,
        "mixed": neighbours,
        "coin": coin,
    }


def shifted(case: Case, shift: Tensor) -> dict[str, Tensor]:
    """Anchors that every token's log-ratio to is `shift`."""
    logp, _, _ = oracles.token_stats(case.hidden, case.weight, case.target, **case.head)
    return {"old_logp": logp - shift, "ref_logp": logp - shift, "sampler_logp": logp - shift}


def ratios(case: Case, *sizes: float) -> Iterator[tuple[str, dict[str, Tensor]]]:
    for size in sizes or (80.0, 1000.0):
        for name, sign in signs(case).items():
            yield f"ratios {name} {size:g}", shifted(case, size * sign)


def check_finite(
    loss: fa.Loss, dtype: torch.dtype, trials: Iterator[tuple[str, Case, dict[str, Tensor]]], **options
) -> None:
    """Of every trial: a name, a case and the columns that are changed."""
    bad = []
    for name, case, changes in trials:
        changes = {k: v.to(dtype) if v.is_floating_point() else v for k, v in changes.items()}
        out, grads = run_loss(case.to(dtype), loss, changes=changes, **options)
        found = {"loss": out.loss.detach(), **grads}
        bad += [f"{name}: {key}" for key, tensor in found.items() if not tensor.isfinite().all()]
    assert not bad, bad


def on(case: Case, trials: Iterator[tuple[str, dict[str, Tensor]]]) -> Iterator[tuple[str, Case, dict]]:
    return ((name, case, changes) for name, changes in trials)


every_loss = pytest.mark.parametrize("loss", LOSSES, ids=loss_id)
every_anchored_loss = pytest.mark.parametrize("loss", ANCHORED, ids=loss_id)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@every_loss
@every_dtype
def test_log_ratios(loss: fa.Loss, dtype: torch.dtype):
    case = small_case()
    check_finite(loss, dtype, on(case, ratios(case)))


@every_loss
@every_dtype
def test_each_anchor_alone(loss: fa.Loss, dtype: torch.dtype):
    """The others stay near: the sampler far from the policy that it should be, the reference from both."""
    case = small_case()

    def trials() -> Iterator[tuple[str, dict[str, Tensor]]]:
        for name, changes in ratios(case, 1000.0):
            for anchor, column in changes.items():
                yield f"{anchor} {name}", {anchor: column}

    check_finite(loss, dtype, on(case, trials()))


@every_loss
def test_log_ratios_against_the_oracle(loss: fa.Loss):
    """Exponents end at 60, and gradients with them; those that vanish need not be 0 to the digit."""
    case = small_case()
    for name, changes in ratios(case):
        want, want_grads = oracle_loss(case, loss, changes=changes)
        out, grads = run_loss(case, loss, changes=changes)
        check_loss(out.loss.detach(), want.detach(), torch.float64)
        for operand, grad in grads.items():
            floor = max(float(want_grads[operand].abs().max()), 1e-3)
            error = float((grad - want_grads[operand]).abs().max())
            assert error <= GRAD[torch.float64] * floor, f"{name}: {operand} off by {error:.2e}"


@every_loss
@every_dtype
def test_advantages(loss: fa.Loss, dtype: torch.dtype):
    """Of a million, as they are and on top of steep ratios; given per sequence and per token."""
    case = small_case()

    def trials() -> Iterator[tuple[str, dict[str, Tensor]]]:
        for name, sign in signs(case).items():
            token = (1e6 * sign).expand(case.target.shape)
            for kind, advantage in (("token", token), ("sequence", token[:, 0])):
                if isinstance(loss, fa.GRAO) and kind == "token":
                    continue
                yield f"advantage {name} per {kind}", {"advantage": advantage}
                for ratio in (80.0, -80.0):
                    changes = shifted(case, torch.tensor(ratio))
                    yield f"advantage {name} per {kind}, ratio {ratio}", {**changes, "advantage": advantage}

    check_finite(loss, dtype, on(case, trials()))


@every_loss
@every_dtype
def test_other_columns(loss: fa.Loss, dtype: torch.dtype):
    """Margins of a reward model and KTO's reference point."""
    case = small_case()
    pairs, one = torch.ones(len(LENGTHS) // 2), torch.tensor(1.0)

    def trials() -> Iterator[tuple[str, dict[str, Tensor]]]:
        for size in (1e4, -1e4):
            yield f"margin {size:g}", {"margin": size * pairs}
            yield f"kl {size:g}", {"kl": size * one}
        yield "weights 1e4", {"token_weight": torch.full(case.target.shape, 1e4)}
        yield "weights 0", {"token_weight": torch.zeros(case.target.shape)}

    check_finite(loss, dtype, on(case, trials()))


SHAPES: dict[str, list[int]] = {
    "one token": [1, 0],
    "one token of the other": [0, 1],
    "nothing": [0, 0, 0, 0],
    "an empty pair": [3, 0, 2, 0],
    "only chosen": [3, 2, 0, 0],
    "only rejected": [0, 0, 3, 2],
    "full": [6, 6],
}


@every_loss
@every_dtype
def test_empty_sequences(loss: fa.Loss, dtype: torch.dtype):
    def trials() -> Iterator[tuple[str, Case, dict[str, Tensor]]]:
        for name, lengths in SHAPES.items():
            case = small_case(lengths)
            yield name, case, {}
            yield from ((f"{name}, {trial}", case, changes) for trial, changes in ratios(case, 1000.0))

    check_finite(loss, dtype, trials())


GROUPS: dict[str, Callable[[int], tuple[Tensor, Tensor]]] = {  # group [S], reference [S]
    "each its own": lambda S: (torch.arange(S), torch.zeros(S, dtype=torch.bool)),
    "each its own answer": lambda S: (torch.arange(S), torch.ones(S, dtype=torch.bool)),
    "one of all": lambda S: (torch.full((S,), 1 << 40), torch.arange(S) == 1),
    "negative": lambda S: (-torch.arange(S) // 2, torch.zeros(S, dtype=torch.bool)),
}


@every_dtype
@pytest.mark.parametrize("loss", [loss for loss in LOSSES if isinstance(loss, fa.GRAO)], ids=loss_id)
def test_groups(loss: fa.Loss, dtype: torch.dtype):
    """Of one sequence, without samples, without live tokens (sequence 3 has none), with any id."""
    case = small_case()

    def trials() -> Iterator[tuple[str, dict[str, Tensor]]]:
        for name, make in GROUPS.items():
            group, reference = make(len(LENGTHS))
            yield name, {"group": group, "reference": reference}

    check_finite(loss, dtype, on(case, trials()))


@every_anchored_loss
@every_dtype
@pytest.mark.parametrize("bounds", [(-0.1, 0.1), (-1000.0, 1000.0)], ids=str)
def test_everything_clipped(loss: fa.Loss, dtype: torch.dtype, bounds: tuple[float, float]):
    """Every ratio outside Humanline's bounds, near ones and far ones."""
    case = small_case()

    def trials() -> Iterator[tuple[str, dict[str, Tensor]]]:
        yield from ratios(case)
        for name, sign in signs(case).items():
            yield f"ratios {name} 2000", shifted(case, 2000 * sign)

    check_finite(loss, dtype, on(case, trials()), humanline=fa.Humanline(*bounds))


@every_loss
@every_dtype
@pytest.mark.parametrize("plan", ["recompute", "auto"])
def test_probabilities_of_nothing_and_everything(loss: fa.Loss, dtype: torch.dtype, plan: str):
    """Log-probs of -1e3 and of 0 to the last digit, anchors as they come."""
    case = small_case()
    logits = case.hidden @ case.weight.T
    top, bottom = logits.argmax(-1), logits.argmin(-1)

    def trials() -> Iterator[tuple[str, Case, dict[str, Tensor]]]:
        for name, word in {"sure": top, "lost": bottom}.items():
            target = torch.where(case.mask, word, case.target)
            yield name, Case(400 * case.hidden, case.weight, target, {}, case.columns), {}

    check_finite(loss, dtype, trials(), plan=plan)
