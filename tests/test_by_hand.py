"""The losses in numbers that can be worked out by hand: four words, and heads that do nothing."""

from __future__ import annotations

import math

import pytest
import torch
from cases import Case, grpo_case, leaves_of, run_loss, uniform_case
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


# --- likelihood ---


def test_sft():
    case = uniform_case([[0.0, 0.0], [0.0, 0.0]], [[1, 2], [3, X]])
    assert value(case, fa.SFT()) == pytest.approx(LOG4)
    assert value(case, fa.SFT(), normalizer=6) == pytest.approx(LOG4 / 2)


def test_sft_of_chosen_answers():
    case = skewed_case([[0, 2], [1, X]])
    assert value(case, fa.SFT()) == pytest.approx((1 + 3 + 2) * math.log(2) / 3)
    assert value(case, fa.SFT(chosen=True)) == pytest.approx((1 + 3) * math.log(2) / 2)


# --- pairs ---


def test_dpo():
    """Log-ratios 0.5 + 1 chosen, -2 rejected (its second token is ignored): D = 3.5."""
    case = pair_case()
    assert value(case, fa.DPO()) == pytest.approx(cost(0.35))
    assert value(case, fa.DPO(label_smoothing=0.3)) == pytest.approx(0.7 * cost(0.35) + 0.3 * cost(-0.35))
    clipped = cost(0.1 * (0.5 + 0.75 + 1.5))
    assert value(case, fa.DPO(), humanline=fa.Humanline(-1.5, 0.75)) == pytest.approx(clipped)
    same = pair_case((0.0, 0.0), 0.0)
    assert value(same, fa.DPO()) == pytest.approx(math.log(2))


def test_robust_dpo():
    want = (0.7 * cost(0.35) - 0.3 * cost(-0.35)) / 0.4
    assert value(pair_case(), fa.DPO(label_smoothing=0.3, robust=True)) == pytest.approx(want)
    assert value(pair_case(), fa.DPO(robust=True)) == pytest.approx(cost(0.35))


@pytest.mark.parametrize(
    ("loss", "margin"),
    [
        (fa.DPO(f_divergence="forward_kl"), (1 - math.exp(-1.5)) - (1 - math.exp(2))),
        (fa.DPO(f_divergence="js"), -cost(1.5) + cost(-2)),  # log 2 cancels
        (fa.DPO(f_divergence="alpha"), -2 * (math.exp(-0.75) - 1) + 2 * (math.exp(1) - 1)),
        (fa.DPO(f_divergence="alpha", f_alpha=3.0), (math.exp(3) - 1) / 2 - (math.exp(-4) - 1) / 2),
        (fa.DPO(f_divergence="alpha", f_alpha=1.0), 3.5),
    ],
    ids=["forward_kl", "js", "alpha", "alpha3", "alpha1"],
)
def test_f_divergences(loss: fa.DPO, margin: float):
    assert value(pair_case(), loss) == pytest.approx(cost(0.1 * margin))


def test_f_divergences_are_capped():
    """Exponents of at most 60: g(-100) = 1 - e^60, with alpha = 0.5 and L = -400 it is 2 - 2 e^60."""
    case = pair_case((-50.0, -50.0), 0.0)
    assert value(case, fa.DPO(f_divergence="forward_kl")) == pytest.approx(0.1 * math.exp(60))
    case = pair_case((-200.0, -200.0), 0.0)
    assert value(case, fa.DPO(f_divergence="alpha")) == pytest.approx(0.2 * math.exp(60))


def test_ld_dpo():
    """Of the longer side the tokens behind the length of the shorter one count a quarter."""
    loss = fa.DPO(ld_alpha=0.25)
    ref, rest = [99.0, 0.5, 1.0, -2.0], [-2.0, 99.0, 99.0, 99.0]
    longer_chosen = uniform_case([ref, rest], [[X, 1, 2, 3], [0, X, X, X]])
    assert value(longer_chosen, loss) == pytest.approx(cost(0.1 * (0.5 - 0.25 + 2)))
    longer_rejected = uniform_case([rest, ref], [[1, X, X, X], [X, 2, 3, 0]])
    assert value(longer_rejected, loss) == pytest.approx(cost(0.1 * (-2 - 0.5 + 0.25)))
    longer_rejected.columns["token_weight"] = torch.full((2, 4), 2.0, dtype=torch.float64)
    assert value(longer_rejected, loss) == pytest.approx(cost(0.2 * (-2 - 0.5 + 0.25)))
    assert value(longer_rejected, fa.DPO(ld_alpha=0.0)) == pytest.approx(cost(0.2 * (-2 - 0.5)))


def test_wpo():
    """w = exp(mean of log p(y) - log sum p^2); of a uniform distribution it is 1."""
    case = skewed_case([[0, 1], [2, X]])
    ratio = torch.tensor([[0.5, 1.0], [-2.0, 0.0]], dtype=torch.float64)
    case.columns["ref_logp"] = torch.tensor([[1 / 2, 1 / 4], [1 / 8, 1]], dtype=torch.float64).log() - ratio
    assert value(case, fa.DPO()) == pytest.approx(cost(0.35))
    weight = math.sqrt(1 / 2 * 1 / 4) * 32 / 11 * (1 / 8 * 32 / 11)
    assert value(case, fa.DPO(wpo=True)) == pytest.approx(weight * cost(0.35))
    smooth = weight * (0.7 * cost(0.35) + 0.3 * cost(-0.35))
    assert value(case, fa.DPO(wpo=True, label_smoothing=0.3)) == pytest.approx(smooth)
    assert value(pair_case(), fa.DPO(wpo=True)) == pytest.approx(cost(0.35))


