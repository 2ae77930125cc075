"""Every loss that TRL's trainers and fused_align both have: the trainers' own code on the same tensors.

What TRL has and we have not, or only in part, so that nothing of it is compared:

- SFT `dft`: no such loss here.
- f-divergences, `ld_alpha` and WPO weights with another loss than DPO's sigmoid and robust: options of
  fa.DPO alone.
- `cispo`, `sapo` and `vespo` with ratios of sequences: their papers' ratios are of tokens (VESPO's weight is
  of the sequence anyway); `delta` with ratios of sequences.
- router losses of mixtures of experts, adaptive entropy coefficients: a matter of the model and the trainer.
- the experimental trainers of the same losses on other data (online DPO, TPO), and of other losses.

And TRL 1.16 has no PPO but bnpo, no BCO on single sequences, DPOP, MADPO, beta-DPO, REINFORCE, GRAO,
HybridPolicy, no k1 and k2, no SFT with z-loss; RLOO without a KL term in the loss; RLOO and GMPO without the
sampler's correction.
"""

from __future__ import annotations

import math
import re

import pytest
import torch
from cases import Case, generator
from peers import (
    EPS,
    IGNORE,
    INSTALL,
    LENGTHS,
    SEQUENCE,
    WIDE,
    Function,
    OwnHead,
    at_least_one,
    certain,
    check_same,
    cpo,
    dpo,
    grpo,
    ignoring,
    kto,
    ours,
    plus,
    problem,
    run,
    run_peer,
    sampled,
    sft,
    with_prompts,
    without_reference,
)
from torch import Tensor

import fused_align as fa
import oracles

pytest.importorskip("trl", reason=f"TRL is the peer; {INSTALL}")

# --- likelihood ---


def test_sft():
    check_same(problem(), sft(), ours(fa.SFT()))


def test_sft_over_the_items_of_a_whole_step():
    check_same(problem(), sft(num_items=77), ours(fa.SFT(), normalizer=77))


def test_sft_with_label_smoothing():
    """transformers' LabelSmoother adds the vocabulary up in float32, whatever it is given."""
    check_same(problem(), sft(label_smoothing=0.2), ours(fa.SFT(label_smoothing=0.2)), torch.float32)


# --- pairs: DPOTrainer ---

DPO_FAMILY: dict[str, tuple[Function, fa.Loss]] = {
    "sigmoid": (dpo("sigmoid"), fa.DPO(beta=0.3)),
    "robust": (dpo("robust", label_smoothing=0.2), fa.DPO(beta=0.3, label_smoothing=0.2, robust=True)),
    "hinge": (dpo("hinge"), fa.Hinge(beta=0.3)),
    "ipo": (dpo("ipo"), fa.IPO(tau=0.3)),
    "exo_pair": (dpo("exo_pair", label_smoothing=0.05), fa.EXO(beta=0.3, eps=0.05)),
    "nca_pair": (dpo("nca_pair"), fa.NCA(beta=0.3)),
    "bco_pair": (dpo("bco_pair"), fa.BCOPair(beta=0.3)),
    "sppo_hard": (dpo("sppo_hard"), fa.SPPOHard(beta=0.3)),
    "aot": (dpo("aot", label_smoothing=0.1), fa.AOT(beta=0.3, label_smoothing=0.1)),
    "aot_unpaired": (
        dpo("aot_unpaired", label_smoothing=0.1),
        fa.AOT(beta=0.3, label_smoothing=0.1, paired=False),
    ),
    "apo_zero": (dpo("apo_zero"), fa.APOZero(beta=0.3)),
    "apo_down": (dpo("apo_down"), fa.APODown(beta=0.3)),
    "discopop": (dpo("discopop"), fa.DiscoPOP(beta=0.3, tau=0.2)),
    "sft": (dpo("sft"), fa.SFT(chosen=True)),
    "sigmoid_norm": (dpo("sigmoid_norm"), fa.SigmoidNorm(beta=0.3)),
    "forward_kl": (
        dpo("sigmoid", f_divergence_type="forward_kl"),
        fa.DPO(beta=0.3, f_divergence="forward_kl"),
    ),
    "js": (dpo("sigmoid", f_divergence_type="js_divergence"), fa.DPO(beta=0.3, f_divergence="js")),
    "js, robust": (
        dpo("robust", f_divergence_type="js_divergence", label_smoothing=0.2),
        fa.DPO(beta=0.3, f_divergence="js", label_smoothing=0.2, robust=True),
    ),
    "ld_alpha": (dpo("sigmoid", ld_alpha=0.3), fa.DPO(beta=0.3, ld_alpha=0.3)),
    "ld_alpha 0, robust": (
        dpo("robust", ld_alpha=0.0, label_smoothing=0.2),
        fa.DPO(beta=0.3, ld_alpha=0.0, label_smoothing=0.2, robust=True),
    ),
    "WPO": (dpo("sigmoid", use_weighting=True), fa.DPO(beta=0.3, wpo=True)),
    "MPO": (
        dpo("sigmoid", "bco_pair", "sft", weights=[0.8, 0.2, 1.5]),
        fa.Sum([(0.8, fa.DPO(beta=0.3)), (0.2, fa.BCOPair(beta=0.3)), (1.5, fa.SFT(chosen=True))]),
    ),
}


