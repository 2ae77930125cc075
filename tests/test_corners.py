"""Corners that a review found: ranges of 16-bit floats, autocast, long items, copies that nobody counted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import generator
from tolerances import GRAD, check_logp, relative_errors
from torch import Tensor

import fused_align as fa
from fused_align import backends
from fused_align.linear.plan import Problem, choose


def operands(n: int, h: int, v: int, dtype: torch.dtype, lead: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    gen = generator(3)
    weight = torch.randn(v, h, generator=gen) / h**0.5
    target = torch.randint(0, v, (n,), generator=gen)
    hidden = torch.randn(n, h, generator=gen) + lead * weight[target]
    return hidden.to(dtype), weight.to(dtype), target


@pytest.mark.parametrize("precision", ["high", "bf16"])
@pytest.mark.parametrize("lead", [0.0, 30.0])
def test_float16_has_no_range_for_the_exponentials(precision: str, lead: float):
    hidden, weight, target = operands(40, 16, 300, torch.float16, lead)
    truth = [x.double().requires_grad_() for x in (hidden, weight)]
    got = [x.requires_grad_() for x in (hidden, weight)]
    fa.linear_logp(*truth, target, backend="eager").sum().backward()
    fa.linear_logp(*got, target, precision=precision).sum().backward()
    for x, t in zip(got, truth, strict=True):
        assert x.grad is not None and t.grad is not None and x.grad.isfinite().all()
        assert relative_errors(x.grad, t.grad)[0] < (
            1e-3 if precision == "high" else 2e-2
        )  # float16 rounds at 5e-4


def test_float16_gradients_survive_a_loss_scale():
    hidden, weight, target = operands(64, 16, 300, torch.float16)
    batch, scale = fa.Batch(target[None]), 65536.0
    grads = []
    for plan in ("single", "recompute"):
        x, w = hidden[None].clone().requires_grad_(), weight.clone().requires_grad_()
        (fa.align_loss(x, w, batch, fa.SFT(), normalizer=65536, plan=plan).loss * scale).backward()
        assert x.grad is not None and w.grad is not None and x.grad.dtype == torch.float16
        grads.append((x.grad, w.grad))
    for a, b in zip(*grads, strict=True):
        assert relative_errors(a, b.double())[0] < 1e-3


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_autocast_rounds_operands_and_nothing_else(backend: str):
    hidden, weight, target = operands(20, 16, 300, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = fa.linear_logp(hidden, weight, target, backend=backend)
    rounded = (hidden.bfloat16().double(), weight.bfloat16().double())
    check_logp(got, fa.linear_logp(*rounded, target, backend="eager"), torch.float32)


def problem(**changes: object) -> Problem:
    given: dict = {
        "rows": 8000, "given": 8000, "hidden": 64, "vocab": 5000, "work": torch.float32,
        "hidden_dtype": torch.float32, "weight_dtype": torch.float32, "operand": None, "rounded": False,
        "device": torch.device("cpu"), "grad_hidden": True, "grad_head": True, "coupling": "pair",
        "sizes": (3000, 2000, 3000),
    }  # fmt: skip
    return Problem(**(given | changes))


def test_a_long_pair_takes_the_window_its_budget_holds():
    chosen = choose(problem(), workspace_bytes=200 << 20)
    assert chosen.name == "window" and chosen.rows >= 3000


def test_the_budget_that_an_error_asks_for_is_enough():
    for size in (10, 700, 3000):
        needed = problem(sizes=(size,) * (8000 // size), rows=8000 // size * size)
        with pytest.raises(ValueError, match="workspace_bytes >= ") as caught:
            choose(needed, "window", 200_000)
        asked = int(str(caught.value).split(">= ")[1].split()[0])
        chosen = choose(needed, "window", asked)
        assert needed.bytes("window", chosen.rows, chosen.cols) <= asked


def test_autocast_of_a_float32_weight_needs_no_second_sum():
    assert not problem(operand=torch.bfloat16).rounds
    assert problem(weight_dtype=torch.bfloat16).rounds


def test_logits_are_not_copied_to_be_flattened():
    logits = torch.randn(3, 5, 40, dtype=torch.float64, generator=generator(0))
    target = torch.tensor([[1, 2, -100, 4], [0, 39, 3, -100], [5, 6, 7, 8]])
    view = logits.requires_grad_()[:, :-1]  # can't be viewed as [N, V]
    got = fa.logp_from_logits(view, target)
    dense = view.log_softmax(-1).gather(-1, target.clamp(min=0)[..., None]).squeeze(-1)
    want = torch.where(target >= 0, dense, 0.0)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    (a,), (b,) = torch.autograd.grad(got.sum(), logits), torch.autograd.grad(want.sum(), logits)
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_target_that_was_filtered_out():
    """Top-k sampling leaves -inf: the log-prob is -inf, and the gradient is still softmax's."""
    logits = torch.tensor([[0.0, 1.0, -torch.inf]], requires_grad=True)
    logp = fa.logp_from_logits(logits, torch.tensor([2]))
    assert logp.item() == -torch.inf
    (grad,) = torch.autograd.grad(logp.sum(), logits)
    torch.testing.assert_close(grad, torch.tensor([[-0.26894143, -0.7310586, 1.0]]))