def test_wpo_is_a_constant():
    """No gradient flows through the weight: that of the loss is the weight times DPO's."""
    case = skewed_case([[0, 1], [2, X]], ref_logp=torch.full((2, 2), -1.0, dtype=torch.float64))
    weight = math.sqrt(1 / 2 * 1 / 4) * 32 / 11 * (1 / 8 * 32 / 11)
    plain, weighted = (run_loss(case, fa.DPO(wpo=wpo))[1]["hidden"] for wpo in (False, True))
    torch.testing.assert_close(weighted, weight * plain)


def test_ipo():
    assert value(pair_case(), fa.IPO(tau=0.25)) == pytest.approx((0.75 + 2 - 2) ** 2)
    assert value(pair_case(), fa.IPO(tau=0.25, normalize=False)) == pytest.approx((1.5 + 2 - 2) ** 2)


def q_log_q(q: float, eps: float) -> float:
    return q * math.log(q / (1 - eps)) + (1 - q) * math.log((1 - q) / eps)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (fa.Hinge(), 1 - 0.35),
        (fa.Hinge(beta=1.0), 0.0),
        (fa.SigmoidNorm(), cost(0.1 * (0.75 + 2))),
        (fa.EXO(), q_log_q(sigmoid(0.35), 1e-3)),
        (fa.EXO(beta=1.0, eps=0.2), q_log_q(sigmoid(3.5), 0.2)),
        (fa.NCA(beta=0.1), cost(0.15) + 0.5 * cost(-0.15) + 0.5 * cost(0.2)),
        (fa.BCOPair(beta=0.1), cost(0.15) + cost(0.2)),
        (fa.SPPOHard(beta=0.25), (1.5 - 2) ** 2 + (-2 + 2) ** 2),
        (fa.SPPOHard(), 498.5**2 + 498**2),
        (fa.APOZero(), 1 - sigmoid(0.15) + sigmoid(-0.2)),
        (fa.APODown(), sigmoid(0.15) + 1 - sigmoid(0.35)),
        (
            fa.DiscoPOP(beta=0.1, tau=0.5),
            (1 - sigmoid(0.7)) * cost(0.35) + sigmoid(0.7) * math.exp(-0.35),
        ),
        (fa.DiscoPOP(), (1 - sigmoid(3.5)) * cost(0.175) + sigmoid(3.5) * math.exp(-0.175)),
    ],
    ids=lambda given: repr(given) if isinstance(given, fa.Loss) else "",
)
def test_one_pair(loss: fa.Loss, expected: float):
    """L_w = 1.5 of two tokens, L_l = -2 of one, D = 3.5."""
    assert value(pair_case(), loss) == pytest.approx(expected)


def test_dpop():
    """The penalty asks whether the chosen answer lost: L_w = 1.5 did not, -0.5 did."""
    assert value(pair_case(), fa.DPOP()) == pytest.approx(cost(0.35))
    lost = pair_case((0.5, -1.0))
    assert value(lost, fa.DPOP(lam=2.0)) == pytest.approx(cost(0.1 * (1.5 - 2 * 0.5)))
    assert value(lost, fa.DPOP()) == pytest.approx(cost(0.1 * (1.5 - 50 * 0.5)))
    clipped = value(lost, fa.DPOP(lam=2.0), humanline=fa.Humanline(-1.5, 0.25))  # L_w = -0.75, L_l = -1.5
    assert clipped == pytest.approx(cost(0.1 * (0.75 - 2 * 0.75)))


@pytest.mark.parametrize(
    ("margin", "weight"),
    [
        (0.5, sigmoid(0.5 * (0.5 + 1.5 / (1 + 2 * math.exp(-0.5)))) / sigmoid(0.5)),
        (-0.5, sigmoid(-0.5 * (0.5 + 1.5 / (1 + 2 * math.exp(-0.5)))) / sigmoid(-0.5)),
        (3.0, sigmoid(3 * (0.5 + 1.5 / (1 + 2 * math.exp(2)))) / sigmoid(3)),
        (0.0, 1.0),
        (-1.5, 1.0),  # beyond -tau
        (-1e4, 1.0),
        (1e4, 1.0),
    ],
)
def test_madpo(margin: float, weight: float):
    """c(z) = 1/2 + (3/2) / (1 + 2 exp(z - 1)), since (c_max - 1) / (1 - c_min) = 2."""
    case = pair_case(margin=tensor(margin))
    assert value(case, fa.MADPO(tau=1.0)) == pytest.approx(weight * cost(0.35))


def test_madpo_by_default():
    """tau = log 999; with lam = 2 and c_max = 3 the middle of the range is passed faster."""
    c = 0.5 + 1.5 / (1 + 2 * math.exp(2.0 - math.log(999)))
    assert value(pair_case(margin=tensor(2.0)), fa.MADPO()) == pytest.approx(
        sigmoid(2 * c) / sigmoid(2) * cost(0.35)
    )
    c = 1 / 3 + (3 - 1 / 3) / (1 + 3 * math.exp(2 * (2.0 - 1.0)))
    loss = fa.MADPO(beta=0.2, c_max=3.0, lam=2.0, tau=1.0)
    assert value(pair_case(margin=tensor(2.0)), loss) == pytest.approx(
        sigmoid(2 * c) / sigmoid(2) * cost(0.7)
    )