@pytest.mark.parametrize("name", DPO_FAMILY)
@pytest.mark.parametrize("seed", [0, 1])
def test_dpo_family(name: str, seed: int):
    peer, loss = DPO_FAMILY[name]
    check_same(problem(seed=seed), peer, ours(loss))


def test_dpo_family_has_all_of_trls_types():
    with pytest.raises(ValueError, match="Should be one of") as refused:
        run_peer(dpo("another"), problem())
    types = re.findall(r"'(\w+)'", str(refused.value))
    assert len(types) > 10 and set(types) <= set(DPO_FAMILY)


@pytest.mark.parametrize("coefficient", [0.3, 1.0, 1.5])
def test_alpha_divergence_in_float32(coefficient: float):
    """TRL's alpha divergence knows no float64: it looks the dtype up in a table of three."""
    peer = dpo("sigmoid", f_divergence_type="alpha_divergence", f_alpha_divergence_coef=coefficient)
    loss = fa.DPO(beta=0.3, f_divergence="alpha", f_alpha=coefficient)
    check_same(problem(dtype=torch.float32), peer, ours(loss))
    if coefficient != 1:
        with pytest.raises(KeyError):
            run_peer(peer, problem())


def test_sigmoid_of_trl_ignores_label_smoothing():
    """DPOTrainer's sigmoid has no label smoothing; fa.DPO's is cDPO, which TRL has as aot of one pair."""
    case, smooth = problem(), fa.DPO(beta=0.3, label_smoothing=0.2)
    peer = dpo("sigmoid", label_smoothing=0.2)
    check_same(case, peer, ours(fa.DPO(beta=0.3)))
    assert (run_peer(peer, case)[0] - run(ours(smooth), case)[0]).abs() > 1e-3
    pair = problem([5, 7], seed=3)
    check_same(pair, dpo("aot", label_smoothing=0.2), ours(smooth))


@pytest.mark.parametrize("loss_type", ["ipo", "sigmoid_norm"])
def test_trl_counts_a_token_that_nothing_predicts(loss_type: str):
    """Without a prompt TRL divides by n + 1: the first token counts, though it has no log-prob."""
    case = problem()
    n = (case.target != IGNORE).sum(1, keepdim=True)
    longer = (n.double() / (n + 1)).expand(case.target.shape).contiguous()
    loss = DPO_FAMILY[loss_type][1]
    check_same(case, dpo(loss_type, prompt=False), ours(loss, token_weight=longer))


def test_forward_kl_of_trl_has_no_cap():
    """At a log-ratio of -62 TRL takes exp(62) and its gradient; we stop at exp(60) and have none."""
    case = problem([4, 3], seed=2)
    logp = oracles.token_stats(case.hidden, case.weight, case.target)[0]
    case.columns["ref_logp"][0] = logp[0] + 62 / (case.target[0] != IGNORE).sum()
    peer, loss = DPO_FAMILY["forward_kl"]
    value, grads = run_peer(peer, case)
    assert (
        float(value) == pytest.approx(0.3 * math.exp(62), rel=1e-12) and grads["hidden"][0].abs().max() > 1e24
    )
    value, grads = run(ours(loss), case)
    assert (
        float(value) == pytest.approx(0.3 * math.exp(60), rel=1e-12) and grads["hidden"][0].abs().max() == 0
    )


# --- single sequences: KTOTrainer ---