def test_the_k3_penalty_keeps_its_digits_near_the_reference():
    logp = torch.tensor([-2.0])
    for d in (-1e-3, 1e-4):
        batch = fa.Batch(torch.tensor([[1]]), ref_logp=(logp + d)[None], advantage=torch.zeros(1)).live()
        exact = (batch.ref_logp - logp).double()  # type: ignore[operator]
        want = torch.expm1(exact) - exact
        got = fa.GRPO(beta=1.0).penalty(logp, batch)
        assert abs(got.item() / want.item() - 1) < 1e-2


def test_an_advantage_that_could_mean_two_things():
    target, advantage = torch.tensor([1, -100]), torch.ones(2)
    with pytest.raises(ValueError, match="as many tokens as sequences"):
        fa.Batch(target, cu_seqlens=torch.tensor([0, 2, 2]), advantage=advantage)
    fa.Batch(target, cu_seqlens=torch.tensor([0, 1, 2]), advantage=advantage)  # means the same either way


def test_columns_are_data_under_every_plan():
    hidden, weight, target = operands(8, 4, 30, torch.float64)
    advantage = torch.ones(2, dtype=torch.float64, requires_grad=True)
    for plan in ("single", "recompute"):
        x = hidden.view(2, 4, 4).clone().requires_grad_()
        batch = fa.Batch(target.view(2, 4), advantage=advantage)
        fa.align_loss(x, weight, batch, fa.GRPO(), plan=plan).loss.backward()
        assert advantage.grad is None and x.grad is not None


@pytest.mark.parametrize("plan", ["single", "recompute"])
def test_gradients_of_gradients_are_refused(plan: str):
    hidden, weight, target = operands(8, 4, 30, torch.float64)
    x = hidden[None].requires_grad_()
    loss = fa.align_loss(x, weight.requires_grad_(), fa.Batch(target[None]), fa.SFT(), plan=plan).loss
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.square().sum().backward()


def test_an_entropy_that_nobody_differentiates_costs_no_gradient(monkeypatch: pytest.MonkeyPatch):
    hidden, weight, target = operands(8, 4, 30, torch.float32)
    asked: list[bool] = []
    steps = backends.steps(backends.pick("auto", hidden.device))
    own = steps.coefficients

    def spy(*args: Any, **kwargs: Any) -> Any:
        found = own(*args, **kwargs)
        asked.append(found.mix is not None)
        return found

    monkeypatch.setattr(steps, "coefficients", spy)
    stats = fa.token_stats(hidden.requires_grad_(), weight.requires_grad_(), target, entropy=True)
    stats.logp.sum().backward(retain_graph=True)
    assert stats.entropy is not None and asked == [False]
    stats.entropy.sum().backward()
    assert asked == [False, True]


@pytest.mark.parametrize("offset", [100.0, 1e3, 1e4])
def test_logits_with_a_common_offset(offset: float):
    logits = offset + torch.randn(20, 300, generator=generator(0))
    target = torch.randint(300, (20,), generator=generator(1))
    leaves = [logits.requires_grad_(), logits.detach().double().requires_grad_()]
    (got,) = torch.autograd.grad(fa.logp_from_logits(leaves[0], target).sum(), leaves[0])
    dense = leaves[1].log_softmax(-1).gather(-1, target[:, None]).sum()
    (want,) = torch.autograd.grad(dense, leaves[1])
    assert relative_errors(got, want)[0] < 1e-6


@pytest.mark.parametrize("raw", [30.0, 120.0, 150.0])
def test_the_slope_of_a_target_near_its_cap(raw: float):
    """1 - tanh^2 loses no digits to the rounding of the capped logit."""
    weight = torch.randn(50, 8, generator=generator(0))
    hidden, target = (raw * weight[7] / weight[7].square().sum())[None], torch.tensor([7])
    grads = []
    for dtype, backend in ((torch.float32, "auto"), (torch.float64, "eager")):
        w = weight.to(dtype).requires_grad_()
        options: dict[str, Any] = {"softcap": 30.0, "temperature": 0.7, "backend": backend}
        (grad,) = torch.autograd.grad(fa.linear_logp(hidden.to(dtype), w, target, **options).sum(), w)
        grads.append(grad[7])
    assert relative_errors(*grads)[0] < GRAD[torch.float32]


