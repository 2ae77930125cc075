"""The fused loss kernels against the torch losses with autograd, and against the oracles."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from cases import HUMANLINE, LOSSES, Case, leaves_of, loss_id, make_case, oracle_loss, randn
from kernels import DEVICE
from tolerances import GRAD, LOSS, check_grad, check_loss
from torch import Tensor

import fused_align as fa
import oracles
from fused_align import backends
from fused_align.backends import kernel_losses
from fused_align.backends.kernel_losses import Evaluated, LossKernel
from fused_align.losses.base import Objective

LENGTHS = [9, 0, 3, 10]  # pairs: (9, 3), (0, 10)
WIDTH = 10

#: options of the kernels that no setting of cases.py reaches
MORE: list[fa.Loss] = [
    fa.GRPO(beta=0.3, kl="k1"),
    fa.GRPO(sampler_correction="sequence_mask", sampler_max=1.3, sampler_min=0.8, aggregation="token_mean"),
    fa.GRPO(sampler_correction="token_mask", sampler_max=math.inf, beta=0.1),
    fa.GSPO(level="token", eps_low=0.05, eps_high=0.03),
    fa.GSPO(level="token", beta=0.2, kl="k2", kl_correction=True, aggregation="constant", max_length=12),
    fa.GSPO(eps_low=0.05, eps_high=0.03, sampler_correction="sequence_truncate", sampler_max=1.1),
    fa.LUSPO(level="token", eps_low=0.05, eps_high=0.03),
    fa.CISPO(eps_high=1.2, beta=0.2, kl="k2", kl_correction=True),
    fa.SAPO(beta=0.2, kl_correction=True, sampler_correction="token_truncate", sampler_max=1.1),
    fa.REINFORCE(aggregation="token_mean", beta=0.1, kl="k1", sampler_correction="token_truncate"),
    fa.DPO(f_divergence="forward_kl"),
    fa.DPO(f_divergence="js", beta=0.5, label_smoothing=0.1),
    fa.DPO(f_divergence="alpha", f_alpha=0.3, beta=0.5, robust=True, label_smoothing=0.1),
    fa.DPO(f_divergence="alpha", f_alpha=1.0),
    fa.CPO(alpha=0.0, label_smoothing=0.2),
]


def cover(loss: fa.Loss, humanline: Any = None) -> LossKernel | str:
    """Not to be launched."""
    return kernel_losses.cover(loss, humanline, lambda launch, device: pytest.fail(f"{launch.kernel} runs"))


COVERED = [loss for loss in [*LOSSES, *MORE] if not isinstance(cover(loss), str)]
#: one of each class
CLASSES = list({type(loss): loss for loss in reversed(COVERED)}.values())


Run = Callable[..., tuple[Evaluated, dict[str, Tensor]]]


@pytest.fixture
def run(backend: str, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`run_on` each backend; triton's blocks are small, so that a sequence has several."""
    if backend == "triton":
        monkeypatch.setattr("fused_align.backends.triton_.losses.BLOCK", 8)
    return partial(run_on, backend)


# --- batches in each layout ---


def make_columns(case: Case) -> dict[str, Tensor]:
    """Those of the case, and weights and advantages of tokens."""
    S, T = case.target.shape
    return {
        **case.columns,
        "token_weight": randn(S, T, seed=21).abs(),
        "advantage_per_token": randn(S, T, seed=22),
    }


@dataclass
class Problem:
    """Log-probs and columns, padded; ignored positions hold `poison`."""

    logp: Tensor  # [S, T]
    target: Tensor  # [S, T]
    columns: dict[str, Tensor]

    @property
    def mask(self) -> Tensor:
        return self.target != oracles.IGNORE

    def batch(self) -> fa.Batch:
        return fa.Batch(self.target, **self.columns)

    def packed(self) -> tuple[fa.Batch, Tensor]:  # -> the batch, and its positions in the padded one
        """Rows of different lengths, without some of the padding behind them."""
        S, T = self.target.shape
        last = torch.where(self.mask, torch.arange(1, T + 1), 0).amax(1)
        keep = torch.minimum(last + torch.arange(S) % 3, torch.tensor(T))
        places = torch.cat([s * T + torch.arange(int(keep[s])) for s in range(S)])
        offsets = torch.nn.functional.pad(keep.cumsum(0), (1, 0)).int()
        columns = {
            name: x.reshape(-1)[places] if x.shape == self.target.shape else x
            for name, x in self.columns.items()
        }
        return fa.Batch(self.target.reshape(-1)[places], cu_seqlens=offsets, **columns), places

    def map(self, change: Callable[[Tensor], Tensor]) -> Problem:
        return Problem(change(self.logp), self.target, {k: change(v) for k, v in self.columns.items()})

    def poisoned(self, poison: float) -> Problem:
        def change(x: Tensor) -> Tensor:
            return torch.where(self.mask, x, poison) if x.shape == self.mask.shape else x

        return self.map(change)

    def to(self, dtype: torch.dtype) -> Problem:
        return self.map(lambda x: x.to(dtype) if x.is_floating_point() else x)