def mismatch(case: Case, lengths: list[int], drift: float) -> tuple[Case, Tensor]:
    """Mismatched completions under the same head, and their log-probs; drift: mean log-ratio of a token."""
    other = problem(lengths, seed=7)
    logp = oracles.token_stats(other.hidden, case.weight, other.target)[0]
    other.columns["ref_logp"] = logp - drift
    return other, logp


@pytest.mark.parametrize(
    ("loss_type", "settings", "loss"),
    [
        ("kto", {}, fa.KTO(beta=0.3)),
        (
            "kto",
            {"desirable_weight": 1.3, "undesirable_weight": 0.7},
            fa.KTO(beta=0.3, desirable_weight=1.3, undesirable_weight=0.7),
        ),
        ("apo_zero_unpaired", {}, fa.APOZeroUnpaired(beta=0.3)),
    ],
    ids=["kto", "kto, weights", "apo_zero_unpaired"],
)
@pytest.mark.parametrize("drift", [0.4, -0.4], ids=["z0 above 0", "z0 clamped"])
@pytest.mark.parametrize("judged", ["both", "desirable", "undesirable"])
def test_kto(loss_type: str, settings: dict[str, float], loss: fa.Loss, drift: float, judged: str):
    case = problem()
    if judged != "both":
        case.columns["desirable"] = torch.full_like(case.columns["desirable"], judged == "desirable")
    other, logp = mismatch(case, at_least_one(), drift)
    z0 = fa.kto_kl(logp, other.columns["ref_logp"], other.target)
    assert (z0 > 0) == (drift > 0)
    check_same(case, kto(other, loss_type, **settings), ours(loss, kl=z0))


def test_kl_of_trl_counts_empty_completions():
    """TRL's z0 is a mean over all mismatched completions; ours leaves out those without tokens."""
    case = problem()
    other, logp = mismatch(case, LENGTHS, 0.4)
    z0 = fa.kto_kl(logp, other.columns["ref_logp"], other.target)
    empty = LENGTHS.count(0)
    assert empty > 0
    check_same(case, kto(other), ours(fa.KTO(beta=0.3), kl=z0 * (len(LENGTHS) - empty) / len(LENGTHS)))


# --- pairs without a reference: CPOTrainer, ORPOTrainer ---

NLL = fa.SFT(chosen=True)
CPO_FAMILY: dict[str, tuple[Function, fa.Loss]] = {
    "sigmoid": (cpo(), fa.CPO(beta=0.5, alpha=0.0)),
    "sigmoid, NLL": (cpo(cpo_alpha=0.7), fa.CPO(beta=0.5, alpha=0.7)),
    "sigmoid, smooth": (
        cpo(cpo_alpha=0.7, label_smoothing=0.2),
        fa.CPO(beta=0.5, alpha=0.7, label_smoothing=0.2),
    ),
    "simpo": (cpo(loss_type="simpo"), fa.SimPO(beta=0.5, gamma=0.4)),
    "simpo, NLL": (
        cpo(loss_type="simpo", cpo_alpha=0.7),
        fa.Sum([(1.0, fa.SimPO(beta=0.5, gamma=0.4)), (0.7, NLL)]),
    ),
    "simpo, AlphaPO": (cpo(loss_type="simpo", alpha=0.25), fa.SimPO(beta=0.5, gamma=0.4, alphapo=0.25)),
    "simpo, AlphaPO below 0": (
        cpo(loss_type="simpo", alpha=-0.5),
        fa.SimPO(beta=0.5, gamma=0.4, alphapo=-0.5),
    ),
}


@pytest.mark.parametrize("name", CPO_FAMILY)
def test_cpo_family(name: str):
    peer, loss = CPO_FAMILY[name]
    check_same(problem(at_least_one()), peer, ours(loss))


@pytest.mark.parametrize(
    ("loss_type", "loss"), [("hinge", fa.Hinge(beta=0.5)), ("ipo", fa.IPO(tau=0.5))], ids=["hinge", "ipo"]
)
def test_cpo_with_the_losses_of_dpo(loss_type: str, loss: fa.Loss):
    """Ours with a reference whose log-probs are all 0."""
    case = problem(at_least_one())
    zeros = torch.zeros_like(case.columns["ref_logp"])
    mine = plus((1.0, ours(loss, ref_logp=zeros)), (0.7, ours(NLL)))
    check_same(case, cpo(loss_type=loss_type, cpo_alpha=0.7), mine)