def test_aot_paired():
    """log pi_w - log pi_l = 0 and log 4 in pairs whose D is 1 and 3: the reference sorts the other way."""
    case = uniform_case(
        [[0.5, 99.0], [1.0, 99.0], [-0.5, 99.0], [-2.5, 0.5]], [[1, X], [2, X], [3, X], [0, 1]]
    )
    # policy 0 and log 4; reference 0 - 1 and log 4 - 3 = -1.61: sorted, -1.61 and -1
    first, second = 3 - LOG4, LOG4 + 1
    assert value(case, fa.AOT(beta=0.5)) == pytest.approx((cost(0.5 * first) + cost(0.5 * second)) / 2)
    smooth = (0.8 * (cost(first) + cost(second)) + 0.2 * (cost(-first) + cost(-second))) / 2
    assert value(case, fa.AOT(beta=1.0, label_smoothing=0.2)) == pytest.approx(smooth)


def test_aot_paired_with_humanline():
    """Clipped to -1 and 0.75, the second pair has D = 0.75 + 1 - 0.5; the reference is as it was."""
    case = uniform_case(
        [[0.5, 99.0], [1.0, 99.0], [-0.5, 99.0], [-2.5, 0.5]], [[1, X], [2, X], [3, X], [0, 1]]
    )
    # policy: the reference's -1 and log 4 - 3 plus 1 and 1.25: 0 and log 4 - 1.75 = -0.36
    first, second = (LOG4 - 1.75) - (LOG4 - 3), 0 + 1
    want = (cost(first) + cost(second)) / 2
    assert value(case, fa.AOT(beta=1.0), humanline=fa.Humanline(-1.0, 0.75)) == pytest.approx(want)


def test_aot_unpaired():
    """L_w = 2, -1 and L_l = 0.5, 0.25: sorted, -1 against 0.25 and 2 against 0.5."""
    case = two_pairs((2.0, -1.0), (0.5, 0.25))
    want = (cost(0.5 * -1.25) + cost(0.5 * 1.5)) / 2
    assert value(case, fa.AOT(beta=0.5, paired=False)) == pytest.approx(want)


def test_beta_dpo_of_all_pairs():
    """The first batch is its own reference point; the others move it by a tenth."""
    loss = fa.BetaDPO(keep=1.0)
    first, second = two_pairs((3.0, 0.5), (0.0, 1.0)), two_pairs((5.0, 1.0), (0.0, 2.0))  # D 3, -0.5 | 5, -1
    assert learn(first, loss) == pytest.approx((cost(0.3) + cost(-0.05)) / 2)
    scale = 0.1 * (1 + 0.6 * (2 - 1.25))
    assert learn(second, loss) == pytest.approx((cost(5 * scale) + cost(-scale)) / 2)
    point = 0.9 * 1.25 + 0.1 * 2
    scale = 0.1 * (1 + 0.6 * (1.25 - point))
    assert learn(first, loss) == pytest.approx((cost(3 * scale) + cost(-0.5 * scale)) / 2)


def test_beta_dpo_has_a_floor():
    loss = fa.BetaDPO(keep=1.0)
    learn(two_pairs((9.0, 9.0), (0.0, 0.0)), loss)
    assert learn(two_pairs((3.0, 0.5), (0.0, 1.0)), loss) == pytest.approx((cost(0.003) + cost(-0.0005)) / 2)


def test_beta_dpo_of_one_pair():
    """D = 3, -0.5 with mean 1.25: whichever pair is kept sets the scale and is the mean."""
    found = learn(two_pairs((3.0, 0.5), (0.0, 1.0)), fa.BetaDPO(keep=0.5, a=0.4))
    assert found in (
        pytest.approx(cost(3 * 0.1 * (1 + 0.4 * 1.75))),
        pytest.approx(cost(-0.5 * 0.1 * (1 - 0.4 * 1.75))),
    )


def test_beta_dpo_scores_without_learning():
    loss = fa.BetaDPO(keep=1.0)
    first, second = two_pairs((3.0, 0.5), (0.0, 1.0)), two_pairs((5.0, 1.0), (0.0, 2.0))
    with torch.no_grad():
        value(first, loss)
    assert learn(second, loss) == pytest.approx((cost(0.5) + cost(-0.1)) / 2)


# --- pairs, without a reference ---


def skewed_pair() -> Case:
    """log pi = -1, -2 chosen and -2 rejected, in units of log 2: the means are -1.5 and -2."""
    return skewed_case([[0, 1], [1, X]])


def test_simpo():
    loss = fa.SimPO(beta=2.0, gamma=0.5)
    assert value(skewed_pair(), loss) == pytest.approx(cost(2 * 0.5 * math.log(2) - 0.5))
    assert value(skewed_pair(), fa.SimPO()) == pytest.approx(cost(2.5 * 0.5 * math.log(2) - 1.375))


def test_alphapo():
    """r = (1 - p^-a) / a of the geometric means 2^-1.5 and 2^-2."""
    r = [(1 - 2 ** (0.5 * 1.5)) / 0.5, (1 - 2 ** (0.5 * 2)) / 0.5]
    loss = fa.SimPO(beta=2.0, gamma=0.5, alphapo=0.5)
    assert value(skewed_pair(), loss) == pytest.approx(cost(2 * (r[0] - r[1]) - 0.5))
    loss = fa.CPO(beta=0.3, alpha=0.0, alphapo=0.5)
    assert value(skewed_pair(), loss) == pytest.approx(cost(0.3 * (r[0] - r[1])))


def test_cpo():
    """Sums -3 chosen and -2 rejected, in units of log 2; NLL 1.5."""
    margin, nll = -0.1 * math.log(2), 1.5 * math.log(2)
    assert value(skewed_pair(), fa.CPO()) == pytest.approx(cost(margin) + nll)
    smooth = 0.7 * cost(margin) + 0.3 * cost(-margin)
    assert value(skewed_pair(), fa.CPO(alpha=0.5, label_smoothing=0.3)) == pytest.approx(smooth + 0.5 * nll)
    units = {"pairs": 4, "tokens": 10}
    want = cost(margin) / 4 + 2 * nll / 10
    assert value(skewed_pair(), fa.CPO(), normalizer=units) == pytest.approx(want)


