"""HumanlineSampling: which tokens are rejected given the draws, and that they lose their gradient only."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import training
from cases import (
    LOSSES,
    REGISTRY,
    Case,
    fresh,
    generator,
    gradients,
    leaves_of,
    loss_id,
    make_case,
    make_head,
    options_of,
    run_loss,
)
from tolerances import check_grad, check_loss
from torch import Tensor

import fused_align as fa
import oracles
from fused_align.train import AlignTrainer

F64 = torch.float64
LENGTHS = [7, 3, 1, 0, 5, 4, 8, 2]
SEED = 5
#: values, ratios and sums of every kind; no term that Humanline leaves alone
SAMPLED: list[fa.Loss] = [
    fa.GRPO(),
    fa.GRPO(eps_low=0.5, eps_high=0.9, aggregation="token_mean"),
    fa.CISPO(),
    fa.GSPO(eps_low=0.5, eps_high=0.9),
    fa.DPO(beta=0.5),
    fa.IPO(),
    fa.KTO(beta=0.5),
    fa.BCO(beta=0.5),
]
GAMMAS = [(0.5, 0.01), (0.3, 0.4), (0.8, 0.2)]


def small_case(seed: int = 0, **head: Any) -> Case:
    return make_case(LENGTHS, width=8, H=9, V=33, seed=seed, head=head or make_head("bias", 33, (8, 8)))


def sampling(gamma_p: float = 0.3, gamma_r: float = 0.4, seed: int = SEED) -> fa.HumanlineSampling:
    return fa.HumanlineSampling(gamma_p, gamma_r, generator(seed))


def rejected(case: Case, loss: fa.Loss, clip: fa.HumanlineSampling, draws: int | None = None) -> Tensor:
    """[S, T] bool by the formula, from the numbers that the clip is about to draw."""
    assert clip.generator is not None
    logp, _, _ = oracles.token_stats(case.hidden.double(), case.weight.double(), case.target, **case.head)
    ratio = (logp - case.columns[f"{loss.anchor}_logp"])[case.mask].exp()
    twin = torch.Generator()
    twin.set_state(clip.generator.get_state())
    draws = ratio.numel() if draws is None else min(draws, case.target.numel())
    uniform = torch.rand(2, draws, generator=twin, dtype=F64)[:, : ratio.numel()]
    b_p, b_r = uniform[0] ** (1 / clip.gamma_p), uniform[1] ** (1 / clip.gamma_r)
    found = torch.zeros_like(case.mask)
    found[case.mask] = (ratio < ratio.max() * b_p) | (1 / ratio < (1 / ratio).max() * b_r)
    return found


def coefficients(case: Case, loss: fa.Loss, logp: Tensor) -> tuple[Tensor, Tensor]:  # [S, T] -> [], [S, T]
    """The oracle's loss, and its derivatives by the log-probs."""
    leaf = logp.detach().requires_grad_()
    value = oracles.LOSSES[type(loss).__name__.lower()](
        oracles.Tokens(leaf, case.mask, **case.columns), **options_of(loss)
    )
    return value.detach(), torch.autograd.grad(value, leaf)[0]


def free_term(loss: fa.Loss) -> bool:
    """Whether there is a KL penalty."""
    return loss.anchor == "old" and loss.needs_ref


def want(
    case: Case, loss: fa.Loss, dead: Tensor, frozen: tuple[str, ...] = ()
) -> tuple[Tensor, dict[str, Tensor]]:
    """The oracle's value, and the gradients of the operands without those tokens."""
    leaves = leaves_of(case, frozen)
    at = case.with_operands(leaves)
    logp, _, _ = oracles.token_stats(at.hidden, at.weight, at.target, **at.head)
    value, slope = coefficients(case, loss, logp)
    free = 0.0  # a KL penalty is of the unclipped log-probs
    if free_term(loss):
        free = slope - coefficients(case, replace(loss, beta=0.0), logp)[1]
    return value, gradients((torch.where(dead, free, slope) * logp).sum(), leaves)


