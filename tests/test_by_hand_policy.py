"""Every policy loss through align_loss, against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from by_hand import LOG4, X, sigmoid, skewed_case, tensor, value
from cases import Case, grpo_case, run_loss

import fused_align as fa

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