def test_alphapo_of_trl_takes_the_probability_of_the_sequence():
    """With `sigmoid` TRL's AlphaPO has p = exp(sum log pi); ours is the geometric mean, as in its paper.

    A token weight of n turns our mean into the sum.
    """
    case = problem(at_least_one())
    n = (case.target != IGNORE).sum(1, keepdim=True).expand(case.target.shape).double()
    loss = fa.CPO(beta=0.5, alpha=0.0, alphapo=0.05)
    check_same(case, cpo(alpha=0.05), ours(loss, token_weight=n.contiguous()))
    assert (run_peer(cpo(alpha=0.05), case)[0] - run(ours(loss), case)[0]).abs() > 1e-3


def test_orpo():
    """Prompts out of attention's sight. TRL casts the mean log-probs to float32."""
    case = problem(at_least_one())
    check_same(case, without_reference("ORPOTrainer", beta=0.4), ours(fa.ORPO(lam=0.4)), torch.float32)


def test_nll_of_trls_orpo_is_over_the_prompt_too():
    """ORPOTrainer's NLL is the mean over the tokens of prompt and answer; ours, over those of the answer."""
    case = problem(at_least_one())
    ids, seen = with_prompts(case)
    whole = ids.masked_fill(seen == 0, IGNORE)[:, 1:]
    assert (whole != IGNORE).sum() > (case.target != IGNORE).sum()
    mine = plus((1.0, ours(fa.ORPO(lam=0.4))), (-1.0, ours(NLL)), (1.0, ours(NLL, target=whole)))
    check_same(case, without_reference("ORPOTrainer", beta=0.4, prompt=True), mine, torch.float32)


def test_odds_of_trl_end_where_a_mean_log_prob_rounds_to_0():
    """At m = 0 its log(1 - exp(m)) is infinite, and the gradient NaN. Ours stops at m = -1e-7."""
    case = certain(torch.float64)
    value, grads = run_peer(without_reference("ORPOTrainer", beta=0.4), case)
    assert value.isfinite() and grads["hidden"].isnan().any()
    value, grads = run(ours(fa.ORPO(lam=0.4)), case)
    assert value.isfinite() and grads["hidden"].isfinite().all()


@pytest.mark.parametrize(
    ("peer", "loss"),
    [(cpo(loss_type="simpo"), fa.SimPO()), (without_reference("ORPOTrainer", beta=0.4), fa.ORPO())],
    ids=["simpo", "orpo"],
)
def test_an_empty_answer_makes_trls_mean_nan(peer: Function, loss: fa.Loss):
    """0 / 0, and with it the whole batch; our mean over no tokens is 0."""
    case = problem(LENGTHS)
    value, grads = run_peer(peer, case)
    assert value.isnan() and grads["weight"].isnan().all()
    value, grads = run(ours(loss), case)
    assert value.isfinite() and grads["weight"].isfinite().all()


# --- policy gradients: GRPOTrainer ---

