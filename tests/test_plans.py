"""Every plan gives the same numbers, costs the GEMM passes it says, and refuses what it cannot serve."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from cases import (
    HUMANLINE,
    LOSSES,
    REGISTRY,
    SUMS,
    Case,
    gradcheck,
    leaves_of,
    loss_id,
    make_case,
    make_head,
    oracle_loss,
    plans_for,
    randn,
    run_loss,
)
from tolerances import DIFFERENCE, DIFFERENCE_STEP, check_grad, check_like_torch, check_loss

import fused_align as fa
from fused_align.linear import plan as planner

KIB = 1 << 10
LENGTHS = [
    13,
    39,
    1,
    0,
    25,
    31,
    40,
    22,
    17,
    40,
    0,
    12,
    28,
    3,
    35,
    30,
]  # 336 live tokens; a pair has at most 80
DEFAULTS = [*(cls() for cls in REGISTRY.values()), *SUMS]


def big_case(head: str = "plain", V: int = 777) -> Case:
    """Several tiles of 256 columns and, under a small budget, several chunks of 128 rows."""
    return make_case(LENGTHS, width=40, H=23, V=V, scale=1.0, head=make_head(head, V, (len(LENGTHS), 40)))


def small_budget(dtype: torch.dtype) -> int:
    """Holds 128 to 200 complete rows of 777 logits and what goes with them, a third of [N, V] and less."""
    return 1000 * KIB * (2 if dtype == torch.float64 else 1)


def gemms(function: Callable[[], object]) -> list[int]:
    """The multiply-adds of every matrix product, seen below whatever hides them from a dispatch mode."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True, acc_events=True
    ) as profile:
        function()
    found = []
    for event in profile.events() or []:
        operands = {"aten::mm": (0, 1), "aten::addmm": (1, 2)}.get(event.name)
        if operands is not None:
            left, right = (event.input_shapes[i] for i in operands)
            found.append(left[0] * left[1] * right[1])
    return found


# --- the same numbers ---


@pytest.mark.parametrize(
    ("loss", "plan", "frozen"),
    [
        pytest.param(loss, plan, frozen, id=f"{loss_id(loss)}-{plan}{'-frozen' if frozen else ''}")
        for loss in LOSSES
        for frozen in (False, True)
        for plan in plans_for(loss, frozen_head=frozen)
    ],
)
def test_against_the_oracle(loss: fa.Loss, plan: str, frozen: bool):
    case = big_case("bias").to(torch.float32)
    keep = ("weight", "bias") if frozen else ()
    humanline = HUMANLINE if loss.anchor else None
    want, want_grad = oracle_loss(case, loss, frozen=keep, humanline=humanline)
    budget = small_budget(torch.float32)
    out, grads = run_loss(case, loss, frozen=keep, humanline=humanline, plan=plan, workspace_bytes=budget)
    check_loss(out.loss.detach(), want.detach(), torch.float32)
    assert grads.keys() == want_grad.keys()
    for name, grad in grads.items():
        check_grad(grad, want_grad[name], torch.float32, name)


@pytest.mark.parametrize("plan", ["single", "window", "recompute", "jacobian"])
@pytest.mark.parametrize("head", ["softcap", "logit_scale", "temperature", "per_token", "all"])
def test_head_options(plan: str, head: str):
    loss = fa.SFT() if plan == "single" else fa.DPO()
    keep = ("weight", "bias") if plan == "jacobian" else ()
    case = big_case(head).to(torch.float32)
    want, want_grad = oracle_loss(case, loss, frozen=keep)
    out, grads = run_loss(case, loss, plan=plan, frozen=keep, workspace_bytes=2 * small_budget(torch.float32))
    check_loss(out.loss.detach(), want.detach(), torch.float32)
    for name, grad in grads.items():
        check_grad(grad, want_grad[name], torch.float32, name)


@pytest.mark.parametrize("plan", ["single", "window", "recompute", "jacobian"])
@pytest.mark.parametrize(
    "frozen", [(), ("hidden",), ("weight",), ("hidden", "bias"), ("hidden", "weight")], ids=str
)
def test_only_what_needs_a_gradient_gets_one(plan: str, frozen: tuple[str, ...]):
    loss = fa.GRPO(beta=0.1) if plan == "single" else fa.KTO()
    case = big_case("bias").to(torch.float32)
    if plan == "jacobian":
        frozen = ("weight", "bias")
    _, want = oracle_loss(case, loss, frozen=frozen)
    _, grads = run_loss(case, loss, plan=plan, frozen=frozen, workspace_bytes=small_budget(torch.float32))
    assert grads.keys() == want.keys()
    for name, grad in grads.items():
        check_grad(grad, want[name], torch.float32, name)