def check(case: Case, loss: fa.Loss, clip: fa.HumanlineSampling, **options: Any) -> fa.AlignOutput:
    """Value, gradients and the metric of one call, given its draws."""
    dead, frozen = rejected(case, loss, clip, options.get("max_live")), options.pop("frozen", ())
    value, grads = want(case, loss, dead, frozen)
    out, got = run_loss(case, loss, humanline=clip, frozen=frozen, **options)
    check_loss(out.loss.detach(), value, F64)
    assert got.keys() == grads.keys()
    for name, grad in got.items():
        check_grad(grad, grads[name], F64, f"{loss_id(loss)} {options} {name}")
    assert torch.equal(got["hidden"][dead], torch.zeros_like(got["hidden"][dead])) or free_term(loss)
    unclipped = 1 - int(dead.sum()) / int(case.mask.sum())
    assert float(out.metrics["humanline/unclipped"]) == pytest.approx(unclipped, abs=1e-12)
    return out


# ---- given the draws -------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", SAMPLED, ids=loss_id)
@pytest.mark.parametrize(("gamma_p", "gamma_r"), GAMMAS)
def test_given_the_draws(loss: fa.Loss, gamma_p: float, gamma_r: float):
    case, clip = small_case(), sampling(gamma_p, gamma_r)
    dead = rejected(case, loss, clip)
    assert 0 < dead.sum() < case.mask.sum()
    calls = [{"plan": "auto"}, {"plan": "recompute"}, {"backend": "eager"}]
    calls += [{"frozen": ("weight", "bias"), "plan": plan} for plan in ("auto", "recompute", "jacobian")]
    for call in calls:
        check(case, loss, sampling(gamma_p, gamma_r), **call)


def test_the_cases_tell_the_two_sides_apart():
    """Both conditions reject some tokens, and the draws of one side would not do for the other."""
    case, loss = small_case(), fa.GRPO()
    low = rejected(case, loss, sampling(0.3, 1e-9))
    high = rejected(case, loss, sampling(1e-9, 0.4))
    both = rejected(case, loss, sampling(0.3, 0.4))
    assert (low & ~high).any() and (high & ~low).any() and torch.equal(low | high, both)


@pytest.mark.usefixtures("tiny_tiles")
@pytest.mark.parametrize("loss", SAMPLED, ids=loss_id)
def test_in_tiny_tiles(loss: fa.Loss):
    for frozen, plan in (((), "recompute"), (("weight", "bias"), "jacobian")):
        check(small_case(1), loss, sampling(), plan=plan, frozen=frozen)


def test_the_kl_penalty_keeps_its_gradient():
    for kl in ("k1", "k2", "k3"):
        check(small_case(2), fa.GRPO(beta=0.3, kl=kl), sampling())
    case = small_case(2)
    case.columns["advantage"] = torch.zeros(8, dtype=F64)
    dead = rejected(case, fa.GRPO(), sampling())
    _, grads = run_loss(case, fa.GRPO(beta=0.3), humanline=sampling())
    assert (grads["hidden"][dead] != 0).any(-1).all()


def test_parts_of_a_sum_that_have_an_anchor():
    """SFT's gradient is whole; DPO and KTO share the draws."""
    case, parts = small_case(3), [(1.0, fa.DPO()), (0.3, fa.KTO()), (0.5, fa.SFT())]
    dead = rejected(case, fa.DPO(), sampling())
    found = [want(case, loss, dead if loss.anchor else torch.zeros_like(dead)) for _, loss in parts]
    out, grads = run_loss(case, fa.Sum(parts), humanline=sampling())
    check_loss(out.loss.detach(), sum(w * v for (w, _), (v, _) in zip(parts, found, strict=True)), F64)
    for name, grad in grads.items():
        whole = sum(w * g[name] for (w, _), (_, g) in zip(parts, found, strict=True))
        check_grad(grad, whole, F64, name)