def test_orpo():
    """Odds of the geometric means: 2^-1.5 / (1 - 2^-1.5) and (1/4) / (3/4)."""
    log_odds = -math.log(2**1.5 - 1) + math.log(3)
    nll = 1.5 * math.log(2)
    assert value(skewed_pair(), fa.ORPO()) == pytest.approx(nll + 0.1 * cost(log_odds))
    units = {"pairs": 4, "tokens": 10}
    want = 2 * nll / 10 + 0.7 * cost(log_odds) / 4
    assert value(skewed_pair(), fa.ORPO(lam=0.7), normalizer=units) == pytest.approx(want)


# --- single sequences ---


def test_kto():
    judged = {"desirable": torch.tensor([True, False]), "kl": torch.tensor(0.4, dtype=torch.float64)}
    loss = fa.KTO(beta=0.5, desirable_weight=2.0, undesirable_weight=3.0)
    want = (2 * (1 - sigmoid(0.5 * (1.5 - 0.4))) + 3 * (1 - sigmoid(0.5 * (0.4 + 2)))) / 2
    assert value(pair_case(**judged), loss) == pytest.approx(want)


def test_apo_zero_unpaired():
    case = pair_case(desirable=torch.tensor([True, False]))
    assert value(case, fa.APOZeroUnpaired()) == pytest.approx((1 - sigmoid(0.15) + sigmoid(-0.2)) / 2)
    case = pair_case(desirable=torch.tensor([False, False]))
    assert value(case, fa.APOZeroUnpaired()) == pytest.approx((sigmoid(0.15) + sigmoid(-0.2)) / 2)


def test_bco():
    """delta is the mean reward of all that was seen: first of 0.15 and -0.2, then of 0.1 and 0.3 too."""
    loss = fa.BCO(beta=0.1)
    first = pair_case(desirable=torch.tensor([True, False]))
    second = pair_case((0.5, 0.5), 3.0, desirable=torch.tensor([False, True]))
    delta = (0.15 - 0.2) / 2
    assert learn(first, loss) == pytest.approx((cost(0.15 - delta) + cost(0.2 + delta)) / 2)
    delta = (0.15 - 0.2 + 0.1 + 0.3) / 4
    assert learn(second, loss) == pytest.approx((cost(-0.1 + delta) + cost(0.3 - delta)) / 2)


def test_bco_scores_without_learning():
    loss = fa.BCO(beta=0.1)
    case = pair_case(desirable=torch.tensor([True, False]))
    with torch.no_grad():
        before = value(case, loss)
        value(pair_case((5.0, 5.0), 5.0, desirable=torch.tensor([True, True])), loss)
        assert value(case, loss) == before
    assert learn(case, loss) == pytest.approx((cost(0.15 + 0.025) + cost(0.2 - 0.025)) / 2)


# --- policy gradients, token by token: ratios 1.5, 0.5 | 1.1, advantages 2, -1 ---


def flipped_case() -> Case:
    """The same with the advantages -2, 1."""
    case = grpo_case()
    case.columns["advantage"] = -case.columns["advantage"]
    return case


def test_grpo():
    """Clipped at 1.2: 2.4; 0.5 kept: 1.0 (the minimum with A > 0); 1.1 with A < 0: -1.1."""
    case = grpo_case()
    assert value(case, fa.GRPO()) == pytest.approx(-((2.4 + 1.0) / 2 - 1.1) / 2)
    assert value(case, fa.PPO()) == pytest.approx(-(2.4 + 1.0 - 1.1) / 3)
    assert value(case, fa.GRPO(aggregation="seq_mean_token_sum")) == pytest.approx(-(2.4 + 1.0 - 1.1) / 2)
    constant = fa.GRPO(aggregation="constant", max_length=5)
    assert value(case, constant) == pytest.approx(-(2.4 + 1.0 - 1.1) / 10)
    assert value(case, fa.PPO(eps_high=0.6)) == pytest.approx(-(3.0 + 1.0 - 1.1) / 3)
    clipped = math.exp(-0.1)
    humanline = fa.Humanline(-0.1, 0.05)
    assert value(case, fa.PPO(), humanline=humanline) == pytest.approx(
        -(2 * math.exp(0.05) + 2 * clipped - math.exp(0.05)) / 3
    )


def test_grpo_two_sided():
    """delta bounds the ratio of a token with negative advantage, which the minimum leaves free."""
    case = grpo_case()
    case.columns["old_logp"] = torch.full((2, 2), -LOG4 - math.log(7), dtype=torch.float64)
    assert value(case, fa.PPO()) == pytest.approx(-(2.4 + 2.4 - 7) / 3)
    assert value(case, fa.PPO(delta=1.5)) == pytest.approx(-(2.4 + 2.4 - 1.5) / 3)