@pytest.mark.parametrize("plan", ["single", "window", "recompute", "jacobian"])
@pytest.mark.parametrize(
    ("hidden_dtype", "weight_dtype"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float64),
        (torch.float64, torch.float32),
    ],
    ids=lambda d: str(d).removeprefix("torch."),
)
@pytest.mark.parametrize("small", [False, True])
def test_dtypes(plan: str, hidden_dtype: torch.dtype, weight_dtype: torch.dtype, small: bool):
    loss = fa.SFT() if plan == "single" else fa.DPO(beta=1.0)
    keep = ("weight",) if plan == "jacobian" else ()
    case = big_case().to(hidden_dtype, weight_dtype)
    both = torch.promote_types(hidden_dtype, weight_dtype)
    whole_rows = plan in ("single", "window")  # the other plans have no use for more than a few tiles
    budget = (small_budget(both) if whole_rows else 150 * KIB) if small else None
    want, want_grad = oracle_loss(case, loss, frozen=keep)
    plain, plain_grad = oracle_loss(case, loss, frozen=keep, dtype=both)
    out, grads = run_loss(case, loss, plan=plan, frozen=keep, workspace_bytes=budget)
    assert out.loss.dtype == (torch.float64 if both == torch.float64 else torch.float32)
    check_like_torch(out.loss.detach(), want.detach(), plain.detach(), torch.float32, "loss")
    for name, grad in grads.items():
        own = case.operands()[name].dtype
        assert grad.dtype == own, name
        check_like_torch(grad, want_grad[name], plain_grad[name].to(own), torch.float32, name)


@pytest.mark.parametrize("loss", DEFAULTS, ids=loss_id)
def test_plans_agree_in_float64(loss: fa.Loss):
    """Beyond rounding the result does not depend on the plan, nor on the budget."""
    case = big_case()
    want, want_grad = oracle_loss(case, loss)
    for plan in plans_for(loss):
        for budget in (None, small_budget(torch.float64)):
            out, grads = run_loss(case, loss, plan=plan, workspace_bytes=budget)
            check_loss(out.loss.detach(), want.detach(), torch.float64)
            for name, grad in grads.items():
                check_grad(grad, want_grad[name], torch.float64, f"{plan} {name}")


def stops_a_gradient(loss: fa.Loss) -> bool:
    """Whether the value depends on more than is differentiated, by definition of the loss."""
    held = isinstance(loss, (fa.CISPO, fa.VESPO, fa.BCO, fa.BetaDPO))
    return held or getattr(loss, "wpo", False) or getattr(loss, "level", "") == "token"


@pytest.mark.parametrize("loss", list(filter(stops_a_gradient, LOSSES)), ids=loss_id)
@pytest.mark.usefixtures("tiny_tiles")
def test_stopped_gradients(loss: fa.Loss):
    """What differences cannot check, in the same tiles and with the same heads, against the oracle."""
    case = make_case([3, 1, 0, 2], width=3, H=3, V=11, seed=1, head=make_head("all", 11, (4, 3)))
    humanline = HUMANLINE if loss.anchor else None
    for frozen in ((), ("weight", "bias")):
        want, want_grad = oracle_loss(case, loss, frozen=frozen, humanline=humanline)
        for plan in plans_for(loss, frozen_head=bool(frozen), capped=True)[1:]:
            out, grads = run_loss(case, loss, frozen=frozen, humanline=humanline, plan=plan)
            check_loss(out.loss.detach(), want.detach(), torch.float64)
            for name, grad in grads.items():
                check_grad(grad, want_grad[name], torch.float64, name)