@pytest.mark.parametrize("loss", SAMPLED, ids=loss_id)
def test_the_value_and_all_other_metrics_are_those_without_it(loss: fa.Loss):
    case = small_case(4)
    plain, _ = run_loss(case, loss)
    out, _ = run_loss(case, loss, humanline=sampling())
    assert torch.equal(out.loss, plain.loss)
    others = {name: value for name, value in out.metrics.items() if name != "humanline/unclipped"}
    assert {*others} == {*plain.metrics}
    assert all(torch.equal(value, plain.metrics[name]) for name, value in others.items())


@pytest.mark.parametrize("loss", SAMPLED, ids=loss_id)
def test_padded_is_packed(loss: fa.Loss):
    case = small_case(5)
    live = {name: x[case.mask] if x.shape == case.target.shape else x for name, x in case.columns.items()}
    offsets = torch.tensor([0, *LENGTHS]).cumsum(0)
    leaves = {"hidden": case.hidden[case.mask].requires_grad_(), "weight": case.weight.clone()}
    leaves["weight"].requires_grad_()
    batch = fa.Batch(case.target[case.mask], cu_seqlens=offsets, **live)
    out = fa.align_loss(
        leaves["hidden"], leaves["weight"], batch, fresh(loss), humanline=sampling(), bias=case.bias
    )
    grads = gradients(out.loss, leaves)
    padded, want_grads = run_loss(case, loss, humanline=sampling())
    check_loss(out.loss.detach(), padded.loss.detach(), F64)
    assert out.metrics["humanline/unclipped"] == padded.metrics["humanline/unclipped"] < 1
    check_grad(grads["weight"], want_grads["weight"], F64)
    check_grad(grads["hidden"], want_grads["hidden"][case.mask], F64)


@pytest.mark.parametrize("loss", SAMPLED, ids=loss_id)
@pytest.mark.parametrize("more", [0, 5, 40])
def test_max_live(loss: fa.Loss, more: int):
    """As many numbers are drawn as there are tokens, padding included.

    Padding decides nothing, though its log-ratio of 0 be the largest of all, or the smallest.
    """
    most = sum(LENGTHS) + more
    for shift in (0.0, 5.0, -5.0):
        case = small_case(6)
        case.columns[f"{loss.anchor}_logp"] += shift
        for frozen, plan in (((), "auto"), ((), "recompute"), (("weight", "bias"), "jacobian")):
            check(case, loss, sampling(), max_live=most, plan=plan, frozen=frozen)


def test_what_stands_in_ignored_positions_does_not_matter():
    """Neither for the largest ratio nor for the draws."""
    case = small_case(7)
    out, grads = run_loss(case, fa.GRPO(), humanline=sampling())
    for poison in (1e3, -1e3, math.nan):
        case.columns["old_logp"] = case.columns["old_logp"].where(case.mask, poison)
        for options in ({}, {"max_live": sum(LENGTHS)}):
            other, got = run_loss(case, fa.GRPO(), humanline=sampling(), **options)
            assert other.metrics["humanline/unclipped"] == out.metrics["humanline/unclipped"]
            check_grad(got["hidden"], grads["hidden"], F64)


# ---- the draws -------------------------------------------------------------------------------------------


def test_every_call_draws_anew_and_a_seed_repeats_them():
    case, clip, same = small_case(), sampling(), sampling()
    first, second, again = (run_loss(case, fa.GRPO(), humanline=c)[1]["hidden"] for c in (clip, clip, same))
    assert torch.equal(first, again) and not torch.equal(first, second)
    twin = generator(SEED)
    torch.rand(2, sum(LENGTHS), generator=twin, dtype=F64)
    assert torch.equal(same.generator.get_state(), twin.get_state())  # 2 n numbers a call, and no more


