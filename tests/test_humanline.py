"""Humanline: gradient 1 inside, bounds included, and 0 outside; and when the reference is synced."""

from __future__ import annotations

import math

import pytest
import torch
from cases import LOSSES, Case, loss_id, make_case, randn, run_loss

import fused_align as fa

ANCHORED = [loss for loss in LOSSES if loss.anchor is not None]


def two_words(log_ratios: list[float], sequences: int = 2) -> Case:
    """hidden = 0, V = 2: logp = -log 2 to the last bit, so that log-ratios can be set exactly."""
    S, T = sequences, len(log_ratios)
    anchor = -math.log(2) - torch.tensor([log_ratios] * S, dtype=torch.float64)
    columns = {
        "ref_logp": anchor,
        "old_logp": anchor,
        "advantage": torch.ones(S, dtype=torch.float64),
        "desirable": torch.ones(S, dtype=torch.bool),
        "kl": torch.tensor(0.0, dtype=torch.float64),
    }
    target = torch.zeros(S, T, dtype=torch.int64)
    return Case(torch.zeros(S, T, 3, dtype=torch.float64), randn(2, 3, seed=1), target, columns=columns)


def alive(case: Case, loss: fa.Loss, **options) -> list[bool]:
    """Which tokens of the first sequence get a gradient."""
    _, grads = run_loss(case, loss, **options)
    return (grads["hidden"][0] != 0).any(-1).tolist()


@pytest.mark.parametrize("plan", ["auto", "recompute", "window"])
@pytest.mark.parametrize("loss", [fa.DPO(), fa.IPO(), fa.KTO()], ids=loss_id)
def test_gradient_inside_bounds_included(loss: fa.Loss, plan: str):
    low, high = -1.5, 0.25
    case = two_words([low, high, 0.0, -1.4, 0.2, -1.6, 0.3, -40.0, 40.0])
    ratios = -math.log(2) - case.columns["ref_logp"][0]
    assert ratios[0] == low and ratios[1] == high  # exactly
    got = alive(case, loss, plan=plan, humanline=fa.Humanline(low, high))
    assert got == [True] * 5 + [False] * 4
    assert alive(case, loss, plan=plan) == [True] * 9


def test_policy_losses_are_clipped_twice():
    """Humanline first, then PPO's own clip of what it lets through."""
    case = two_words([0.1, -0.4, 0.25, 0.15, -0.6])
    humanline = fa.Humanline(-0.5, 0.125)
    assert alive(case, fa.PPO()) == [True, True, False, True, True]  # log 1.2 = 0.18; A > 0 has no lower clip
    assert alive(case, fa.PPO(), humanline=humanline) == [True, True, False, False, False]


def test_the_kl_penalty_is_not_clipped():
    case = two_words([40.0, -3.0])
    case.columns["advantage"] = torch.zeros(2, dtype=torch.float64)
    for kl in ("k1", "k2", "k3"):
        loss = fa.PPO(beta=0.5, kl=kl)
        free, _ = run_loss(case, loss)
        clipped, _ = run_loss(case, loss, humanline=fa.Humanline())
        assert clipped.loss == free.loss
        assert alive(case, loss, humanline=fa.Humanline()) == [True, True]


def test_clipped_values_still_enter_the_sums():
    case = two_words([3.0, -0.5, -9.0])
    case.columns["ref_logp"][1] = -math.log(2)  # the rejected side has L = 0
    out, _ = run_loss(case, fa.DPO(beta=1.0), humanline=fa.Humanline(-1.5, 1.25))
    margin = 1.25 - 0.5 - 1.5
    assert float(out.loss.detach()) == pytest.approx(math.log1p(math.exp(-margin)))
    assert float(out.metrics["rewards/margins"]) == pytest.approx(margin)


def test_unclipped_share_is_strictly_inside_and_of_live_tokens():
    low, high = -1.5, 0.25
    case = two_words([low, high, 0.0, -1.4, 9.0, 0.1])
    case.target[:, 5] = -100
    out, _ = run_loss(case, fa.DPO(), humanline=fa.Humanline(low, high))
    assert float(out.metrics["humanline/unclipped"]) == pytest.approx(2 / 5)
    assert "humanline/unclipped" not in run_loss(case, fa.DPO())[0].metrics


def test_a_batch_without_live_tokens():
    case = two_words([1.0, 2.0])
    case.target.fill_(-100)
    out, grads = run_loss(case, fa.DPO(), humanline=fa.Humanline())
    assert float(out.loss.detach()) == pytest.approx(math.log(2))
    assert not grads["hidden"].any() and not grads["weight"].any()


@pytest.mark.parametrize("loss", ANCHORED, ids=loss_id)
def test_infinite_bounds_are_off(loss: fa.Loss):
    case = make_case([3, 1, 0, 5, 2, 4], width=6, H=7, V=19)
    off, off_grads = run_loss(case, loss)
    wide, wide_grads = run_loss(case, loss, humanline=fa.Humanline(-math.inf, math.inf))
    assert torch.equal(off.loss, wide.loss)
    for name, grad in off_grads.items():
        assert torch.equal(grad, wide_grads[name]), name
    assert wide.metrics["humanline/unclipped"] == 1


def test_defaults():
    assert (fa.Humanline().log_eps_p, fa.Humanline().log_eps_r) == (-1.5, 1.5)
    assert fa.SyncSchedule().every == 1


@pytest.mark.parametrize("every", [1, 2, 3, 7])
def test_sync_schedule(every: int):
    due = [step for step in range(30) if fa.SyncSchedule(every=every).due(step)]
    assert due == list(range(every - 1, 30, every))
    assert all(isinstance(fa.SyncSchedule(every=every).due(step), bool) for step in range(3))
