"""Every chunked loss that Liger and fused_align both have, on the same tensors, in float32 on a CPU.

Liger computes in float32 whatever it is given: its logits go through `.float()`, its sums start from float32.
Its DPO and KTO cannot be given reference log-probs: they get the reference's hidden states and head, we get
the log-probs of those.

What Liger has and we have not: distillation (JSD, cosine similarity). What we have of these families and
Liger has not: `ipo` (refused, without the lengths), aot, cDPO, f-divergences, `ld_alpha`, WPO, KTO's weights,
AlphaPO, GMPO, RLOO, masks of entropy or off-policyness, the entropy bonus, k1 and k2.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import Case, randn
from peers import (
    EPS,
    IGNORE,
    INSTALL,
    LENGTHS,
    SEQUENCE,
    WIDE,
    Function,
    at_least_one,
    certain,
    check_same,
    ours,
    plus,
    problem,
    run,
    run_peer,
)
from torch import Tensor

import fused_align as fa
import oracles

pytest.importorskip("liger_kernel", reason=f"Liger is the peer; {INSTALL}")

from liger_kernel.chunked_loss import (  # noqa: E402
    LigerFusedLinearCPOLoss,
    LigerFusedLinearDPOLoss,
    LigerFusedLinearGRPOLoss,
    LigerFusedLinearKTOLoss,
    LigerFusedLinearORPOLoss,
    LigerFusedLinearSimPOLoss,
)

NLL = fa.SFT(chosen=True)


def with_reference(
    lengths: list[int] = LENGTHS, *, seed: int = 0, **head: Any
) -> tuple[Case, dict[str, Tensor]]:
    """A problem whose ref_logp are those of another hidden state and head, and these, as Liger names them."""
    case = problem(lengths, seed=seed, **head)
    ref_input = case.hidden + 0.3 * randn(*case.hidden.shape, seed=seed + 51)
    ref_weight = case.weight + 0.1 * randn(*case.weight.shape, seed=seed + 52)
    case.columns["ref_logp"] = oracles.token_stats(ref_input, ref_weight, case.target, **head)[0]
    reference = {"ref_input": ref_input.float(), "ref_weight": ref_weight.float()}
    if "bias" in head:
        reference["ref_bias"] = case.head["bias"].float()
    return case.to(torch.float32), reference


def liger(cls: type, reference: dict[str, Tensor] | None = None, **settings: Any) -> Function:
    """The losses on pairs; target [S, T], the chosen answers first."""

    def loss(at: Case) -> Tensor:
        made = cls(compiled=False, **settings)
        return made(at.weight, at.hidden, at.target, bias=at.bias, **reference or {})[0]

    return loss


# --- pairs ---

DPO_FAMILY: dict[str, tuple[dict[str, Any], fa.Loss]] = {
    "sigmoid": ({}, fa.DPO(beta=0.3)),
    "robust": ({"label_smoothing": 0.2}, fa.DPO(beta=0.3, label_smoothing=0.2, robust=True)),
    "hinge": ({}, fa.Hinge(beta=0.3)),
    "exo_pair": ({"label_smoothing": 0.05}, fa.EXO(beta=0.3, eps=0.05)),
    "nca_pair": ({}, fa.NCA(beta=0.3)),
    "bco_pair": ({}, fa.BCOPair(beta=0.3)),
    "sppo_hard": ({}, fa.SPPOHard(beta=0.3)),
    "apo_zero": ({}, fa.APOZero(beta=0.3)),
    "apo_down": ({}, fa.APODown(beta=0.3)),
    "discopop": ({"discopop_tau": 0.2}, fa.DiscoPOP(beta=0.3, tau=0.2)),
}


@pytest.mark.parametrize("loss_type", DPO_FAMILY)
@pytest.mark.parametrize("chunk_size", [1, 2])
def test_dpo_family(loss_type: str, chunk_size: int):
    settings, loss = DPO_FAMILY[loss_type]
    case, reference = with_reference()
    peer = liger(
        LigerFusedLinearDPOLoss, reference, loss_type=loss_type, beta=0.3, chunk_size=chunk_size, **settings
    )
    check_same(case, peer, ours(loss))


def test_dpo_covers_all_of_ligers_types():
    assert set(DPO_FAMILY) == LigerFusedLinearDPOLoss._SUPPORTED_LOSS_TYPES


def test_dpo_with_a_bias():
    case, reference = with_reference(bias=randn(23, seed=53))
    check_same(case, liger(LigerFusedLinearDPOLoss, reference, beta=0.3), ours(fa.DPO(beta=0.3)))


def test_dpo_without_a_reference():
    case = problem(dtype=torch.float32)
    zeros = torch.zeros_like(case.columns["ref_logp"])
    peer = liger(LigerFusedLinearDPOLoss, use_ref_model=False, beta=0.3)
    check_same(case, peer, ours(fa.DPO(beta=0.3), ref_logp=zeros))


def test_dpo_with_the_chosen_nll():
    case, reference = with_reference()
    peer = liger(LigerFusedLinearDPOLoss, reference, beta=0.3, compute_nll_loss=True, alpha=0.7)
    check_same(case, peer, ours(fa.Sum([(1.0, fa.DPO(beta=0.3)), (0.7, NLL)])))


def test_dpo_of_averages():
    case, reference = with_reference(at_least_one())
    peer = liger(LigerFusedLinearDPOLoss, reference, beta=0.3, average_log_prob=True)
    check_same(case, peer, ours(fa.SigmoidNorm(beta=0.3)))


def test_sigmoid_of_liger_ignores_label_smoothing():
    """Its documentation names cDPO; the loss has no such term."""
    case, reference = with_reference()
    peer = liger(LigerFusedLinearDPOLoss, reference, beta=0.3, label_smoothing=0.2)
    check_same(case, peer, ours(fa.DPO(beta=0.3)))
    smooth = run(ours(fa.DPO(beta=0.3, label_smoothing=0.2)), case)[0]
    assert (run_peer(peer, case)[0] - smooth).abs() > 1e-3


@pytest.mark.parametrize("alpha", [0.0, 0.7])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_cpo(alpha: float, label_smoothing: float):
    peer = liger(LigerFusedLinearCPOLoss, beta=0.4, alpha=alpha, label_smoothing=label_smoothing)
    loss = fa.CPO(beta=0.4, alpha=alpha, label_smoothing=label_smoothing)
    check_same(problem(dtype=torch.float32), peer, ours(loss))


@pytest.mark.parametrize(("alpha", "nll"), [(1.0, False), (0.7, True)])
def test_simpo(alpha: float, nll: bool):
    """Liger adds the NLL of the chosen answers unless told otherwise."""
    peer = liger(LigerFusedLinearSimPOLoss, beta=0.5, gamma=0.4, alpha=alpha, compute_nll_loss=nll)
    loss = fa.Sum([(1.0, fa.SimPO(beta=0.5, gamma=0.4)), (alpha * nll, NLL)])
    check_same(problem(at_least_one(), dtype=torch.float32), peer, ours(loss))


def test_orpo():
    case = problem(at_least_one(), dtype=torch.float32)
    check_same(case, liger(LigerFusedLinearORPOLoss, beta=0.4), ours(fa.ORPO(lam=0.4)))
    odds = plus((1.0, ours(fa.ORPO(lam=0.4))), (-1.0, ours(NLL)))
    check_same(case, liger(LigerFusedLinearORPOLoss, beta=0.4, compute_nll_loss=False), odds)


def test_orpo_of_liger_can_count_the_prompt():
    """With nll_target the NLL is over other tokens than the odds, as in TRL; ours is over the answer's."""
    case = problem(at_least_one(), dtype=torch.float32)
    whole = torch.where(case.target == IGNORE, torch.arange(case.target.shape[1]), case.target)

    def peer(at: Case) -> Tensor:
        made = LigerFusedLinearORPOLoss(beta=0.4, compiled=False)
        return made(at.weight, at.hidden, at.target, nll_target=whole)[0]

    mine = plus((1.0, ours(fa.ORPO(lam=0.4))), (-1.0, ours(NLL)), (1.0, ours(NLL, target=whole)))
    check_same(case, peer, mine)