def test_without_a_generator_it_draws_from_torchs_own():
    case, clip = small_case(), fa.HumanlineSampling(0.3, 0.4)
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(run_loss(case, fa.GRPO(), humanline=clip)[1]["hidden"])
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    torch.manual_seed(1)
    assert torch.equal(run_loss(case, fa.GRPO(), humanline=sampling(seed=1))[1]["hidden"], found[0])


def test_a_policy_that_is_its_own_anchor_loses_no_token():
    """Every ratio is 1, the largest too, and no draw exceeds it."""
    case = small_case()
    out, grads = run_loss(case, fa.GRPO(), humanline=sampling(), changes={"old_logp": None})
    _, plain = run_loss(case, fa.GRPO(), changes={"old_logp": None}, plan="recompute")  # as the draws need
    assert out.metrics["humanline/unclipped"] == 1
    assert torch.equal(grads["hidden"], plain["hidden"])


@pytest.mark.parametrize("lengths", [[0, 0], [1, 0]], ids=str)
def test_one_token_or_none(lengths: list[int]):
    case = make_case(lengths, width=2, H=4, V=7)
    plain, want_grads = run_loss(case, fa.GRPO())
    for options in ({}, {"max_live": 3}):
        out, grads = run_loss(case, fa.GRPO(), humanline=sampling(), **options)
        assert torch.equal(out.loss, plain.loss)  # a single token is the largest on both sides
        check_grad(grads["hidden"], want_grads["hidden"], F64)


@pytest.mark.parametrize(("gamma_p", "gamma_r"), GAMMAS)
def test_as_many_are_rejected_as_beta_draws_say(gamma_p: float, gamma_r: float):
    """P(B > x) = 1 - x^gamma; by torch's Beta as well. 40000 tokens, in four bands of the log-ratio."""
    log_ratio = torch.linspace(-2.5, 1.5, 40000, dtype=F64)
    log_ratio = log_ratio[torch.randperm(40000, generator=generator(1))]
    target = torch.zeros(1, 40000, dtype=torch.int64)
    inside = sampling(gamma_p, gamma_r).bind(fa.Batch(target).live()).inside(log_ratio)
    ratio = log_ratio.exp()
    x_p, x_r = ratio / ratio.max(), ratio.min() / ratio
    torch.manual_seed(2)
    one = torch.ones((), dtype=F64)
    b_p, b_r = (torch.distributions.Beta(g * one, one).sample((40000,)) for g in (gamma_p, gamma_r))
    drawn = (x_p >= b_p) & (x_r >= b_r)
    chance = x_p**gamma_p * x_r**gamma_r  # of being kept
    for low in (-2.5, -1.5, -0.5, 0.5):
        band = (log_ratio >= low) & (log_ratio < low + 1)
        spread = (chance * (1 - chance))[band].sum().sqrt()
        assert abs(inside[band].sum() - chance[band].sum()) <= 4 * spread
        assert abs(inside[band].sum() - drawn[band].sum()) <= 4 * math.sqrt(2) * spread


def test_extreme_ratios_are_no_trouble():
    """exp(l) itself would overflow: the comparison is of logarithms."""
    log_ratio = torch.linspace(-1000, 1000, 200, dtype=F64).requires_grad_()
    batch = fa.Batch(torch.zeros(1, 200, dtype=torch.int64)).live()
    clipped = sampling(0.001, 0.001).bind(batch).clip(log_ratio)
    assert torch.equal(clipped, log_ratio)
    (slope,) = torch.autograd.grad(clipped.sum(), log_ratio)
    log_b = torch.rand(2, 200, generator=generator(SEED), dtype=F64).log() / 0.001
    kept = (log_ratio >= 1000 + log_b[0]) & (-log_ratio >= 1000 + log_b[1])
    assert torch.equal(slope, kept.double()) and 0 < kept.sum() < 200