GRPO_FAMILY: dict[str, tuple[Function, fa.Loss]] = {
    "grpo": (grpo(), fa.GRPO(**EPS)),
    "bnpo": (grpo("bnpo"), fa.GRPO.bnpo(**EPS)),
    "bnpo, PPO": (grpo("bnpo"), fa.PPO(**EPS)),
    "dapo": (grpo("dapo"), fa.GRPO.dapo(eps_low=0.2)),
    "dr_grpo": (grpo("dr_grpo"), fa.GRPO.dr_grpo(11, **EPS)),
    "luspo of tokens": (grpo("luspo"), fa.GRPO(**EPS, aggregation="seq_mean_token_sum")),
    "delta": (grpo(delta=1.35), fa.GRPO(**EPS, delta=1.35)),
    "kl": (grpo(beta=0.3), fa.GRPO(**EPS, beta=0.3)),
    "kl, corrected": (
        grpo("dapo", beta=0.3, use_bias_correction_kl=True),
        fa.GRPO.dapo(eps_low=0.2, beta=0.3, kl_correction=True),
    ),
    "kl, corrected, delta": (
        grpo(beta=0.3, use_bias_correction_kl=True, delta=1.35),
        fa.GRPO(**EPS, beta=0.3, kl_correction=True, delta=1.35),
    ),
    "gspo": (grpo(**SEQUENCE), fa.GSPO(**WIDE)),
    "gspo, token": (grpo(**SEQUENCE), fa.GSPO(**WIDE, level="token")),
    "gspo, bnpo": (grpo("bnpo", **SEQUENCE), fa.GSPO(**WIDE, aggregation="token_mean")),
    "gspo, dr_grpo": (
        grpo("dr_grpo", **SEQUENCE),
        fa.GSPO(**WIDE, aggregation="constant", max_length=11),
    ),
    "gspo, kl": (
        grpo(beta=0.3, use_bias_correction_kl=True, **SEQUENCE),
        fa.GSPO(**WIDE, beta=0.3, kl_correction=True),
    ),
    "luspo": (grpo("luspo", **SEQUENCE), fa.LUSPO(**WIDE)),
    "luspo, kl": (grpo("luspo", beta=0.3, **SEQUENCE), fa.LUSPO(**WIDE, beta=0.3)),
    "cispo": (grpo("cispo", epsilon_high=1.2), fa.CISPO(eps_high=1.2)),
    "cispo, kl": (
        grpo("cispo", epsilon_high=1.2, beta=0.3, use_bias_correction_kl=True),
        fa.CISPO(eps_high=1.2, beta=0.3, kl_correction=True),
    ),
    "sapo": (grpo("sapo"), fa.SAPO(t_pos=0.9, t_neg=1.2)),
    "sapo, kl": (grpo("sapo", beta=0.3), fa.SAPO(t_pos=0.9, t_neg=1.2, beta=0.3)),
    "vespo": (grpo("vespo"), fa.VESPO()),
    "vespo, other shapes": (
        grpo("vespo", vespo_k_pos=1.3, vespo_lambda_pos=1.1, vespo_k_neg=0.6, vespo_lambda_neg=2.4, beta=0.3),
        fa.VESPO(k_pos=1.3, lam_pos=1.1, k_neg=0.6, lam_neg=2.4, beta=0.3),
    ),
    "off-policy mask": (grpo(off_policy_mask_threshold=0.05), fa.GRPO(**EPS, off_policy_threshold=0.05)),
    "off-policy mask, cispo": (
        grpo("cispo", epsilon_high=1.2, off_policy_mask_threshold=0.05, beta=0.3),
        fa.CISPO(eps_high=1.2, off_policy_threshold=0.05, beta=0.3),
    ),
    "top entropy": (grpo(top_entropy_quantile=0.4), fa.GRPO(**EPS, top_entropy=0.4)),
    "top entropy, kl, gspo": (
        grpo(top_entropy_quantile=0.4, beta=0.3, **SEQUENCE),
        fa.GSPO(**WIDE, top_entropy=0.4, beta=0.3),
    ),
    "top entropy, dapo, off-policy mask": (
        grpo("dapo", top_entropy_quantile=0.7, off_policy_mask_threshold=0.05),
        fa.GRPO.dapo(eps_low=0.2, top_entropy=0.7, off_policy_threshold=0.05),
    ),
    "entropy bonus": (
        grpo("bnpo", entropy_coef=0.2, _entropy_bonus_enabled=True),
        fa.GRPO.bnpo(**EPS, entropy_coef=0.2),
    ),
}


@pytest.mark.parametrize("name", GRPO_FAMILY)
@pytest.mark.parametrize("seed", [0, 1])
def test_grpo_family(name: str, seed: int):
    peer, loss = GRPO_FAMILY[name]
    check_same(problem(seed=seed), peer, ours(loss))


ON_POLICY = {"old_per_token_logps": None}


@pytest.mark.parametrize(
    ("peer", "loss"),
    [
        (grpo(columns=ON_POLICY), fa.GRPO(**EPS)),
        (grpo("dapo", beta=0.3, columns=ON_POLICY), fa.GRPO.dapo(eps_low=0.2, beta=0.3)),
        (grpo(columns=ON_POLICY, **SEQUENCE), fa.GSPO(**WIDE)),
        (grpo("cispo", epsilon_high=1.2, columns=ON_POLICY), fa.CISPO(eps_high=1.2)),
        (grpo("sapo", columns=ON_POLICY), fa.SAPO(t_pos=0.9, t_neg=1.2)),
        (grpo("vespo", columns=ON_POLICY), fa.VESPO()),
        (
            grpo(off_policy_mask_threshold=0.05, columns=ON_POLICY),
            fa.GRPO(**EPS, off_policy_threshold=0.05),
        ),
    ],
    ids=["grpo", "dapo", "gspo", "cispo", "sapo", "vespo", "off-policy mask"],
)
def test_grpo_on_policy(peer: Function, loss: fa.Loss):
    """Without old log-probs the ratio is 1, and its gradient is the policy's."""
    check_same(problem(seed=2), peer, ours(loss, old_logp=None))