def test_odds_of_liger_end_where_a_mean_log_prob_rounds_to_0():
    """At m = 0 its log(1 - exp(m)) is infinite, and the gradient NaN. Ours stops at m = -1e-7."""
    case = certain(torch.float32)
    value, grads = run_peer(liger(LigerFusedLinearORPOLoss, beta=0.4), case)
    assert value.isfinite() and grads["hidden"].isnan().any()
    value, grads = run(ours(fa.ORPO(lam=0.4)), case)
    assert value.isfinite() and grads["hidden"].isfinite().all()


@pytest.mark.parametrize(
    ("cls", "loss"),
    [(LigerFusedLinearSimPOLoss, fa.SimPO()), (LigerFusedLinearORPOLoss, fa.ORPO())],
    ids=["simpo", "orpo"],
)
def test_an_empty_answer_makes_ligers_mean_nan(cls: type, loss: fa.Loss):
    """0 / 0, and with it the whole batch; our mean over no tokens is 0."""
    case = problem(dtype=torch.float32)
    value, grads = run_peer(liger(cls), case)
    assert value.isnan() and grads["weight"].isnan().all()
    value, grads = run(ours(loss), case)
    assert value.isfinite() and grads["weight"].isfinite().all()


# --- single sequences ---


def kto(reference: dict[str, Tensor], kl: Tensor | None, chunk_size: int = 1) -> Function:
    def loss(at: Case) -> Tensor:
        made = LigerFusedLinearKTOLoss(beta=0.3, compiled=False, use_ref_model=True, chunk_size=chunk_size)
        judged = {"preference_labels": at.columns["desirable"], "kl": kl}
        return made(at.hidden, at.weight, at.target, bias=at.bias, **judged, **reference)[0]

    return loss