@pytest.mark.parametrize("loss", [x for x in LOSSES if not stops_a_gradient(x)], ids=loss_id)
@pytest.mark.usefixtures("tiny_tiles")
def test_gradcheck(loss: fa.Loss):
    """Every partial derivative of every loss under every plan, in tiles of 3 rows and 4 columns."""
    lengths, width = [3, 1, 0, 2], 3
    case = make_case(lengths, width=width, H=3, V=11, seed=1, head=make_head("all", 11, (4, width)))
    humanline = HUMANLINE if loss.anchor else None

    for frozen in (False, True):
        for plan in plans_for(loss, frozen_head=frozen, capped=True)[1:]:
            names = ("hidden",) if frozen else ("hidden", "weight", "bias")

            def value(moved: dict[str, torch.Tensor], plan: str = plan) -> torch.Tensor:
                at = case.with_operands({**case.operands(), **moved})
                wanted = plan if torch.is_grad_enabled() else "score"
                options = {**at.head, "humanline": humanline, "plan": wanted}
                return fa.align_loss(at.hidden, at.weight, case.batch(), loss, **options).loss

            gradcheck(value, {name: case.operands()[name] for name in names}, DIFFERENCE_STEP, DIFFERENCE)


@pytest.mark.parametrize("plan", ["single", "window", "recompute", "jacobian"])
def test_very_unlikely_targets(plan: str):
    """The guard for rows with logp = -300 and below, in each plan, among ordinary rows."""
    case = big_case()
    for s, t, gap in ((0, 3, 300.0), (1, 5, 90.0), (4, 7, 2000.0), (5, 2, 85.0), (6, 0, 1e4)):
        row = case.mask[s].nonzero()[t if t < int(case.mask[s].sum()) else 0, 0]
        direction = case.weight[(case.target[s, row] + 1) % 777] - case.weight[case.target[s, row]]
        case.hidden[s, row] += gap * direction / direction.square().sum()
    case = case.to(torch.float32)
    loss = fa.SFT() if plan == "single" else fa.DPO(beta=1e-3)
    keep = ("weight",) if plan == "jacobian" else ()
    want, want_grad = oracle_loss(case, loss, frozen=keep)
    plain, plain_grad = oracle_loss(case, loss, frozen=keep, dtype=torch.float32)
    out, grads = run_loss(case, loss, plan=plan, frozen=keep, workspace_bytes=small_budget(torch.float32))
    check_like_torch(out.loss.detach(), want.detach(), plain.detach(), torch.float32, "loss")
    for name, grad in grads.items():
        check_like_torch(grad, want_grad[name], plain_grad[name], torch.float32, name)


# --- masks ---


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("loss", "plan", "frozen"),
    [
        pytest.param(loss, plan, frozen, id=f"{loss_id(loss)}-{plan}{'-frozen' if frozen else ''}")
        for loss in DEFAULTS
        for frozen in (False, True)
        for plan in plans_for(loss, frozen_head=frozen)[1:]
    ],
)
def test_poison_in_the_padding_changes_no_bit(loss: fa.Loss, plan: str, frozen: bool, poison: float):
    case = big_case("per_token").to(torch.float32)
    dead = ~case.mask
    shape = case.target.shape
    per_token = {
        "advantage": randn(*shape, seed=3).float(),
        "token_weight": randn(*shape, seed=4).float().abs(),
    }
    keep = ("weight",) if frozen else ()
    options: dict[str, Any] = {"plan": plan, "frozen": keep, "workspace_bytes": small_budget(torch.float32)}
    if loss.anchor:
        options["humanline"] = HUMANLINE
    if isinstance(loss, fa.GRAO):  # which has an advantage per sequence
        del per_token["advantage"]
    want, want_grad = run_loss(case, loss, changes=per_token, **options)

    case.hidden[dead] = poison
    case.head["temperature"][dead] = poison
    for name in ("old_logp", "ref_logp"):
        case.columns[name][dead] = poison
    for column in per_token.values():
        column[dead] = poison
    out, grads = run_loss(case, loss, changes=per_token, **options)
    assert torch.equal(out.loss.detach(), want.loss.detach())
    for name, metric in out.metrics.items():
        assert torch.equal(metric, want.metrics[name]), name
    assert torch.equal(grads["hidden"][dead], torch.zeros_like(grads["hidden"][dead]))
    for name, grad in grads.items():
        assert torch.equal(grad, want_grad[name]), name


# --- what a plan costs ---


def passes(case: Case, loss: fa.Loss, frozen: bool = False, grad: bool = True, **options) -> float:
    """GEMM passes, each N * V * H multiply-adds with N the live tokens."""
    leaves = leaves_of(case, ("weight",) if frozen else ())

    def run() -> None:
        with torch.set_grad_enabled(grad):
            out = fa.align_loss(leaves["hidden"], leaves["weight"], case.batch(), loss, **options)
        if grad:
            out.loss.backward()

    one = int(case.mask.sum()) * case.weight.numel()
    return sum(gemms(run)) / one