@pytest.mark.parametrize("name", ["grpo", "dapo", "gspo", "cispo", "vespo", "off-policy mask"])
def test_grpo_with_an_advantage_per_token(name: str):
    """[S, T], as trainers that derive from GRPOTrainer give it."""
    case = problem(seed=3)
    case.columns["advantage"] = torch.randn(case.target.shape, generator=generator(8), dtype=torch.float64)
    peer, loss = GRPO_FAMILY[name]
    check_same(case, peer, ours(loss))


def test_top_entropy_where_the_quantile_is_a_token():
    """That token is kept. In float32, in which TRL takes the quantile whatever the entropies are."""
    case = problem(seed=4, dtype=torch.float32)
    n = int((case.target != IGNORE).sum())
    share = (n - 1) // 2 / (n - 1)
    check_same(case, grpo(top_entropy_quantile=share), ours(fa.GRPO(**EPS, top_entropy=share)))


def test_off_policy_mask_without_the_samplers_log_probs():
    peer = grpo(off_policy_mask_threshold=0.05, columns={"sampling_per_token_logps": None})
    check_same(problem(), peer, ours(fa.GRPO(**EPS, off_policy_threshold=0.05), sampler_logp=None))


@pytest.mark.parametrize(
    ("loss_type", "loss"),
    [("dapo", fa.GRPO.dapo()), ("cispo", fa.CISPO(eps_high=0.28)), ("vespo", fa.VESPO())],
)
def test_tokens_of_a_whole_step(loss_type: str, loss: fa.Loss):
    peer = grpo(loss_type, columns={"num_items_in_batch": torch.tensor(77)})
    check_same(problem(), peer, ours(loss, normalizer=77))


@pytest.mark.parametrize("least", [None, 0.8])
@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
@pytest.mark.parametrize("loss_type", ["grpo", "vespo"])
def test_sampler_correction(loss_type: str, mode: str, least: float | None):
    """From the sampler's log-probs on: TRL forms the ratios and the advantages, then the loss.

    TRL's constructor refuses vespo with ratios of sequences; its loss takes them.
    """
    case = problem([7, 3, 4, 1, 5, 6, 2, 8], seed=5, holes=False, left=True)
    bounds = {"vllm_importance_sampling_clip_max": 1.3, "vllm_importance_sampling_clip_min": least}
    given = sampled(case, group=4, vllm_importance_sampling_mode=mode, beta=0.3, **bounds)
    ratio = given["importance_sampling_ratio"]
    assert 0 < ((ratio == 1.3) | (ratio == 0) | (ratio == least)).float().mean() < 1
    peer = grpo(
        loss_type,
        beta=0.3,
        columns=given | {"tool_mask": None},
        use_vllm=True,
        vllm_importance_sampling_correction=True,
    )
    cls = {"grpo": fa.GRPO, "vespo": fa.VESPO}[loss_type]
    eps = EPS if loss_type == "grpo" else {}
    loss = cls(**eps, beta=0.3, sampler_correction=mode, sampler_max=1.3, sampler_min=least)
    check_same(case, peer, ours(loss, advantage=given["advantages"]))


def entropy_bonus(coefficient: float, **options: float) -> Function:
    """-coefficient times the mean entropy of the tokens, and nothing else: no token has an advantage."""

    def bonus(at: Case) -> Tensor:
        none = torch.zeros_like(at.columns["advantage"])
        return ours(fa.GRPO.bnpo(entropy_coef=coefficient, **options), advantage=none)(at)

    return bonus


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo"])
def test_entropy_bonus_of_trl_is_a_mean_over_tokens(loss_type: str):
    """Whatever the aggregation; ours is aggregated as the rest of a token's term is."""
    peer = grpo(loss_type, entropy_coef=0.2, _entropy_bonus_enabled=True)
    loss = GRPO_FAMILY[loss_type][1]
    check_same(problem(), peer, plus((1.0, ours(loss)), (1.0, entropy_bonus(0.2))))