def test_presets():
    case = grpo_case()
    assert value(case, fa.GRPO.dapo()) == pytest.approx(-(2.56 + 1.0 - 1.1) / 3)
    assert value(case, fa.GRPO.dapo(eps_high=0.6)) == pytest.approx(-(3.0 + 1.0 - 1.1) / 3)
    assert value(case, fa.GRPO.bnpo()) == pytest.approx(-(2.4 + 1.0 - 1.1) / 3)
    assert value(case, fa.GRPO.dr_grpo(5)) == pytest.approx(-(2.4 + 1.0 - 1.1) / 10)
    assert value(case, fa.GRPO.dr_grpo(5, eps_high=0.6)) == pytest.approx(-(3.0 + 1.0 - 1.1) / 10)


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        ("k1", [0.0, 0.3, -0.2]),
        ("k2", [0.0, 0.045, 0.02]),
        ("k3", [0.0, math.exp(-0.3) + 0.3 - 1, math.exp(0.2) - 0.2 - 1]),
    ],
)
def test_kl_penalty(kl: str, expected: list[float]):
    case = grpo_case()
    policy = value(case, fa.PPO())
    with_kl = value(case, fa.PPO(beta=0.5, kl=kl))
    assert with_kl - policy == pytest.approx(0.5 * sum(expected) / 3)
    corrected = value(case, fa.PPO(beta=0.5, kl=kl, kl_correction=True))
    ratio = (1.5, 0.5, 1.1)
    assert corrected - policy == pytest.approx(
        0.5 * sum(r * k for r, k in zip(ratio, expected, strict=True)) / 3
    )
    out = fa.align_loss(case.hidden, case.weight, case.batch(), fa.PPO(beta=0.5, kl=kl))
    assert float(out.metrics["kl"]) == pytest.approx(sum(expected) / 3)


@pytest.mark.parametrize(
    ("cls", "ratios"),
    [
        (fa.CISPO, (1.5, 0.5, 1.1)),
        (fa.SAPO, (1.5, 0.5, 1.1)),
        (fa.VESPO, (1.5, 0.5, 1.1)),
        (fa.GSPO, (math.sqrt(0.75), math.sqrt(0.75), 1.1)),
        (fa.LUSPO, (math.sqrt(0.75), math.sqrt(0.75), 1.1)),
        (fa.RLOO, (0.75, 0.75, 1.1)),
        (fa.GMPO, (math.sqrt(0.75), math.sqrt(0.75), 1.1)),  # not clipped
    ],
    ids=lambda given: given.__name__ if isinstance(given, type) else "",
)
def test_kl_correction(cls: type[fa.Loss], ratios: tuple[float, ...]):
    """k1 = 0, 0.3, -0.2 times the ratio of what the surrogate looks at: a token or its sequence."""
    plain = value(grpo_case(), cls(aggregation="token_mean"))
    found = value(grpo_case(), cls(beta=0.5, kl="k1", kl_correction=True, aggregation="token_mean"))
    want = 0.5 * (ratios[1] * 0.3 - ratios[2] * 0.2) / 3
    assert found - plain == pytest.approx(want)


def test_cispo():
    """-min(rho, 1.2) A log pi with log pi = -log 4."""
    assert value(grpo_case(), fa.CISPO(eps_high=1.2)) == pytest.approx((2.4 + 1.0 - 1.1) * LOG4 / 3)
    assert value(grpo_case(), fa.CISPO()) == pytest.approx((3.0 + 1.0 - 1.1) * LOG4 / 3)
    humanline = fa.Humanline(-0.1, 0.05)  # no ratio is inside
    clipped = 2 * math.exp(0.05) + 2 * math.exp(-0.1) - math.exp(0.05)
    out, grads = run_loss(grpo_case(), fa.CISPO(), humanline=humanline)
    assert float(out.loss.detach()) == pytest.approx(clipped * LOG4 / 3)
    for grad in grads.values():
        assert torch.equal(grad, torch.zeros_like(grad))


def test_cispo_has_the_gradient_of_logp():
    """d logp / d hidden = weight[y] - mean of weight, times -min(rho, cap) A / tokens."""
    case = grpo_case()
    direction = case.weight[case.target.clamp(min=0)] - case.weight.mean(0)
    coefficient = torch.tensor([[-2.4, -1.0], [1.1, 0.0]], dtype=torch.float64) / 3
    _, grads = run_loss(case, fa.CISPO(eps_high=1.2))
    torch.testing.assert_close(grads["hidden"], coefficient[..., None] * direction)


def test_sapo():
    first = 4 * (sigmoid(0.5) + sigmoid(-0.5)) * 2 / 2
    second = -4 / 1.05 * sigmoid(1.05 * 0.1)
    assert value(grpo_case(), fa.SAPO()) == pytest.approx(-(first + second) / 2)
    flipped = -4 / 3 * (sigmoid(1.5) + sigmoid(-1.5)) * 2 / 2 + 4 / 2 * sigmoid(2 * 0.1)
    assert value(flipped_case(), fa.SAPO(t_pos=2.0, t_neg=3.0)) == pytest.approx(-flipped / 2)


def test_reinforce():
    assert value(grpo_case(), fa.REINFORCE()) == pytest.approx((2 * 2 - 1) * LOG4 / 2)
    assert value(grpo_case(), fa.REINFORCE(aggregation="token_mean")) == pytest.approx((2 * 2 - 1) * LOG4 / 3)


def test_hybrid_policy():
    """The first row is edited: 1.5 and 0.5 times 2, without the minimum; the second is PPO's."""
    case = grpo_case()
    case.columns["off_policy"] = torch.tensor([True, False])
    assert value(case, fa.HybridPolicy()) == pytest.approx(-(3.0 + 1.0 - 1.1) / 3)
    assert value(case, fa.HybridPolicy(edit_low=0.2)) == pytest.approx(-(3.0 + 1.6 - 1.1) / 3)
    assert value(case, fa.HybridPolicy(edit_high=0.3)) == pytest.approx(-(2.6 + 1.0 - 1.1) / 3)
    both = fa.HybridPolicy(edit_low=0.2, edit_high=0.3)
    assert value(case, both) == pytest.approx(-(2.6 + 1.6 - 1.1) / 3)
    case.columns["off_policy"] = torch.tensor([False, True])
    assert value(case, fa.HybridPolicy(eps_high=0.05, edit_high=0.05)) == pytest.approx(
        -(2.1 + 1.0 - 1.05) / 3
    )


# --- policy gradients, sequence by sequence ---