def share_with_coefficient(case: Case, loss: fa.Loss) -> float:
    """f: live tokens whose log-prob the loss has a gradient in."""
    _, grads = run_loss(case, loss, backend="eager")
    return int(grads["hidden"].ne(0).any(-1).sum()) / int(case.mask.sum())


@pytest.mark.parametrize("loss", [fa.SFT(), fa.DPO(), fa.KTO(), fa.PPO()], ids=loss_id)
def test_gemm_passes(loss: fa.Loss):
    case = big_case().to(torch.float32)
    budget: dict[str, Any] = {"workspace_bytes": small_budget(torch.float32)}
    forward_plan = "single" if loss.item == "token" else "window"
    assert passes(case, loss, grad=False, **budget) == pytest.approx(1, rel=0.01)
    assert passes(case, loss, frozen=True, plan="jacobian", **budget) == pytest.approx(2, rel=0.01)
    f = share_with_coefficient(case, loss)
    assert passes(case, loss, plan="recompute", **budget) == pytest.approx(1 + 3 * f, rel=0.01)
    assert passes(case, loss, plan=forward_plan, **budget) <= (1 + 2 * f) * 1.01
    # what auto takes: the fewest passes that fit
    assert passes(case, loss, grad=False) == pytest.approx(1, rel=0.01)
    assert passes(case, loss, frozen=True) <= 2 * 1.01
    assert passes(case, loss) <= 3 * 1.01
    assert passes(case, loss, workspace_bytes=100 * KIB) <= 4 * 1.01


def test_a_small_budget_means_several_chunks_and_tiles():
    """Else the tests above would compare one and the same walk."""
    case = big_case().to(torch.float32)
    leaves = leaves_of(case)

    def products(plan: str, loss: fa.Loss, budget: int | None) -> int:
        def run() -> None:
            options = {"plan": plan, "workspace_bytes": budget}
            fa.align_loss(leaves["hidden"], leaves["weight"], case.batch(), loss, **options).loss.backward()

        return len(gemms(run))

    for plan, loss, budget in (
        ("single", fa.SFT(), small_budget(torch.float32)),
        ("window", fa.DPO(), small_budget(torch.float32)),
        ("recompute", fa.DPO(), 100 * KIB),
    ):
        assert products(plan, loss, budget) >= 2 * products(plan, loss, None), plan