@pytest.mark.parametrize("chunk_size", [1, 3])
def test_kto(chunk_size: int):
    case, reference = with_reference()
    z0 = case.columns["kl"]
    assert z0 > 0
    check_same(case, kto(reference, z0, chunk_size), ours(fa.KTO(beta=0.3)))


def test_kto_without_kl():
    case, reference = with_reference()
    check_same(case, kto(reference, None), ours(fa.APOZeroUnpaired(beta=0.3)))


def test_kl_of_every_sequence_is_not_chunked_by_liger():
    """It documents kl as [S] and takes all of it for every chunk: S times the loss with chunks of one."""
    case, reference = with_reference()
    S = len(LENGTHS)
    every = case.columns["kl"].expand(S)
    check_same(case, kto(reference, every, chunk_size=S), ours(fa.KTO(beta=0.3)))
    check_same(case, kto(reference, every), plus((S, ours(fa.KTO(beta=0.3)))))


# --- policy gradients ---


def grpo(
    loss_type: str = "grpo", *, vllm: Tensor | None = None, items: int | None = None, **settings: Any
) -> Function:
    """The ratio of old to sampler is given, `vllm`, and the tokens of a whole step, `items`."""
    settings = {"epsilon_high": 0.28, "beta": 0.0, "max_completion_length": 11} | settings
    settings |= {"sapo_temperature_pos": 0.9, "sapo_temperature_neg": 1.2} if loss_type == "sapo" else {}

    def loss(at: Case) -> Tensor:
        made = LigerFusedLinearGRPOLoss(
            loss_type=loss_type,
            use_ref_model=settings["beta"] != 0,
            compiled=False,
            temperature=at.head.get("temperature", 1.0),
            **settings,
        )
        return made(
            at.hidden,
            at.weight,
            at.target.clamp(min=0),
            (at.target != IGNORE).float(),
            at.columns["advantage"],
            bias=at.bias,
            ref_per_token_logps=at.columns["ref_logp"] if settings["beta"] else None,
            old_per_token_logps=at.columns["old_logp"],
            vllm_is_ratio=vllm,
            num_items_in_batch=items,
        )[0]

    return loss


GRPO_FAMILY: dict[str, tuple[Function, fa.Loss]] = {
    "grpo": (grpo(), fa.GRPO(**EPS)),
    "bnpo": (grpo("bnpo"), fa.GRPO.bnpo(**EPS)),
    "dapo": (grpo("dapo"), fa.GRPO.dapo(eps_low=0.2)),
    "dr_grpo": (grpo("dr_grpo"), fa.GRPO.dr_grpo(11, **EPS)),
    "delta": (grpo(delta=1.35), fa.GRPO(**EPS, delta=1.35)),
    "chunks of 3": (grpo("dapo", beta=0.3, chunk_size=3), fa.GRPO.dapo(eps_low=0.2, beta=0.3)),
    "kl": (grpo(beta=0.3), fa.GRPO(**EPS, beta=0.3)),
    "kl, corrected": (
        grpo(beta=0.3, use_bias_correction_kl=True, delta=1.35),
        fa.GRPO(**EPS, beta=0.3, kl_correction=True, delta=1.35),
    ),
    "gspo": (grpo(**SEQUENCE), fa.GSPO(**WIDE)),
    "gspo, token": (grpo(**SEQUENCE), fa.GSPO(**WIDE, level="token")),
    "gspo, dapo, kl": (
        grpo("dapo", beta=0.3, use_bias_correction_kl=True, **SEQUENCE),
        fa.GSPO(**WIDE, beta=0.3, kl_correction=True, aggregation="token_mean"),
    ),
    "luspo": (grpo("luspo", **SEQUENCE), fa.LUSPO(**WIDE)),
    "cispo": (grpo("cispo", epsilon_high=1.2, beta=0.3), fa.CISPO(eps_high=1.2, beta=0.3)),
    "sapo": (grpo("sapo"), fa.SAPO(t_pos=0.9, t_neg=1.2)),
    "sapo, kl": (grpo("sapo", beta=0.3), fa.SAPO(t_pos=0.9, t_neg=1.2, beta=0.3)),
    "vespo": (grpo("vespo"), fa.VESPO()),
    "vespo, other shapes": (
        grpo("vespo", vespo_k_pos=1.3, vespo_lambda_pos=1.1, vespo_k_neg=0.6, vespo_lambda_neg=2.4, beta=0.3),
        fa.VESPO(k_pos=1.3, lam_pos=1.1, k_neg=0.6, lam_neg=2.4, beta=0.3),
    ),
}


