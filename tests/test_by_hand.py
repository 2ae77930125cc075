"""The losses in numbers that can be worked out by hand: four words, and heads that do nothing."""

from __future__ import annotations

import math

import pytest
import torch
from by_hand import LOG4, X, cost, learn, pair_case, sigmoid, skewed_case, tensor, two_pairs, value
from cases import Case, grpo_case, run_loss, uniform_case

import fused_align as fa

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