# ---- what is refused, and the trainer --------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, cls in REGISTRY.items() if cls().anchor is None])
def test_losses_without_an_anchor_are_refused(name: str):
    loss = REGISTRY[name]()
    with pytest.raises(ValueError, match=rf"(?s)Humanline clips.*{loss.name} has none.*Drop humanline"):
        run_loss(small_case(), loss, humanline=sampling())


@pytest.mark.parametrize("loss", [fa.GRPO(), fa.GSPO(), fa.DPO(), fa.KTO()], ids=loss_id)
@pytest.mark.parametrize("plan", ["single", "window"])
def test_plans_that_form_gradients_early_say_why_not(loss: fa.Loss, plan: str):
    with pytest.raises(ValueError, match=rf"plan='{plan}' cannot serve.*the loss couples the whole batch"):
        run_loss(small_case(), loss, humanline=sampling(), plan=plan)
    case = small_case()
    leaves = leaves_of(case)
    told = fa.explain(leaves["hidden"], leaves["weight"], case.batch(), loss, humanline=sampling())
    assert f"the loss couples the whole batch, so {plan} could form no gradient" in told


@pytest.mark.parametrize("gammas", [(0.0, 0.1), (0.1, -1.0), (math.nan, 0.1)], ids=str)
def test_parameters_that_are_no_distribution(gammas: tuple[float, float]):
    with pytest.raises(ValueError, match=r"gamma_p and gamma_r must be positive; got"):
        fa.HumanlineSampling(*gammas)


def test_ktos_reference_point_is_not_clipped():
    policy, ref = torch.tensor([[3.0, 1.0]]), torch.zeros(1, 2)
    target = torch.ones(1, 2, dtype=torch.int64)
    clip = fa.HumanlineSampling(9.0, 9.0)
    assert fa.kto_kl(policy, ref, target, humanline=clip) == fa.kto_kl(policy, ref, target) == 4


def test_every_loss_with_an_anchor_keeps_its_value():
    case = small_case(8)
    for loss in [loss for loss in LOSSES if loss.anchor is not None]:
        plain, _ = run_loss(case, loss)
        out, grads = run_loss(case, loss, humanline=sampling())
        assert torch.equal(out.loss, plain.loss), loss
        assert all(grad.isfinite().all() for grad in grads.values())


def trained(folder: Path, loss: str, seed: int = 0, **settings: Any) -> AlignTrainer:
    settings = {"humanline": "sampling", "max_steps": 5, "save_steps": 3, **settings}
    rows = training.ROWS[loss](10)
    it = training.trainer(folder, tiny.model(seed), rows, loss=loss, save_strategy="steps", **settings)
    it.train(resume_from_checkpoint=settings.get("resume_from_checkpoint"))
    return it


@pytest.mark.parametrize("loss", ["dpo", "grpo"])
def test_the_trainer_samples_and_resumes(tmp_path: Path, loss: str):
    """Against the synced reference, with draws of torch's own generator, which checkpoints hold."""
    whole = trained(tmp_path, loss)
    assert whole.humanline == fa.HumanlineSampling() and whole.schedule == fa.SyncSchedule(1)
    shares = training.logged(whole, "humanline/unclipped")
    assert shares[0] == 1.0 and all(0 < share < 1 for share in shares[1:])
    resumed = trained(tmp_path, loss, 4, resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    training.assert_same(training.weights(resumed.model), training.weights(whole.model))
    other = trained(tmp_path / "clipped", loss, humanline=True)
    assert training.logged(other) != training.logged(whole)


def test_the_config_names_it(tmp_path: Path):
    made = training.config(tmp_path, loss="cispo", humanline="sampling", sync_every=0)
    assert made.make_humanline() == fa.HumanlineSampling() and made.make_schedule() is None
    with pytest.raises(ValueError, match=r"humanline must be .*or sampling; got 'sampled'"):
        training.config(tmp_path, humanline="sampled")
    with pytest.raises(ValueError, match=r"humanline clips a log-ratio.*sft has none"):
        training.config(tmp_path, loss="sft", humanline="sampling")