def test_gspo():
    """rho = sqrt(0.75) = 0.866 and 1.1. With A < 0 the larger of rho and its clip counts."""
    rho = math.sqrt(0.75)
    assert value(grpo_case(), fa.GSPO()) == pytest.approx(-(2 * rho - 1.1) / 2)
    assert value(flipped_case(), fa.GSPO()) == pytest.approx(-(-2 * (1 - 3e-4) + 1 + 4e-4) / 2)
    wide = fa.GSPO(eps_low=0.1, eps_high=0.05)
    assert value(flipped_case(), wide) == pytest.approx(-(-2 * 0.9 + 1.05) / 2)
    token_mean = fa.GSPO(aggregation="token_mean")
    assert value(grpo_case(), token_mean) == pytest.approx(-(2 * 2 * rho - 1.1) / 3)


def test_gspo_of_tokens_is_gspo():
    """Same value and, with one advantage per sequence, the same gradient."""
    for case in (grpo_case(), flipped_case()):
        one, other = (run_loss(case, fa.GSPO(eps_low=0.2, level=level)) for level in ("sequence", "token"))
        assert float(one[0].loss.detach()) == pytest.approx(float(other[0].loss.detach()))
        assert one[1]["hidden"].any()
        torch.testing.assert_close(one[1]["hidden"], other[1]["hidden"])


def test_gspo_with_an_advantage_per_token():
    """At the token level each token's own A has the sequence's ratio; the value is that of GSPO."""
    case = grpo_case()
    case.columns["advantage"] = torch.tensor([[2.0, -1.0], [3.0, 9.0]], dtype=torch.float64)
    rho = math.sqrt(0.75)
    want = -((2 * rho - 0.9) / 2 + 3 * 1.1) / 2
    for level in ("sequence", "token"):
        assert value(case, fa.GSPO(eps_low=0.1, eps_high=0.2, level=level)) == pytest.approx(want)
    direction = case.weight[case.target.clamp(min=0)] - case.weight.mean(0)
    coefficient = torch.tensor([[-2 * rho / 4, 0.0], [-3 * 1.1 / 2, 0.0]], dtype=torch.float64)
    _, grads = run_loss(case, fa.GSPO(eps_low=0.1, eps_high=0.2, level="token"))
    torch.testing.assert_close(grads["hidden"], coefficient[..., None] * direction)


def test_gmpo():
    """log 1.5 is cut to 0.2 where A > 0, log 0.5 to -0.2 where A < 0; log 1.1 is inside."""
    rho = math.exp((0.2 + math.log(0.5)) / 2)
    assert value(grpo_case(), fa.GMPO(eps=0.2)) == pytest.approx(-(2 * rho - 1.1) / 2)
    rho = math.exp((math.log(1.5) - 0.2) / 2)
    assert value(flipped_case(), fa.GMPO(eps=0.2)) == pytest.approx(-(-2 * rho + 1.1) / 2)
    rho = math.exp((0.4 + math.log(0.5)) / 2)
    assert value(grpo_case(), fa.GMPO()) == pytest.approx(-(2 * rho - 1.1) / 2)


def test_luspo():
    """GSPO's, times the length."""
    assert value(grpo_case(), fa.LUSPO()) == pytest.approx(-(2 * 2 * math.sqrt(0.75) - 1.1) / 2)
    want = -(2 * -2 * (1 - 2e-3) + 1 + 2.5e-3) / 2
    assert value(flipped_case(), fa.LUSPO()) == pytest.approx(want)


def vespo_phi(w: float, k: float, lam: float) -> float:
    return math.exp(lam + k * math.log(w) - lam * w)


def test_vespo():
    """-phi A log pi, log pi = -log 4; w = 0.75 and 1.1; (k, lam) = (2, 3) for A >= 0, else (3, 2)."""
    want = (2 * 2 * vespo_phi(0.75, 2, 3) - vespo_phi(1.1, 3, 2)) * LOG4 / 3
    assert value(grpo_case(), fa.VESPO()) == pytest.approx(want)
    want = (-2 * 2 * vespo_phi(0.75, 3, 2) + vespo_phi(1.1, 2, 3)) * LOG4 / 3
    assert value(flipped_case(), fa.VESPO()) == pytest.approx(want)
    want = (2 * 2 * vespo_phi(0.75, 1.5, 2.5) - vespo_phi(1.1, 0.7, 0.4)) * LOG4 / 3
    own = fa.VESPO(k_pos=1.5, lam_pos=2.5, k_neg=0.7, lam_neg=0.4)
    assert value(grpo_case(), own) == pytest.approx(want)


def test_vespo_with_the_sampler():
    """The sampler's weight goes into w: once for every token, or once for the sequence."""
    case = sampler_case()
    truncated = fa.VESPO(sampler_correction="token_truncate", sampler_max=1.5)
    want = (2 * 2 * vespo_phi(0.75 * 1.5 * 0.7, 2, 3) - vespo_phi(1.1 * 1.5, 3, 2)) * LOG4 / 3
    assert value(case, truncated) == pytest.approx(want)
    whole = fa.VESPO(sampler_correction="sequence_truncate", sampler_max=1.5)
    want = (2 * 2 * vespo_phi(0.75 * 1.12, 2, 3) - vespo_phi(1.1 * 1.5, 3, 2)) * LOG4 / 3
    assert value(case, whole) == pytest.approx(want)
    masked = fa.VESPO(sampler_correction="sequence_mask", sampler_max=1.5)
    want = (2 * 2 * vespo_phi(0.75 * 1.12, 2, 3) - vespo_phi(1.1e-8, 3, 2)) * LOG4 / 3
    assert value(case, masked) == pytest.approx(want)