@pytest.mark.parametrize("name", GRPO_FAMILY)
@pytest.mark.parametrize("seed", [0, 1])
def test_grpo_family(name: str, seed: int):
    peer, loss = GRPO_FAMILY[name]
    check_same(problem(seed=seed, dtype=torch.float32), peer, ours(loss))


@pytest.mark.parametrize("name", ["grpo", "gspo", "vespo"])
def test_grpo_with_a_bias_and_a_temperature(name: str):
    peer, loss = GRPO_FAMILY[name]
    case = problem(dtype=torch.float32, bias=randn(23, seed=53), temperature=0.7)
    check_same(case, peer, ours(loss))


@pytest.mark.parametrize(
    ("loss_type", "loss"),
    [("dapo", fa.GRPO.dapo()), ("cispo", fa.CISPO(eps_high=0.28)), ("vespo", fa.VESPO())],
)
def test_tokens_of_a_whole_step(loss_type: str, loss: fa.Loss):
    check_same(problem(dtype=torch.float32), grpo(loss_type, items=77), ours(loss, normalizer=77))


def sampler_ratio(case: Case, level: str) -> Tensor:  # [S, T] | [S, 1]
    """old / sampler of tokens (1 where ignored) or sequences, at most 1.3."""
    gap = (case.columns["old_logp"] - case.columns["sampler_logp"]).masked_fill(case.target == IGNORE, 0)
    gap = gap if level == "token" else gap.sum(1, keepdim=True)
    return gap.exp().clamp(max=1.3)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", ["grpo", "vespo"])
def test_sampler_correction(loss_type: str, level: str):
    """Liger is given the ratio."""
    case = problem(dtype=torch.float32)
    ratio = sampler_ratio(case, level)
    assert 0 < (ratio == 1.3).float().mean() < 1
    correction = {"sampler_correction": f"{level}_truncate", "sampler_max": 1.3, "beta": 0.3}
    loss = fa.GRPO(**EPS, **correction) if loss_type == "grpo" else fa.VESPO(**correction)
    check_same(case, grpo(loss_type, beta=0.3, vllm=ratio), ours(loss))


def padding_too(case: Case, loss: fa.Loss) -> Function:
    """Every position of the padded batch, weighed n_s / T, in place of the n_s live ones."""
    n = (case.target != IGNORE).sum(1, keepdim=True) / case.target.shape[1]
    weight = n.expand(case.target.shape).contiguous()
    return ours(loss, target=case.target.clamp(min=0), token_weight=weight)


def test_luspo_of_liger_averages_over_padding():
    """With ratios of tokens: n_s times the mean over all T positions; ours is the sum over live ones."""
    case = problem(dtype=torch.float32)
    loss = fa.GRPO(**EPS, aggregation="seq_mean_token_sum")
    check_same(case, grpo("luspo"), padding_too(case, loss))
    assert (run_peer(grpo("luspo"), case)[0] - run(ours(loss), case)[0]).abs() > 1e-2


def test_kl_of_ligers_luspo_averages_over_padding():
    """The same with ratios of sequences, as soon as there is a KL term."""
    case = problem(dtype=torch.float32)
    penalty = fa.GRPO(beta=0.3, aggregation="seq_mean_token_sum")

    def kl(at: Case) -> Tensor:
        none = replace(at, columns={**at.columns, "advantage": torch.zeros_like(at.columns["advantage"])})
        return padding_too(case, penalty)(none)

    mine = plus((1.0, ours(fa.LUSPO(**WIDE))), (1.0, kl))
    check_same(case, grpo("luspo", beta=0.3, **SEQUENCE), mine)
