"""Every loss through align_loss against its oracle, and the numbers that can be worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import (
    HUMANLINE,
    LOSSES,
    REGISTRY,
    Case,
    fresh,
    generator,
    gradients,
    grpo_case,
    leaves_of,
    loss_id,
    make_case,
    oracle_loss,
    plans_for,
    randn,
    run_loss,
    uniform_case,
)
from tolerances import check_grad, check_like_torch, check_loss

import fused_align as fa
import oracles

X = oracles.IGNORE
LENGTHS = [7, 3, 1, 0, 5, 4, 8, 2]
ANCHORED = [loss for loss in LOSSES if loss.anchor is not None]


def small_case(seed: int = 0) -> Case:
    return make_case(
        LENGTHS, width=8, H=9, V=33, seed=seed, head={"bias": randn(33, seed=8), "temperature": 0.8}
    )


def weighted(case: Case) -> dict:
    return {"token_weight": torch.rand(case.target.shape, generator=generator(5)).double() * 2}


def check(case: Case, loss: fa.Loss, dtype: torch.dtype, *, backend: str = "torch", **options) -> None:
    case = case.to(dtype)
    want, want_grad = oracle_loss(case, loss, **options)
    out, grads = run_loss(case, loss, backend=backend, **options)
    assert out.loss.shape == () and out.loss.dtype == dtype
    check_loss(out.loss.detach(), want.detach(), dtype)
    assert grads.keys() == want_grad.keys()
    for name, grad in grads.items():
        check_grad(grad, want_grad[name], dtype, name)


def test_every_loss_has_an_oracle():
    assert REGISTRY.keys() == oracles.LOSSES.keys()
    assert {type(loss) for loss in LOSSES} == {*REGISTRY.values(), fa.Sum}


@pytest.mark.parametrize("loss", LOSSES, ids=loss_id)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("backend", ["torch", "eager"])
def test_against_the_oracle(loss: fa.Loss, dtype: torch.dtype, backend: str):
    check(small_case(), loss, dtype, backend=backend)


@pytest.mark.parametrize("loss", ANCHORED, ids=loss_id)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_with_humanline(loss: fa.Loss, dtype: torch.dtype):
    case = small_case(1)
    check(case, loss, dtype, humanline=HUMANLINE)
    plain, clipped = oracle_loss(case, loss)[0], oracle_loss(case, loss, humanline=HUMANLINE)[0]
    # PPO's own clip is tighter than these bounds, so there the value may stay; the others must feel them
    assert isinstance(loss, fa.GRPO) or plain != clipped


@pytest.mark.parametrize("loss", LOSSES, ids=loss_id)
def test_with_a_normalizer(loss: fa.Loss):
    case = small_case(2)
    units = list(loss.counts(case.batch().live()))
    given: Any = {unit: 19.0 + i for i, unit in enumerate(units)}
    check(case, loss, torch.float64, normalizer=given)
    plain, _ = run_loss(case, loss, normalizer=given)
    as_tensors, _ = run_loss(
        case, loss, normalizer={u: torch.tensor(n) for u, n in given.items()} | {"else": 3}
    )
    torch.testing.assert_close(as_tensors.loss, plain.loss, rtol=1e-12, atol=0)
    if len(units) == 1:
        by_number, _ = run_loss(case, loss, normalizer=19)
        assert by_number.loss == plain.loss
    else:
        with pytest.raises(ValueError, match=r"(?s)divides by .* dict"):
            run_loss(case, loss, normalizer=19)


@pytest.mark.parametrize("loss", LOSSES, ids=loss_id)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_with_token_weights(loss: fa.Loss, dtype: torch.dtype):
    case = small_case(3)
    check(case, loss, dtype, changes=weighted(case.to(dtype)))


@pytest.mark.parametrize("loss", LOSSES, ids=loss_id)
def test_upstream_gradient(loss: fa.Loss):
    case = small_case(4)
    _, want = oracle_loss(case, loss)
    _, grads = run_loss(case, loss, upstream=-3.7)
    for name, grad in grads.items():
        check_grad(grad, -3.7 * want[name], torch.float64, name)


@pytest.mark.parametrize("loss", LOSSES, ids=loss_id)
@pytest.mark.parametrize("lengths", [[0, 0, 0, 0], [1, 0, 0, 1]], ids=str)
def test_nothing_to_learn_from(loss: fa.Loss, lengths: list[int]):
    """All masked: whatever constant the empty items have, finite, and gradients of exactly 0."""
    case = make_case(lengths, width=3, H=5, V=7)
    check(case, loss, torch.float64)
    if not any(lengths):
        for grad in run_loss(case, loss)[1].values():
            assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("loss", LOSSES, ids=loss_id)
def test_no_sequences_at_all(loss: fa.Loss):
    case = make_case([2, 1], width=3, H=5, V=7)
    none = {k: v[:0] if v.dim() else v for k, v in case.columns.items()}
    out, grads = run_loss(Case(case.hidden[:0], case.weight, case.target[:0], {}, none), loss)
    assert out.loss == 0
    for grad in grads.values():
        assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("loss", LOSSES, ids=loss_id)
def test_scoring(loss: fa.Loss):
    case = small_case(5)
    case.weight.requires_grad_()
    with torch.no_grad():
        out = fa.align_loss(case.hidden, case.weight, case.batch(), fresh(loss), **case.head)
    assert not out.loss.requires_grad
    case.weight.requires_grad_(False)
    check_loss(out.loss, oracle_loss(case, loss)[0].detach(), torch.float64)


@pytest.mark.parametrize("loss", [loss for loss in LOSSES if loss.anchor == "old"], ids=loss_id)
@pytest.mark.parametrize("humanline", [None, HUMANLINE], ids=["", "humanline"])
def test_on_policy(loss: fa.Loss, humanline: fa.Humanline | None):
    check(small_case(6), loss, torch.float64, changes={"old_logp": None}, humanline=humanline)


@pytest.mark.parametrize("loss", [loss for loss in LOSSES if loss.anchor == "old"], ids=loss_id)
def test_advantage_per_token(loss: fa.Loss):
    case = small_case(7)
    check(case, loss, torch.float64, changes={"advantage": randn(*case.target.shape, seed=9)})


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("gap", [100.0, 1000.0])
def test_ratio_stays_finite(advantage: float, gap: float):
    """exp(min(log ratio, 60)), without gradient above 60."""
    case = make_case([2, 2], width=2, H=4, V=9).to(torch.float32)
    case.columns["advantage"] = torch.tensor([advantage, advantage])
    case.columns["old_logp"] = torch.full((2, 2), -gap)
    out, grads = run_loss(case, fa.GRPO())
    want = -1.2 if advantage > 0 else math.exp(60)
    assert float(out.loss.detach()) == pytest.approx(want, rel=1e-5)
    for grad in grads.values():
        assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("plan", ["single", "recompute", "jacobian"])
@pytest.mark.parametrize("lead", [0.0, 40.0, 120.0])
@pytest.mark.parametrize("gap", [30.0, 47.0, 52.0, 59.0])
def test_steep_coefficients(gap: float, lead: float, plan: str):
    """A ratio of e^59 on a target of any probability: c / Z alone has no float32, its product with E does."""
    case = make_case([5, 4], width=6, H=8, V=300).to(torch.float32)
    live = case.mask
    case.hidden[live] += lead * case.weight[case.target[live]] / case.weight.square().sum(1).mean()
    logp, _, _ = oracles.token_stats(case.hidden.double(), case.weight.double(), case.target)
    case.columns["advantage"] = -torch.ones(2)
    case.columns["old_logp"] = (logp - gap * (torch.arange(6) % 2)).float()  # others are ordinary
    keep = ("weight",) if plan == "jacobian" else ()
    want, want_grad = oracle_loss(case, fa.GRPO(), frozen=keep)
    plain, plain_grad = oracle_loss(case, fa.GRPO(), frozen=keep, dtype=torch.float32)
    out, grads = run_loss(case, fa.GRPO(), frozen=keep, plan=plan)
    check_like_torch(out.loss.detach(), want.detach(), plain.detach(), torch.float32, "loss")
    for name, grad in grads.items():
        check_like_torch(grad, want_grad[name], plain_grad[name], torch.float32, name)


def test_steep_entropy_coefficients():
    case = make_case([5, 4], width=6, H=8, V=300).to(torch.float32)
    live = case.mask
    case.hidden[live] += 40 * case.weight[case.target[live]] / case.weight.square().sum(1).mean()
    _, want = oracle_entropy_gradient(case, torch.float64)
    _, plain = oracle_entropy_gradient(case, torch.float32)
    leaves = leaves_of(case)
    entropy = fa.token_stats(leaves["hidden"], leaves["weight"], case.target, entropy=True).entropy
    assert entropy is not None
    for name, grad in gradients(1e20 * entropy.sum(), leaves).items():
        check_like_torch(grad / 1e20, want[name], plain[name], torch.float32, name)


def oracle_entropy_gradient(case: Case, dtype: torch.dtype) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    leaves = leaves_of(case.with_operands({k: v.to(dtype) for k, v in case.operands().items()}))
    _, entropy, _ = oracles.token_stats(leaves["hidden"], leaves["weight"], case.target)
    return entropy.sum().detach(), gradients(entropy.sum(), leaves)


# --- kto_kl ---


@pytest.mark.parametrize("humanline", [None, fa.Humanline(-0.2, 0.9)], ids=["", "humanline"])
def test_kto_kl(humanline: fa.Humanline | None):
    policy, ref = randn(4, 5, seed=1) + 1.0, randn(4, 5, seed=2)
    target = torch.ones(4, 5, dtype=torch.int64)
    target[0, 3:] = target[2] = X  # a shorter sequence, and one that does not count
    policy[2] = ref[0, 3:] = float("nan")
    policy.requires_grad_()
    bounds = None if humanline is None else (humanline.log_eps_p, humanline.log_eps_r)
    want = oracles.kto_kl(policy.detach(), ref, target, bounds)
    assert want > 0
    got = fa.kto_kl(policy, ref, target, humanline=humanline)
    assert got.shape == () and not got.requires_grad
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)


def test_kto_kl_is_never_negative():
    target = torch.ones(2, 3, dtype=torch.int64)
    assert fa.kto_kl(torch.full((2, 3), -2.0), torch.full((2, 3), -1.0), target) == 0
    assert fa.kto_kl(torch.zeros(2, 3), torch.ones(2, 3), torch.full_like(target, X)) == 0


def test_kto_kl_only_shifts_the_reference_point():
    """A given kl is a constant: no gradient flows into it."""
    case = small_case()
    kl = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    out, grads = run_loss(case, fa.KTO(), changes={"kl": kl})
    _, want = oracle_loss(case, fa.KTO(), changes={"kl": kl.detach()})
    assert kl.grad is None
    check_grad(grads["weight"], want["weight"], torch.float64)


# --- metrics ---


def metrics(case: Case, loss: fa.Loss, **options) -> dict[str, float]:
    out, _ = run_loss(case, loss, **options)
    for name, tensor in out.metrics.items():
        assert tensor.shape == () and not tensor.requires_grad, name
    return {name: float(tensor) for name, tensor in out.metrics.items()}


def pair_case() -> Case:
    """L = 1.5, -1 chosen and -2, 0.25 rejected; sums of logp -2, -1 and -1, -2 times log 4."""
    return uniform_case(
        [[0.5, 1.0], [-1.0, 99.0], [-2.0, 99.0], [0.5, -0.25]], [[1, 2], [1, X], [3, X], [0, 0]]
    )


@pytest.mark.parametrize("plan", ["auto", "recompute", "window"])
def test_pair_metrics(plan: str):
    found = metrics(pair_case(), fa.DPO(beta=0.2), plan=plan)
    assert found == pytest.approx(
        {
            "tokens/live": 6,
            "logps/chosen": -1.5 * math.log(4),
            "logps/rejected": -1.5 * math.log(4),
            "rewards/chosen": 0.2 * 0.25,
            "rewards/rejected": 0.2 * -0.875,
            "rewards/accuracies": 0.5,
            "rewards/margins": 0.2 * 1.125,
        }
    )


def test_pair_metrics_with_humanline():
    """Rewards are those of the clipped sums that the loss uses; the log-probs are not clipped."""
    found = metrics(pair_case(), fa.DPO(beta=0.2), humanline=fa.Humanline(-0.5, 0.75))
    assert found["humanline/unclipped"] == pytest.approx(3 / 6)  # strictly inside
    assert found["rewards/chosen"] == pytest.approx(0.2 * (0.5 + 0.75 - 0.5) / 2)
    assert found["rewards/rejected"] == pytest.approx(0.2 * (-0.5 + 0.5 - 0.25) / 2)
    assert found["logps/chosen"] == pytest.approx(-1.5 * math.log(4))


def test_ipo_metrics():
    found = metrics(pair_case(), fa.IPO())
    assert found["rewards/accuracies"] == 0.5
    assert found["rewards/margins"] == pytest.approx(found["rewards/chosen"] - found["rewards/rejected"])


def test_kto_metrics():
    case = pair_case()
    case.columns |= {"desirable": torch.tensor([True, False, True, False]), "kl": torch.tensor(0.0)}
    found = metrics(case, fa.KTO(beta=0.2))
    assert found["rewards/chosen"] == pytest.approx(0.2 * -0.25)
    assert found["rewards/rejected"] == pytest.approx(0.2 * -0.375)
    assert found["logps/chosen"] == pytest.approx(-1.5 * math.log(4))
    assert found["logps/rejected"] == pytest.approx(-1.5 * math.log(4))
    assert "rewards/margins" not in found and "rewards/accuracies" not in found
    case.columns["desirable"] = torch.ones(4, dtype=torch.bool)
    found = metrics(case, fa.KTO())
    assert math.isnan(found["rewards/rejected"]) and math.isnan(found["logps/rejected"])
    assert math.isfinite(found["rewards/chosen"])


def test_policy_metrics():
    """Of three tokens one is clipped above (1.5, A > 0); 0.5 with A > 0 and 1.1 with A < 0 are not."""
    case = grpo_case()
    found = metrics(case, fa.GRPO())
    assert found["clip_ratio/high_mean"] == pytest.approx(1 / 3)
    assert found["clip_ratio/low_mean"] == 0
    assert found["clip_ratio/region_mean"] == pytest.approx(1 / 3)
    case.columns["advantage"] = -case.columns["advantage"]
    found = metrics(case, fa.GRPO(eps_low=0.1))
    assert found["clip_ratio/high_mean"] == 0
    assert found["clip_ratio/low_mean"] == pytest.approx(1 / 3)
    del case.columns["ref_logp"]
    assert "kl" not in metrics(case, fa.GRPO())


@pytest.mark.parametrize("loss", LOSSES, ids=loss_id)
def test_metrics_do_not_depend_on_the_plan(loss: fa.Loss):
    case = small_case(8)
    humanline = HUMANLINE if loss.anchor else None
    first = metrics(case, loss, plan="recompute", humanline=humanline)
    other = metrics(case, loss, plan=plans_for(loss)[-1], humanline=humanline)
    assert first == pytest.approx(other, rel=1e-9)
    assert first["tokens/live"] == sum(LENGTHS)
    assert ("humanline/unclipped" in first) == (humanline is not None)