def test_temperatures_of_logits_are_checked():
    logits, target = torch.zeros(3, 5), torch.tensor([1, 2, -100])
    for bad in (0.0, -1.0):
        with pytest.raises(ValueError, match="temperature must be positive"):
            fa.logp_from_logits(logits, target, temperature=torch.tensor([1.0, bad, 1.0]))
    fa.logp_from_logits(logits, target, temperature=torch.tensor([1.0, 1.0, 0.0]))  # of an ignored position


def test_rows_beyond_the_budget_take_a_fifth_pass():
    many = problem(rows=80000, given=80001, hidden=896, vocab=151936, hidden_dtype=torch.bfloat16,
                   weight_dtype=torch.bfloat16, coupling=None)  # fmt: skip
    chosen = choose(many)
    assert chosen.apart and chosen.rows * chosen.cols * 4 >= 7 << 20
    assert not choose(replace(many, rows=8000)).apart
    assert not choose(replace(many, weight_dtype=torch.float32)).apart


@pytest.mark.parametrize(("lost", "size"), [(1, 64), (2, 64), (5, 64), (65, 4096)])
def test_few_unlikely_rows_among_large_logits(lost: int, size: int):
    """Sums of rows that are walked again fit the exponentials that the backward builds in whole chunks.

    Else plans would differ by the rounding of logits of a thousand.
    """
    hidden, weight, target = operands(300, size, 800, torch.float32)
    target[lost:] = (hidden @ weight.T).argmax(1)[lost:]
    grads = []
    for plan in ("single", "recompute"):
        x, w = (t.detach().clone().requires_grad_() for t in (hidden[None], weight))
        fa.align_loss(x, w, fa.Batch(target[None]), fa.SFT(), logit_scale=300.0, plan=plan).loss.backward()
        grads.append((x.grad, w.grad))
    for got, want in zip(*grads, strict=True):
        assert got is not None and want is not None
        assert relative_errors(got, want.double())[0] < 1e-6


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("plan", ["single", "recompute"])
def test_a_word_that_a_bias_forbids(plan: str, static: bool):
    """bias = -inf is the same as a vocabulary without the word, in padding (whose target is 0) too."""
    hidden, weight, target = operands(12, 8, 40, torch.float32)
    target = target.clamp(min=1)
    target[::3] = -100
    bias = torch.zeros(40)
    bias[0] = -torch.inf

    def run(word: int) -> tuple[Tensor, ...]:
        leaves = hidden.clone().requires_grad_(), weight[word:].clone().requires_grad_()
        batch = fa.Batch(torch.where(target > 0, target - word, -100).view(3, 4))
        options: dict[str, Any] = {"bias": bias[word:], "max_live": 11 if static else None, "plan": plan}
        value = fa.align_loss(leaves[0].view(3, 4, 8), leaves[1], batch, fa.SFT(), **options).loss
        value.backward()
        assert leaves[0].grad is not None and leaves[1].grad is not None
        return value.detach(), leaves[0].grad, leaves[1].grad[1 - word :]

    for one, other in zip(run(0), run(1), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_the_entropy_knows_no_forbidden_words(backend: str):
    hidden, weight, target = operands(12, 8, 40, torch.float32)
    target = target.clamp(min=1)
    bias = torch.zeros(40)
    bias[0] = -torch.inf

    def run(word: int) -> tuple[Tensor, ...]:
        leaves = hidden.clone().requires_grad_(), weight[word:].clone().requires_grad_()
        found = fa.token_stats(*leaves, target - word, bias=bias[word:], entropy=True, backend=backend)
        assert found.entropy is not None
        (found.entropy.sum() + found.logp.sum()).backward()
        assert leaves[0].grad is not None and leaves[1].grad is not None
        return found.entropy.detach(), leaves[0].grad, leaves[1].grad[1 - word :]

    for one, other in zip(run(0), run(1), strict=True):
        torch.testing.assert_close(one, other)


def test_targets_of_any_stride():
    hidden, weight, target = operands(12, 8, 40, torch.float32)
    strided = torch.stack([target, target + 1], 1)[:, 0]
    assert torch.equal(fa.linear_logp(hidden, weight, strided), fa.linear_logp(hidden, weight, target))