def make_problem(variant: str = "plain", lengths: list[int] = LENGTHS) -> Problem:
    """weighted: with token_weight and an advantage per token; on_policy: without old_logp."""
    case = make_case(lengths, width=WIDTH, H=5, V=11)
    logp, _, _ = oracles.token_stats(case.hidden, case.weight, case.target)
    columns = make_columns(case)
    per_token = columns.pop("advantage_per_token")
    if variant == "weighted":
        columns["advantage"] = per_token
    else:
        del columns["token_weight"]
    if variant == "on_policy":
        del columns["old_logp"]
    return Problem(logp, case.target, columns).poisoned(math.nan)


@dataclass
class Wanted:
    """What the torch losses give of a live batch."""

    objective: Objective
    loss: Tensor  # []
    c: Tensor  # [n]
    metrics: dict[str, Tensor]
    live: fa.Batch
    logp: Tensor  # [n]


def wanted(loss: fa.Loss, batch: fa.Batch, logp: Tensor, humanline: Any, normalizer: Any = None) -> Wanted:
    live = batch.live()
    x = logp.reshape(-1)[live.rows].detach().requires_grad_()
    objective = Objective(loss, live, humanline, normalizer)
    total = objective.total({"logp": x}, live, objective.weights)
    (c,) = torch.autograd.grad(total, x)
    return Wanted(objective, total.detach(), c, objective.metrics({"logp": x}), live, x.detach())


# --- running the kernel ---


def move(batch: fa.Batch) -> fa.Batch:
    """The batch on the device of the kernels."""
    moved = fa.Batch.__new__(fa.Batch)
    moved.__dict__ = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in batch.__dict__.items()}
    return moved


def run_on(
    backend: str,
    loss: fa.Loss,
    batch: fa.Batch,
    logp: Tensor,
    divisor: float | Tensor,
    humanline: Any = None,
    **options: bool,
) -> tuple[Evaluated, dict[str, Tensor]]:
    """What a backend's kernel finds, and the metrics of it, on the CPU."""
    kernel, batch = backends.steps(backend).loss_kernel(loss, humanline), move(batch)
    assert kernel is not None
    divisor = divisor.to(DEVICE) if isinstance(divisor, Tensor) else divisor
    found = kernel.evaluate(logp.to(DEVICE), batch, divisor, **options)
    metrics = kernel.metrics(found, batch) if options.get("metrics", True) else {}
    loss_, c, sums, dtype = found
    found = Evaluated(loss_.cpu(), None if c is None else c.cpu(), sums.cpu(), dtype)
    return found, {name: metric.cpu() for name, metric in metrics.items()}


def check(found: Evaluated, want_loss: Tensor, want_c: Tensor, mask: Tensor | None = None) -> None:
    """mask: where want_c [n] stands in the kernel's c; zeros are everywhere else."""
    assert found.loss.dtype == torch.float64 and found.loss.shape == ()
    check_loss(found.loss, want_loss, torch.float64)
    assert found.c is not None and found.c.dtype == torch.float64
    whole = want_c
    if mask is not None:
        whole = torch.zeros_like(found.c)
        whole[mask.view(whole.shape)] = want_c
        assert torch.equal(found.c.eq(0) | mask.view(whole.shape), torch.ones_like(found.c).bool())
    check_grad(found.c, whole, torch.float64, "c")