def test_entropy_bonus_of_trl_is_over_the_kept_tokens():
    """With a top-entropy mask TRL divides the bonus by the tokens kept; ours leaves the denominator."""
    case = problem()
    kept = top_entropy(case, 0.4)
    share = kept.sum().item() / (case.target != IGNORE).sum().item()
    assert 0.3 < share < 0.5
    peer = grpo("bnpo", entropy_coef=0.2, _entropy_bonus_enabled=True, top_entropy_quantile=0.4)
    loss = fa.GRPO.bnpo(**EPS, top_entropy=0.4)
    check_same(case, peer, plus((1.0, ours(loss)), (1.0, entropy_bonus(0.2 / share, top_entropy=0.4))))


def top_entropy(case: Case, share: float) -> Tensor:  # [S, T] bool
    """The tokens whose entropy is at least the (1 - share) quantile."""
    _, entropy, _ = oracles.token_stats(case.hidden, case.weight, case.target)
    live = case.target != IGNORE
    return live & (entropy >= torch.quantile(entropy[live], 1 - share))


# --- policy gradients: RLOOTrainer, GMPOTrainer ---

GMPO = {"epsilon_low": 0.2, "epsilon_high": 0.2}


@pytest.mark.parametrize("seed", [0, 1])
def test_rloo(seed: int):
    case = problem(at_least_one(), seed=seed, holes=False)
    check_same(case, grpo(name="RLOOTrainer"), ours(fa.RLOO(**EPS)))


@pytest.mark.parametrize(
    ("settings", "loss"),
    [({}, fa.GMPO(eps=0.2)), ({"beta": 0.3}, fa.GMPO(eps=0.2, beta=0.3))],
    ids=["", "kl"],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_gmpo(settings: dict[str, float], loss: fa.Loss, seed: int):
    case = problem(at_least_one(), seed=seed)
    check_same(case, grpo(name="GMPOTrainer", **GMPO, **settings), ours(loss))


@pytest.mark.parametrize(
    ("peer", "loss"),
    [(grpo(name="RLOOTrainer"), fa.RLOO(**EPS)), (grpo(name="GMPOTrainer", **GMPO), fa.GMPO(eps=0.2))],
    ids=["rloo", "gmpo"],
)
def test_an_empty_answer_costs_trl_its_advantage(peer: Function, loss: fa.Loss):
    """The ratio of no tokens is 1, so TRL's value has -A of it, a constant; our terms are tokens."""
    case = problem(holes=False)
    empty = (case.target == IGNORE).all(1)
    constant = -case.columns["advantage"][empty].sum() / len(LENGTHS)
    assert constant != 0
    check_same(case, peer, plus((1.0, ours(loss)), (1.0, lambda at: constant)))


def test_top_entropy_of_trls_gmpo_is_inside_the_geometric_mean():
    """TRL leaves tokens of low entropy out of the mean, as if ignored; ours masks what a token costs."""
    case = problem([7, 6, 5, 8], seed=1, holes=False)
    kept = top_entropy(case, 0.5)
    assert (kept.sum(1) > 0).all() and not kept.equal(case.target != IGNORE)
    peer = grpo(name="GMPOTrainer", **GMPO, top_entropy_quantile=0.5)
    check_same(case, peer, lambda at: ours(fa.GMPO(eps=0.2))(ignoring(at, ~kept)))
    masked = run(ours(fa.GMPO(eps=0.2, top_entropy=0.5)), case)[0]
    assert (run_peer(peer, case)[0] - masked).abs() > 1e-3


# --- TRL's own head ---


@pytest.mark.parametrize(
    ("peer", "loss"),
    [
        (sft(), fa.SFT()),
        (dpo("sigmoid", use_weighting=True), fa.DPO(beta=0.3, wpo=True)),
        (grpo("bnpo", entropy_coef=0.2, _entropy_bonus_enabled=True), fa.GRPO.bnpo(**EPS, entropy_coef=0.2)),
        (grpo(top_entropy_quantile=0.4, beta=0.3), fa.GRPO(**EPS, top_entropy=0.4, beta=0.3)),
    ],
    ids=["sft", "WPO", "entropy bonus", "top entropy"],
)
def test_through_trls_own_head(peer: Function, loss: fa.Loss, monkeypatch: pytest.MonkeyPatch):
    """add_fused_lm_head in place of the stand-in above: its log-probs, entropies and sums of squares."""
    monkeypatch.setattr("peers.Model", OwnHead)
    check_same(problem(dtype=torch.float32), peer, ours(loss))