@pytest.mark.parametrize("dead", [False, True])
@pytest.mark.parametrize("loss", [fa.SFT(), fa.DPO()], ids=loss_id)
def test_kept_exponentials_give_dhidden_in_few_products(
    loss: fa.Loss, dead: bool, monkeypatch: pytest.MonkeyPatch
):
    """In one, over all of the vocabulary; of rows that are live, in as few as fit the scratch of a tile."""
    case = big_case(V=2000).to(torch.float32)
    rows = int(case.mask.sum())
    monkeypatch.setattr(planner, "TILE_BYTES", {"cpu": 4 * 256 * rows})  # eight tiles
    weight = torch.ones(case.target.shape)
    if dead:
        weight[:, 1::3] = weight[:, 2::3] = 0.0
    live = int((weight * case.mask).sum())
    run = partial(run_loss, case, loss, frozen=("weight",), changes={"token_weight": weight})
    plan = "single" if isinstance(loss, fa.SFT) else "window"
    found = gemms(lambda: run(plan=plan))
    assert sum(found) == (rows + live) * case.weight.numel()
    assert len(found) - 8 == (-(-2000 // (256 * rows // live // 256 * 256)) if dead else 1)
    want, got = run(plan="recompute")[1], run(plan=plan)[1]
    check_grad(got["hidden"], want["hidden"].double(), torch.float32, "hidden")


def test_a_masked_half_costs_half():
    case = big_case().to(torch.float32)
    leaves = leaves_of(case)

    def run() -> None:
        fa.linear_logp(leaves["hidden"], leaves["weight"], case.target).sum().backward()

    whole = sum(gemms(run))
    case.target[::2] = -100
    dropped = int(case.mask.sum()) / sum(LENGTHS)
    assert sum(gemms(run)) == pytest.approx(dropped * whole, rel=0.01)


# --- refusals ---


def test_plans_that_cannot_serve_say_why():
    case = big_case().to(torch.float32)
    with pytest.raises(ValueError, match=r"(?s)plan.*'score'.*gradient"):
        run_loss(case, fa.SFT(), plan="score")
    with pytest.raises(ValueError, match=r"(?s)plan.*'jacobian'.*frozen"):
        run_loss(case, fa.SFT(), plan="jacobian")
    with pytest.raises(ValueError, match=r"(?s)plan.*'single'.*pair.*'window'"):
        run_loss(case, fa.DPO(), plan="single")
    with pytest.raises(ValueError, match=r"(?s)plan.*'window'.*token.*'single'"):
        run_loss(case, fa.SFT(), plan="window")
    with pytest.raises(ValueError, match=r"(?s)plan.*'single'.*workspace_bytes.*got 1024"):
        run_loss(case, fa.SFT(), plan="single", workspace_bytes=1024)
    leaves = leaves_of(case)
    for plan in ("single", "window"):
        with pytest.raises(ValueError, match=rf"(?s)plan.*'{plan}'.*align_loss"):
            fa.linear_logp(leaves["hidden"], leaves["weight"], case.target, plan=plan)


@pytest.mark.parametrize("workspace_bytes", [1, 1000])
@pytest.mark.parametrize("loss", DEFAULTS, ids=loss_id)
def test_a_budget_below_the_smallest_tile_is_raised_to_it(loss: fa.Loss, workspace_bytes: int):
    case = big_case().to(torch.float32)
    want, want_grad = oracle_loss(case, loss)
    out, grads = run_loss(case, loss, workspace_bytes=workspace_bytes)
    check_loss(out.loss.detach(), want.detach(), torch.float32)
    for name, grad in grads.items():
        check_grad(grad, want_grad[name], torch.float32, name)


def test_the_environment_sets_the_budget(monkeypatch: pytest.MonkeyPatch):
    case = big_case().to(torch.float32)
    monkeypatch.setenv("FUSED_ALIGN_WORKSPACE_BYTES", "1024")
    with pytest.raises(ValueError, match="workspace_bytes.*1024"):
        run_loss(case, fa.SFT(), plan="single")
    run_loss(case, fa.SFT(), plan="single", workspace_bytes=1 << 24)


@pytest.mark.parametrize(("loss", "plan"), [(fa.PPO(), "single"), (fa.DPO(), "window"), (fa.KTO(), "window")])
def test_second_backward_says_why_not(loss: fa.Loss, plan: str):
    """Gradients formed in the forward are scaled in place: they can be given out once."""
    case = big_case().to(torch.float32)
    leaves = leaves_of(case)
    out = fa.align_loss(leaves["hidden"], leaves["weight"], case.batch(), loss, plan=plan)
    out.loss.backward(retain_graph=True)
    assert leaves["weight"].grad is not None
    first = leaves["weight"].grad.clone()
    with pytest.raises(RuntimeError, match=r"(?s)align_loss.*backward.*(once|twice|second).*recompute"):
        out.loss.backward()
    assert torch.equal(leaves["weight"].grad, first)


def test_gradients_are_the_callers_own():
    """A second call must not write into gradients that the first one handed out."""
    case = big_case().to(torch.float32)
    for loss in (fa.SFT(), fa.DPO()):
        leaves = leaves_of(case)
        out = fa.align_loss(leaves["hidden"], leaves["weight"], case.batch(), loss)
        grads = torch.autograd.grad(out.loss, list(leaves.values()))
        kept = [grad.clone() for grad in grads]
        other = fa.align_loss(leaves["hidden"] * 2, leaves["weight"], case.batch(), loss)
        torch.autograd.grad(other.loss, list(leaves.values()))
        for grad, same in zip(grads, kept, strict=True):
            assert torch.equal(grad, same)


@pytest.mark.usefixtures("tiny_tiles")
def test_tiny_tiles_are_tiny():
    case = make_case([3, 1, 0, 2], width=3, H=3, V=11)
    for loss in (fa.SFT(), fa.DPO()):
        for plan in plans_for(loss)[1:]:
            count = len(gemms(lambda loss=loss, plan=plan: run_loss(case, loss, plan=plan)))
            assert count >= 2 * 3 * 2, (
                plan
            )  # forward and backward, three tiles of columns, two chunks of rows