def test_rloo():
    """rho = 0.75 and 1.1, the products."""
    assert value(grpo_case(), fa.RLOO()) == pytest.approx(-(2 * 0.75 - 1.1) / 2)
    assert value(flipped_case(), fa.RLOO()) == pytest.approx(-(-2 * 0.8 + 1.1) / 2)
    assert value(flipped_case(), fa.RLOO(eps_low=0.3, eps_high=0.05)) == pytest.approx(-(-1.5 + 1.05) / 2)


# --- what all policy gradients share ---


def sampler_case() -> Case:
    """old / sampler = 1.6, 0.7 | 2: 1.12 and 2 of sequences. PPO's tokens are 2.4, 1 | -1.1."""
    case = grpo_case()
    weight = torch.tensor([[1.6, 0.7], [2.0, 1.0]], dtype=torch.float64)
    case.columns["sampler_logp"] = case.columns["old_logp"] - weight.log()
    return case


@pytest.mark.parametrize(
    ("correction", "low", "high", "u"),
    [
        ("token_truncate", None, 1.5, (1.5, 0.7, 1.5)),
        ("token_truncate", 0.8, 1.5, (1.5, 0.8, 1.5)),
        ("token_mask", None, 1.8, (1.6, 0.7, 0.0)),
        ("token_mask", 0.8, 1.8, (1.6, 0.0, 0.0)),
        ("sequence_truncate", None, 1.5, (1.12, 1.12, 1.5)),
        ("sequence_truncate", 1.3, 3.0, (1.3, 1.3, 2.0)),
        ("sequence_mask", None, 1.5, (1.12, 1.12, 0.0)),
        ("sequence_mask", 1.3, 3.0, (0.0, 0.0, 2.0)),
    ],
)
def test_sampler_correction(correction: str, low: float | None, high: float, u: tuple[float, ...]):
    loss = fa.PPO(sampler_correction=correction, sampler_max=high, sampler_min=low)
    want = -(2.4 * u[0] + 1.0 * u[1] - 1.1 * u[2]) / 3
    assert value(sampler_case(), loss) == pytest.approx(want)
    with_kl = fa.PPO(sampler_correction=correction, sampler_max=high, sampler_min=low, beta=0.5, kl="k1")
    assert value(sampler_case(), with_kl) == pytest.approx(want + 0.5 * 0.1 / 3)  # 0.3 - 0.2, not corrected


def test_sampler_mask_keeps_its_bounds():
    case = grpo_case()
    case.columns["sampler_logp"] = case.columns["old_logp"]
    want = -(2.4 + 1.0 - 1.1) / 3
    for level in ("token", "sequence"):
        for low, high in ((1.0, 2.0), (0.5, 1.0)):
            loss = fa.PPO(sampler_correction=f"{level}_mask", sampler_max=high, sampler_min=low)
            assert value(case, loss) == pytest.approx(want)


def test_sampler_correction_on_policy():
    """Without old_logp it is the policy's own log-prob that the sampler's is compared with: ratios 1."""
    case = sampler_case()
    del case.columns["old_logp"]
    case.columns["sampler_logp"] = -LOG4 - torch.tensor([[1.6, 0.7], [2.0, 1.0]], dtype=torch.float64).log()
    loss = fa.PPO(sampler_correction="token_truncate", sampler_max=1.5)
    assert value(case, loss) == pytest.approx(-(2 * 1.5 + 2 * 0.7 - 1.5) / 3)


def test_off_policy_mask():
    """mean(log sampler - log pi) = 0.6 in both rows: the one with A < 0 goes; its token still counts."""
    case = grpo_case()
    case.columns["sampler_logp"] = -LOG4 + torch.tensor([[0.2, 1.0], [0.6, 0.0]], dtype=torch.float64)
    assert value(case, fa.PPO(off_policy_threshold=0.5)) == pytest.approx(-(2.4 + 1.0) / 3)
    assert value(case, fa.PPO(off_policy_threshold=0.7)) == pytest.approx(-(2.4 + 1.0 - 1.1) / 3)
    with_kl = value(case, fa.PPO(off_policy_threshold=0.5, beta=0.5, kl="k1"))
    assert with_kl == pytest.approx(-(2.4 + 1.0) / 3 + 0.5 * 0.1 / 3)


def test_off_policy_mask_without_the_sampler():
    """old_logp takes its place: mean(log old - log pi) = -log sqrt(0.75) = 0.144 and -log 1.1."""
    kept = -(-2 * 1.5 - 2 * 0.8 + 1.1) / 3
    assert value(flipped_case(), fa.PPO(off_policy_threshold=0.15)) == pytest.approx(kept)
    assert value(flipped_case(), fa.PPO(off_policy_threshold=0.14)) == pytest.approx(-1.1 / 3)


def test_off_policy_mask_per_token():
    """The drift is the sequence's, the sign of A the token's."""
    case = grpo_case()
    case.columns["advantage"] = torch.tensor([[2.0, -1.0], [-1.0, 0.0]], dtype=torch.float64)
    case.columns["sampler_logp"] = torch.full((2, 2), -LOG4 + 0.6, dtype=torch.float64)
    assert value(case, fa.PPO(off_policy_threshold=0.5)) == pytest.approx(-2.4 / 3)


def entropy_case(uniform: list[list[int]]) -> Case:
    """Tokens y = 1, 1 | 1: log pi = -log 4 whether or not they are uniform. A = 2, -1, on-policy."""
    return skewed_case([[1, 1], [1, X]], uniform, advantage=tensor(2.0, -1.0))