def check_metrics(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, metric in want.items():
        assert got[name].dtype == metric.dtype and got[name].shape == (), name
        if metric.isnan():
            assert got[name].isnan(), name
        else:
            error = float((got[name] - metric).abs() / metric.abs().clamp(min=1))
            assert error <= LOSS[torch.float64], f"{name}: {float(got[name])} should be {float(metric)}"


# --- against the torch losses ---


def clip_of(loss: fa.Loss, humanline: fa.Humanline | None = HUMANLINE) -> fa.Humanline | None:
    return humanline if loss.anchors else None


@pytest.mark.parametrize("loss", COVERED, ids=loss_id)
def test_padded(run: Run, loss: fa.Loss):
    """Also through dense logits and the papers' formulas: the loss, and c by what it makes of the logits."""
    problem = make_problem()
    want = wanted(loss, problem.batch(), problem.logp, None)
    divisor = want.objective.parts[0].count
    found, metrics = run(loss, problem.batch(), problem.logp, divisor)
    check(found, want.loss, want.c, problem.mask)
    check_metrics(metrics, want.metrics)

    case = make_case(LENGTHS, width=WIDTH, H=5, V=11)
    truth, want_grad = oracle_loss(case, loss)
    leaves = leaves_of(case)
    logp, _, _ = oracles.token_stats(leaves["hidden"], leaves["weight"], case.target)
    check_loss(found.loss, truth.detach(), torch.float64)
    for name, grad in zip(leaves, torch.autograd.grad(logp, list(leaves.values()), found.c), strict=True):
        check_grad(grad, want_grad[name], torch.float64, name)


@pytest.mark.parametrize("loss", COVERED, ids=loss_id)
def test_live_and_its_parts(run: Run, loss: fa.Loss):
    """With all that can be on: token weights, an advantage per token, Humanline."""
    problem, humanline = make_problem("weighted"), clip_of(loss)
    want = wanted(loss, problem.batch(), problem.logp, humanline, 3.25)
    found, metrics = run(loss, want.live, want.logp, 3.25, humanline)
    check(found, want.loss, want.c)
    check_metrics(metrics, want.metrics)

    total, c, live = torch.zeros((), dtype=torch.float64), torch.full_like(want.c, math.nan), want.live
    for first in (0, 1):
        if loss.item == "token":  # the first 10 of them, and the rest: sequences are cut in two
            part = live.take_tokens(
                places := torch.arange(live.target.numel())[(slice(10), slice(10, None))[first]]
            )
        elif loss.item == "pair":
            part, places = live.take_pairs(torch.arange(live.pairs).flip(0)[first::2])
        else:
            part, places = live.take_sequences(torch.arange(live.sequences)[first::2])
        some, _ = run(loss, part, want.logp[places], torch.tensor(3.25), humanline, metrics=False)
        assert some.c is not None and some.sums.shape == (1,)
        total += some.loss
        c[places] = some.c
    check_loss(total, want.loss, torch.float64)
    check_grad(c, want.c, torch.float64, "c")


@pytest.mark.parametrize("loss", [x for x in COVERED if x in CLASSES or x.anchor == "old"], ids=loss_id)
def test_packed(run: Run, loss: fa.Loss):
    """Policies without old_logp: the anchor is the log-prob itself."""
    humanline = clip_of(loss) if loss in CLASSES else None
    problem = make_problem("on_policy")
    batch, places = problem.packed()
    logp = problem.logp.reshape(-1)[places]
    want = wanted(loss, batch, logp, humanline, 17.5)
    found, metrics = run(loss, batch, logp, torch.tensor(17.5), humanline)
    check(found, want.loss, want.c, batch.target != oracles.IGNORE)
    check_metrics(metrics, want.metrics)


@pytest.mark.parametrize("loss", CLASSES, ids=loss_id)
def test_padded_to_a_fixed_number_of_tokens(run: Run, loss: fa.Loss):
    problem, humanline = make_problem("weighted"), clip_of(loss)
    want = wanted(loss, problem.batch(), problem.logp, humanline)
    batch = problem.batch().live(want.logp.numel() + 9)
    fixed = Objective(loss, batch, humanline, None)
    logp = torch.cat([want.logp, torch.full((9,), -1.0, dtype=torch.float64)])
    found, metrics = run(loss, batch, logp, fixed.parts[0].count, humanline)
    check(found, want.loss, want.c, batch.valid)
    check_metrics(metrics, fixed.metrics({"logp": logp}))


@pytest.mark.parametrize("loss", CLASSES, ids=loss_id)
def test_float32(run: Run, loss: fa.Loss):
    """Columns and coefficients in float32; the arithmetic is float64."""
    humanline = clip_of(loss)
    problem = make_problem("weighted").to(torch.float32)
    exact = problem.to(torch.float64)
    want = wanted(loss, exact.batch(), exact.logp, humanline)
    divisor = want.objective.parts[0].count
    found, metrics = run(loss, problem.batch(), problem.logp.reshape(-1), divisor, humanline)
    check_loss(found.loss, want.loss, torch.float32)
    assert found.c is not None and found.c.shape == (problem.logp.numel(),)
    assert found.c.dtype == torch.float32
    check_grad(found.c[problem.mask.view(-1)], want.c, torch.float32, "c")
    plain = wanted(loss, problem.batch(), problem.logp, humanline).metrics
    assert metrics.keys() == plain.keys()
    for name, metric in metrics.items():
        assert metric.dtype == plain[name].dtype, name
        check_loss(metric, want.metrics[name].double(), torch.float32)


# --- edges ---


@pytest.mark.parametrize("humanline", [None, HUMANLINE], ids=["", "humanline"])
@pytest.mark.parametrize("loss", CLASSES, ids=loss_id)
def test_extreme_log_ratios(run: Run, loss: fa.Loss, humanline: fa.Humanline | None):
    """+-80 and +-1000 in half of the tokens of each column: far beyond where the exponentials end."""
    if loss.item == "token":
        loss = replace(loss, beta=0.1, kl_correction=not isinstance(loss, fa.REINFORCE))  # type: ignore[call-arg]
    humanline = clip_of(loss, humanline)
    problem = make_problem()
    for i, name in enumerate(("old_logp", "ref_logp", "sampler_logp")):
        sizes = torch.where(randn(*problem.target.shape, seed=50 + i) > 0, 80.0, 1000.0)
        away = sizes.copysign(randn(*problem.target.shape, seed=30 + i)).double()
        some = torch.rand(problem.target.shape, generator=torch.Generator().manual_seed(40 + i)) > 0.5
        problem.columns[name] = problem.columns[name] + torch.where(some, away, 0.0)
    want = wanted(loss, problem.batch(), problem.logp, humanline, 4.0)
    found, metrics = run(loss, problem.batch(), problem.logp, 4.0, humanline)
    assert want.loss.isfinite() and want.c.isfinite().all()
    check_loss(found.loss, want.loss, torch.float64)
    check_metrics(metrics, want.metrics)
    # torch has s(x) (1 - s(x)) for a slope, which is off by a rounding of 1 where all slopes are tiny
    assert found.c is not None
    error = (found.c[problem.mask] - want.c).abs().amax()
    assert error <= GRAD[torch.float64] * want.c.abs().amax() + torch.finfo(torch.float64).eps


def test_ties_split_the_gradient_as_torch_does(run: Run):
    """Ratios of exactly 1, at a bound of exactly 1; and hinges at exactly 0."""
    problem = make_problem()
    problem.columns["old_logp"] = problem.logp.clone()
    problem.columns["ref_logp"] = problem.logp.clone()
    for loss in (
        fa.GRPO(eps_low=0.0, eps_high=0.0),
        fa.GRPO(),
        fa.GSPO(eps_low=0.0, eps_high=0.0),
        fa.GSPO(),
        fa.RLOO(eps_high=0.0),
        fa.CISPO(eps_high=1.0),
        fa.DPOP(),
        fa.MADPO(),
    ):
        want = wanted(loss, problem.batch(), problem.logp, None)
        divisor = want.objective.parts[0].count
        found, metrics = run(loss, problem.batch(), problem.logp, divisor)
        check(found, want.loss, want.c, problem.mask)
        check_metrics(metrics, want.metrics)
    bounds = fa.Humanline(-1.0, 0.0)  # on its bound a token has a gradient, and is not strictly inside
    want = wanted(fa.DPO(), problem.batch(), problem.logp, bounds)
    found, metrics = run(fa.DPO(), problem.batch(), problem.logp, 2, bounds)
    check(found, want.loss, want.c, problem.mask)
    assert want.c.ne(0).all() and metrics["humanline/unclipped"] == 0
    problem.columns["ref_logp"] = torch.where(problem.mask, problem.logp, 0.0)
    ref = torch.where(problem.mask, problem.logp.round(), 0.0)
    problem.logp = ref.clone()
    problem.logp[0, problem.mask[0]] += 1.0  # L = 9 of the first pair, 0 of the second
    problem.logp[2, problem.mask[2]] += torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    problem.columns["ref_logp"] = ref
    want = wanted(fa.Hinge(beta=0.125), problem.batch(), problem.logp, None)  # 1 - beta D is exactly 0
    assert want.c[:9].eq(0).all() and want.c[-10:].ne(0).all()
    found, _ = run(fa.Hinge(beta=0.125), problem.batch(), problem.logp, 2)
    check(found, want.loss, want.c, problem.mask)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("column", ["logp", "ref_logp", "old_logp"])
@pytest.mark.parametrize("loss", CLASSES, ids=loss_id)
def test_a_number_that_is_none_is_not_hidden(run: Run, loss: fa.Loss, column: str, bad: float):
    """Where torch's losses are finite the kernel agrees; where they are not it is not."""
    problem = make_problem(lengths=[9, 2, 3, 10])
    place = tuple(problem.mask.nonzero()[4])
    values = problem.logp if column == "logp" else problem.columns[column]
    values[place] = bad
    want = wanted(loss, problem.batch(), problem.logp, None, 4.0)
    found, _ = run(loss, problem.batch(), problem.logp, 4.0)
    assert found.c is not None
    if not want.loss.isfinite():
        assert math.isinf(bad) or not found.loss.isfinite()
        return
    torch.testing.assert_close(found.loss, want.loss)
    known = want.c.isfinite()
    torch.testing.assert_close(found.c[problem.mask][known], want.c[known], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("lengths", [[0, 0, 0, 0], [3, 0, 0, 0], [0, 4, 0, 2], []], ids=str)
@pytest.mark.parametrize("loss", CLASSES, ids=loss_id)
def test_empty_sequences_and_pairs(run: Run, loss: fa.Loss, lengths: list[int]):
    problem = make_problem("plain", [2, 3, 0, 4])
    S = len(lengths)
    target = torch.full((S, WIDTH), oracles.IGNORE)
    for s, length in enumerate(lengths):
        target[s, 2 : 2 + length] = 1
    columns = {
        name: x if x.dim() == 0 else x[: S // 2 if name == "margin" else S]
        for name, x in problem.columns.items()
    }
    finite = Problem(problem.logp, target, columns).map(torch.nan_to_num)
    few = Problem(finite.logp[:S], target, finite.columns | {"desirable": columns["desirable"]})
    want = wanted(loss, few.batch(), few.logp, None)
    divisor = want.objective.parts[0].count
    found, metrics = run(loss, few.batch(), few.logp, divisor)
    check(found, want.loss, want.c, few.mask)
    check_metrics(metrics, want.metrics)


@pytest.mark.parametrize("loss", CLASSES, ids=loss_id)
def test_what_ignored_positions_hold_changes_no_bit(run: Run, loss: fa.Loss):
    """NaN or numbers; and two runs give the same bits."""
    humanline = clip_of(loss, HUMANLINE)
    problem = make_problem("weighted")
    first, metrics = run(loss, problem.batch(), problem.logp, 3.0, humanline)
    for other in (problem, problem.poisoned(0.5)):
        again, same = run(loss, other.batch(), other.logp, 3.0, humanline)
        assert torch.equal(first.sums, again.sums)
        assert first.c is not None and again.c is not None and torch.equal(first.c, again.c)
        assert all(torch.equal(metrics[name], same[name]) for name in metrics)


def test_many_programs(run: Run):
    """More of them than the last one adds in one step."""
    S = 260
    batch = fa.Batch(
        torch.ones(S, 1, dtype=torch.int64),
        ref_logp=randn(S, 1, seed=1),
        desirable=randn(S, seed=4) > 0,
        kl=torch.tensor(0.1),
    )
    logp = randn(S, 1, seed=5)
    want = wanted(fa.KTO(), batch, logp, None)
    found, metrics = run(fa.KTO(), batch, logp, S, grad=False)
    check_loss(found.loss, want.loss, torch.float64)
    check_metrics(metrics, want.metrics)


@pytest.mark.parametrize("loss", [fa.GRPO(), fa.RLOO(beta=0.1), fa.DPO(), fa.KTO()], ids=loss_id)
def test_only_what_is_asked_for(run: Run, loss: fa.Loss):
    problem = make_problem()
    every, _ = run(loss, problem.batch(), problem.logp, 3.0)
    scored, _ = run(loss, problem.batch(), problem.logp, 3.0, grad=False, metrics=False)
    assert scored.c is None and scored.sums.shape == (1,)
    assert torch.equal(scored.loss, every.loss)
    learnt, _ = run(loss, problem.batch(), problem.logp, 3.0, metrics=False)
    assert every.c is not None and learnt.c is not None and torch.equal(learnt.c, every.c)
    watched, metrics = run(loss, problem.batch(), problem.logp, 3.0, grad=False)
    assert torch.equal(watched.sums, every.sums) and metrics


def test_columns_that_are_not_contiguous(run: Run):
    problem = make_problem("weighted")
    turned = problem.map(lambda x: x.t().contiguous().t() if x.dim() == 2 else x)
    turned.target = problem.target.t().contiguous().t()
    for loss in (fa.GRPO(beta=0.1), fa.DPO(), fa.KTO()):
        want, _ = run(loss, problem.batch(), problem.logp, 3.0)
        found, _ = run(loss, turned.batch(), turned.logp, 3.0)
        assert found.c is not None and want.c is not None
        assert torch.equal(found.sums, want.sums) and torch.equal(found.c, want.c)


# --- what is covered ---

UNCOVERED = [
    (fa.GRPO(entropy_coef=0.1), "entropy"),
    (fa.GRPO(top_entropy=0.5), "entropy"),
    (fa.GRPO(off_policy_threshold=0.1), "off_policy_threshold"),
    (fa.DPO(wpo=True), "wpo"),
    (fa.DPO(ld_alpha=0.5), "ld_alpha"),
    (fa.CPO(), "2 losses"),
    (fa.ORPO(), "2 losses|no kernel"),
    (fa.SFT(), "SFT"),
    (fa.GMPO(), "GMPO"),
    (fa.AOT(), "AOT"),
    (fa.BetaDPO(), "BetaDPO"),
    (fa.Sum([(1.0, fa.DPO())]), "Sum"),
]


@pytest.mark.parametrize(
    ("loss", "why"), UNCOVERED, ids=lambda x: loss_id(x) if isinstance(x, fa.Loss) else ""
)
def test_what_is_not_covered_says_why(loss: fa.Loss, why: str):
    found = cover(loss)
    assert isinstance(found, str)
    pytest.raises(ValueError, _raise, found).match(why)


def _raise(text: str) -> None:
    raise ValueError(text)


def test_every_loss_is_covered_or_says_why():
    for loss in LOSSES:
        for humanline in (None, HUMANLINE, fa.HumanlineSampling()):
            found = cover(loss, humanline)
            assert isinstance(found, LossKernel) or len(found.split()) > 4, (loss, found)
            if isinstance(humanline, fa.HumanlineSampling):
                assert isinstance(found, str)
    assert isinstance(cover(fa.SimPO(), HUMANLINE), str)


def test_a_class_of_ones_own_is_not_covered():
    class Own(fa.DPO, base=True):  # type: ignore[call-arg]
        pass

    assert isinstance(cover(Own()), str)


def test_what_does_not_fit_says_so(run: Run):
    problem = make_problem()
    batch, live = problem.batch(), problem.batch().live()
    with pytest.raises(ValueError, match=r"GRPO.*advantage"):
        run(fa.GRPO(), fa.Batch(problem.target), problem.logp, 1.0)
    with pytest.raises(ValueError, match=r"DPO.*ref_logp"):
        run(fa.DPO(), fa.Batch(problem.target), problem.logp, 1.0)
    with pytest.raises(ValueError, match=r"KTO.*kl"):
        run(fa.KTO(), fa.Batch(problem.target, ref_logp=problem.logp), problem.logp, 1.0)
    with pytest.raises(TypeError, match=r"logp must be float32 or float64; got torch.bfloat16"):
        run(fa.DPO(), batch, problem.logp.bfloat16(), 1.0)
    with pytest.raises(ValueError, match=r"logp must have a number for every target"):
        run(fa.DPO(), batch, problem.logp[:2], 1.0)
    with pytest.raises(ValueError, match=r"parts of sequences.*GSPO"):
        run(fa.GSPO(), live.take_tokens(torch.arange(3)), live.target[:3].double(), 1.0)
    scored, _ = run(fa.DPO(), batch, problem.logp, 1.0, metrics=False)
    kernel = cover(fa.DPO())
    assert isinstance(kernel, LossKernel)
    with pytest.raises(ValueError, match=r"DPO.*9 sums, of evaluate\(metrics=True\); got 1"):
        kernel.metrics(scored, batch)
