"""What everything is tested against: dense logits, log_softmax, autograd, and loops over sequences.

Written from the formulas in the papers, one line of code per line of formula, on padded tensors: S sequences
(rows) of T tokens. Nothing of fused_align is imported or shared here: an error would have to
be made twice. Call with float64 operands for the truth, with the operation's own dtype for what torch gives.
The head and the batch are in oracles_base.py, the families of losses in oracles_preference.py and
oracles_policy.py.
"""

from __future__ import annotations

from collections.abc import Callable

import oracles_policy as policy
import oracles_preference as preference
import torch
from oracles_base import IGNORE, Tokens, live_logits, logits, token_stats
from oracles_preference import margins
from torch import Tensor

__all__ = [
    "IGNORE",
    "LOSSES",
    "Tokens",
    "align_loss",
    "kto_kl",
    "live_logits",
    "logits",
    "margins",
    "token_stats",
]


def sft(x: Tokens, *, label_smoothing: float = 0.0, z_loss: float = 0.0, chosen: bool = False) -> Tensor:
    """-mean_t sum_v q_v log pi(v) over all live tokens, q = (1-e) [v = y] + e / V; plus z_loss log(Z)^2.

    chosen: of the chosen sequences of pairs only.
    """
    rows = [w for w, _ in preference.pairs(x)] if chosen else x.rows
    items = []
    for s in rows:
        item = -(1 - label_smoothing) * x.live(x.logp, s)
        if label_smoothing or z_loss:
            assert x.logits is not None
            z = x.live(x.logits, s)
            item = item - label_smoothing * torch.log_softmax(z, -1).mean(-1)
            item = item + z_loss * z.logsumexp(-1) ** 2
        items.append(x.sum(item, s))
    return x.mean(items, "tokens", sum(x.length(s) for s in rows))


def kto_kl(
    policy_logp: Tensor,  # [B, T] log-probs of mismatched completions
    ref_logp: Tensor,  # [B, T]
    target: Tensor,  # [B, T]
    humanline: tuple[float, float] | None = None,
) -> Tensor:  # []
    """z0 = max(0, mean over the non-empty sequences of L)."""
    return preference.kto_kl(Tokens(policy_logp, target != IGNORE, ref_logp=ref_logp, humanline=humanline))


LOSSES: dict[str, Callable[..., Tensor]] = {
    "sft": sft,
    "dpo": preference.dpo,
    "ipo": preference.ipo,
    "hinge": preference.hinge,
    "sigmoidnorm": preference.sigmoid_norm,
    "exo": preference.exo,
    "nca": preference.nca,
    "bcopair": preference.bco_pair,
    "sppohard": preference.sppo_hard,
    "apozero": preference.apo_zero,
    "apodown": preference.apo_down,
    "discopop": preference.disco_pop,
    "dpop": preference.dpop,
    "madpo": preference.madpo,
    "aot": preference.aot,
    "betadpo": preference.beta_dpo,
    "simpo": preference.simpo,
    "cpo": preference.cpo,
    "orpo": preference.orpo,
    "kto": preference.kto,
    "apozerounpaired": preference.apo_zero_unpaired,
    "bco": preference.bco,
    "grpo": policy.grpo,
    "ppo": policy.grpo,  # the same objective with aggregation = token_mean
    "gspo": policy.gspo,
    "cispo": policy.cispo,
    "sapo": policy.sapo,
    "gmpo": policy.gmpo,
    "luspo": policy.gspo,  # the same objective, summed over tokens: aggregation = seq_mean_token_sum
    "vespo": policy.vespo,
    "reinforce": policy.reinforce,
    "rloo": policy.rloo,
    "grao": policy.grao,
    "hybridpolicy": policy.hybrid_policy,
}


def align_loss(
    name: str,
    options: dict,  # the loss' own fields, every one of them
    hidden: Tensor,  # [S, T, H]
    weight: Tensor,  # [V, H]
    target: Tensor,  # [S, T]
    *,
    columns: dict,  # fields of Tokens
    head: dict,  # bias, temperature, logit_scale, softcap
) -> Tensor:  # []
    """The loss through dense logits."""
    logp, _, _ = token_stats(hidden, weight, target, **head)
    live = target != IGNORE
    z = live_logits(hidden, weight, live, **head)
    return LOSSES[name](Tokens(logp, live, logits=z, **columns), **options)