@pytest.mark.parametrize(
    ("uniform", "share", "kept"),
    [
        ([[1, 0], [0, 0]], 1.0, (1, 1, 1)),
        ([[1, 0], [0, 0]], 0.5, (1, 1, 1)),  # the median is the lower entropy, and all reach it
        ([[1, 0], [0, 0]], 0.25, (1, 0, 0)),  # the quantile 3/4 lies between the two
        ([[0, 1], [1, 0]], 0.5, (0, 1, 1)),
        ([[1, 1], [0, 0]], 0.5, (1, 1, 0)),
    ],
)
def test_top_entropy(uniform: list[list[int]], share: float, kept: tuple[int, ...]):
    """What is left out still counts as a token; KL and denominators know nothing of the mask."""
    case = entropy_case(uniform)
    want = -(2 * kept[0] + 2 * kept[1] - kept[2]) / 3
    assert value(case, fa.PPO(top_entropy=share)) == pytest.approx(want)
    case.columns["ref_logp"] = -LOG4 - torch.tensor([[0.2, 0.3], [0.4, 0]], dtype=torch.float64)
    with_kl = fa.PPO(top_entropy=share, beta=0.5, kl="k1")
    assert value(case, with_kl) == pytest.approx(want + 0.5 * 0.9 / 3)


def test_entropy_bonus():
    """Entropies log 4 | 1.75 log 2, of the tokens that the mask keeps."""
    case = entropy_case([[1, 0], [0, 0]])
    bonus = 0.1 * (2 + 1.75 + 1.75) * math.log(2)
    assert value(case, fa.PPO(entropy_coef=0.1)) == pytest.approx(-(2 + 2 - 1) / 3 - bonus / 3)
    masked = fa.PPO(entropy_coef=0.1, top_entropy=0.25)
    assert value(case, masked) == pytest.approx(-2 / 3 - 0.1 * LOG4 / 3)


def test_token_weights():
    """They weigh what a token adds to a sum, a sequence's log-ratio too; counts stay counts."""
    case = grpo_case()
    case.columns["token_weight"] = torch.tensor([[2.0, 0.5], [3.0, 1.0]], dtype=torch.float64)
    assert value(case, fa.GRPO()) == pytest.approx(-((2 * 2.4 + 0.5 * 1) / 2 - 3 * 1.1) / 2)
    rho = [math.sqrt(1.5**2 * 0.5**0.5), 1.1**3]
    want = -(2 * min(rho[0], 2.0) * (2 + 0.5) / 2 - rho[1] * 3) / 2
    assert value(case, fa.GSPO(eps_low=1.0, eps_high=1.0)) == pytest.approx(want)


# --- groups ---


def test_grao():
    """Of prompt 7: samples with A = 1, -0.5 and an answer with A = 2; of prompt 3 one sample with A = 0.5."""
    case = skewed_case(
        [[0, X], [1, X], [2, 2], [1, 0]],
        advantage=tensor(1.0, 2.0, -0.5, 0.5),
        group=torch.tensor([7, 7, 7, 3]),
        reference=torch.tensor([False, True, False, False]),
    )
    j = [math.log(2) * x for x in (-1, -2, -3, -1.5)]
    first = (1.6 * 1 * j[0] + 1.6 * -0.5 * j[2]) / 2 + (0.5 * 2 - 0.6 * 0.25) * j[1]
    second = 1.6 * 0.5 * j[3]
    assert value(case, fa.GRAO()) == pytest.approx(-(first + second) / 2)
    assert value(case, fa.GRAO(), normalizer={"groups": 10}) == pytest.approx(-(first + second) / 10)
    other = (1.3 * j[0] - 1.3 * 0.5 * j[2]) / 2 + (1.0 * 2 - 0.3 * 0.25) * j[1] + 1.3 * 0.5 * j[3]
    assert value(case, fa.GRAO(beta=1.0, lam=0.3)) == pytest.approx(-other / 2)


def test_grao_without_samples():
    """A group of nothing but its answer: there is no mean advantage to subtract."""
    case = skewed_case(
        [[0, X], [1, X]],
        advantage=tensor(1.0, 2.0),
        group=torch.tensor([12, 3]),
        reference=torch.tensor([False, True]),
    )
    want = -(1.6 * -math.log(2) + 0.5 * 2 * -2 * math.log(2)) / 2
    assert value(case, fa.GRAO()) == pytest.approx(want)


# --- sums ---


def test_sum():
    case = pair_case()
    loss = fa.Sum([(1.0, fa.DPO()), (0.3, fa.SFT(chosen=True))])
    assert value(case, loss) == pytest.approx(cost(0.35) + 0.3 * LOG4)
    clipped = value(case, loss, humanline=fa.Humanline(-1.5, 0.75))  # of DPO; SFT has nothing to clip
    assert clipped == pytest.approx(cost(0.1 * (1.25 + 1.5)) + 0.3 * LOG4)
    by_unit = value(case, loss, normalizer={"pairs": 2, "tokens": 10})
    assert by_unit == pytest.approx(cost(0.35) / 2 + 0.3 * 2 * LOG4 / 10)


def test_sum_of_different_units():
    """Token mean over all, mean over sequences; GSPO's anchor is old_logp, DPO's ref_logp."""
    case = grpo_case()
    loss = fa.Sum([(0.5, fa.GSPO()), (2.0, fa.SFT()), (0.25, fa.DPO())])
    want = -0.5 * (2 * math.sqrt(0.75) - 1.1) / 2 + 2 * LOG4 + 0.25 * cost(0.1 * (0.3 + 0.2))
    assert value(case, loss) == pytest.approx(want)


def test_sum_needs_an_anchor_for_humanline():
    loss = fa.Sum([(1.0, fa.CPO()), (0.5, fa.SFT(chosen=True))])
    with pytest.raises(ValueError, match="[Hh]umanline"):
        value(pair_case(), loss, humanline=fa.Humanline())
