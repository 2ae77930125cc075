"""Corners that a review found: ranges of 16-bit floats, autocast, long items, copies that nobody counted."""

from __future__ import annotations

import pytest
import torch
from tolerances import check_logp, relative_errors
from torch import Tensor

import fused_align as fa
from fused_align.linear.plan import Problem, choose


def operands(n: int, h: int, v: int, dtype: torch.dtype, lead: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(v, h, generator=generator) / h**0.5
    target = torch.randint(0, v, (n,), generator=generator)
    hidden = torch.randn(n, h, generator=generator) + lead * weight[target]
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
        "rows": 8000, "hidden": 64, "vocab": 5000, "work": torch.float32, "hidden_dtype": torch.float32,
        "weight_dtype": torch.float32, "operand": None, "device": torch.device("cpu"), "grad_hidden": True,
        "grad_head": True, "coupling": "pair", "longest": 3000,
    }  # fmt: skip
    return Problem(**(given | changes))


def test_a_long_pair_takes_the_window_its_budget_holds():
    chosen = choose(problem(), workspace_bytes=200 << 20)
    assert chosen.name == "window" and chosen.rows >= 3000


def test_the_budget_that_an_error_asks_for_is_enough():
    for longest in (10, 700, 3000):
        with pytest.raises(ValueError, match="workspace_bytes >= ") as caught:
            choose(problem(longest=longest), "window", 1 << 20)
        asked = int(str(caught.value).split(">= ")[1].split()[0])
        chosen = choose(problem(longest=longest), "window", asked)
        assert problem(longest=longest).bytes("window", chosen.rows, chosen.cols) <= asked


def test_autocast_of_a_float32_weight_needs_no_second_sum():
    assert not problem(operand=torch.bfloat16).rounds
    assert problem(weight_dtype=torch.bfloat16).rounds


def test_logits_are_not_copied_to_be_flattened():
    logits = torch.randn(3, 5, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
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
    target, offsets = torch.tensor([1, 2]), torch.tensor([0, 2, 2])
    with pytest.raises(ValueError, match="as many tokens as sequences"):
        fa.Batch(target, cu_seqlens=offsets, advantage=torch.ones(2))


def test_columns_are_data_under_every_plan():
    hidden, weight, target = operands(8, 4, 30, torch.float64)
    advantage = torch.ones(2, dtype=torch.float64, requires_grad=True)
    for plan in ("single", "recompute"):
        x = hidden.view(2, 4, 4).clone().requires_grad_()
        batch = fa.Batch(target.view(2, 4), advantage=advantage)
        fa.align_loss(x, weight, batch, fa.GRPO(), plan=plan).loss.backward()
        assert advantage.grad is None and x.grad is not None
