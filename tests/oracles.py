"""What everything is tested against: dense logits, log_softmax, autograd, and loops over sequences.

Written from the formulas in the papers, one line of code per line of formula, on padded tensors: S sequences
(rows) of T tokens. Nothing of fused_align is imported or shared here: an error would have to
be made twice. Call with float64 operands for the truth, with the operation's own dtype for what torch gives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, one_hot

IGNORE = -100

# --- the language-model head ---


def logits(
    hidden: Tensor,  # [..., H]
    weight: Tensor,  # [V, H]
    *,
    bias: Tensor | None = None,  # [V]
    temperature: float | Tensor = 1.0,  # float or [...]
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:  # [..., V]
    """a = hW + b; a * logit_scale -> softcap * tanh(. / softcap) -> / temperature."""
    z = hidden @ weight.T
    if bias is not None:
        z = z + bias
    if z.dtype in (torch.bfloat16, torch.float16):
        z = z.float()  # as transformers and TRL do before their softmax
    z = z * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    if isinstance(temperature, Tensor):
        return z / temperature.to(z.dtype)[..., None]
    return z / temperature


def live_logits(
    hidden: Tensor,  # [..., H]
    weight: Tensor,  # [V, H]
    live: Tensor,  # [...] bool
    *,
    temperature: float | Tensor = 1.0,
    **head,
) -> Tensor:  # [..., V]
    """Logits; at ignored positions of a hidden and a temperature that hold nothing bad."""
    if isinstance(temperature, Tensor):
        temperature = torch.where(live, temperature, 1.0)
    return logits(torch.where(live[..., None], hidden, 0), weight, temperature=temperature, **head)


def token_stats(
    hidden: Tensor,  # [..., H]
    weight: Tensor,  # [V, H]
    target: Tensor,  # [...]
    *,
    ignore_index: int = IGNORE,
    **head,
) -> tuple[Tensor, Tensor, Tensor]:  # logp, entropy, lse, each [...]
    """log p(y), the entropy and the log-sum-exp of every live token; 0 at ignored ones."""
    live = target != ignore_index
    z = live_logits(hidden, weight, live, **head)
    log_p = torch.log_softmax(z, dim=-1)
    picked = one_hot(torch.where(live, target, 0), weight.shape[0]).bool()
    logp = torch.where(picked, log_p, 0).sum(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    lse = torch.logsumexp(z, dim=-1)
    return torch.where(live, logp, 0), torch.where(live, entropy, 0), torch.where(live, lse, 0)


# --- the losses ---


@dataclass
class Tokens:
    """A padded batch of log-probabilities and what the losses read besides them."""

    logp: Tensor  # [S, T]
    mask: Tensor  # [S, T] bool, True at live tokens
    old_logp: Tensor | None = None  # [S, T]
    ref_logp: Tensor | None = None  # [S, T]
    advantage: Tensor | None = None  # [S] or [S, T]
    token_weight: Tensor | None = None  # [S, T]
    desirable: Tensor | None = None  # [S] bool
    kl: Tensor | float | None = None  # []
    humanline: tuple[float, float] | None = None  # log eps_P, log eps_R
    normalizer: float | None = None
    logits: Tensor | None = None  # [S, T, V]

    @property
    def rows(self) -> range:
        return range(self.logp.shape[0])

    def length(self, s: int) -> int:
        return int(self.mask[s].sum())

    def live(self, x: Tensor, s: int) -> Tensor:
        """The live tokens of sequence s, [n]."""
        return x[s][self.mask[s]]

    def weight(self, s: int) -> Tensor:
        """Their weights, [n]."""
        logp = self.live(self.logp, s)
        return (
            torch.ones_like(logp) if self.token_weight is None else self.live(self.token_weight, s).to(logp)
        )

    def log_ratio(self, anchor: Tensor, s: int) -> Tensor:
        """log pi - log anchor of the live tokens of sequence s, clipped by Humanline, [n]."""
        ratio = self.live(self.logp, s) - self.live(anchor, s)
        if self.humanline is None:
            return ratio
        low, high = self.humanline
        clipped = torch.full_like(ratio, low).where(ratio < low, torch.full_like(ratio, high))
        return ratio.where(
            (ratio >= low) & (ratio <= high), clipped
        )  # gradient 1 inside, bounds included; 0 outside

    def mean(self, items: list[Tensor], count: int) -> Tensor:
        """The sum of the items over the normalizer or their own count; a batch of nothing costs nothing."""
        total = torch.stack(items).sum() if items else self.logp.sum() * 0
        return total / (max(count, 1) if self.normalizer is None else self.normalizer)


def sft(x: Tokens, *, label_smoothing: float = 0.0, z_loss: float = 0.0) -> Tensor:
    """-mean_t sum_v q_v log pi(v) over all live tokens, q = (1-e) [v = y] + e / V; plus z_loss log(Z)^2."""
    items = []
    for s in x.rows:
        item = -(1 - label_smoothing) * x.live(x.logp, s)
        if label_smoothing or z_loss:
            assert x.logits is not None
            z = x.live(x.logits, s)
            item = item - label_smoothing * torch.log_softmax(z, -1).mean(-1)
            item = item + z_loss * z.logsumexp(-1) ** 2
        items.append((x.weight(s) * item).sum())
    return x.mean(items, sum(x.length(s) for s in x.rows))


def _pairs(x: Tokens) -> list[tuple[int, int]]:
    half = len(x.rows) // 2
    return [(i, i + half) for i in range(half)]


def _ratio_sum(x: Tokens, s: int) -> Tensor:
    """L(y) = sum_t w_t l_t against the reference."""
    assert x.ref_logp is not None
    return (x.weight(s) * x.log_ratio(x.ref_logp, s)).sum()


def dpo(x: Tokens, *, beta: float, label_smoothing: float) -> Tensor:
    """-(1-e) log s(beta D) - e log s(-beta D)   (arXiv 2305.18290; cDPO)."""
    items = []
    for chosen, rejected in _pairs(x):
        d = _ratio_sum(x, chosen) - _ratio_sum(x, rejected)
        items.append(-(1 - label_smoothing) * logsigmoid(beta * d) - label_smoothing * logsigmoid(-beta * d))
    return x.mean(items, len(items))


def ipo(x: Tokens, *, tau: float, normalize: bool) -> Tensor:
    """(L_w/n_w - L_l/n_l - 1/(2 tau))^2, or the same with plain sums   (arXiv 2310.12036)."""
    items = []
    for chosen, rejected in _pairs(x):
        side = []
        for s in (chosen, rejected):
            side.append(_ratio_sum(x, s) / max(x.length(s), 1) if normalize else _ratio_sum(x, s))
        items.append((side[0] - side[1] - 1 / (2 * tau)) ** 2)
    return x.mean(items, len(items))


def kto(x: Tokens, *, beta: float, desirable_weight: float, undesirable_weight: float) -> Tensor:
    """w_D (1 - s(beta (L - z0))) desirable, w_U (1 - s(beta (z0 - L))) undesirable   (arXiv 2402.01306)."""
    assert x.desirable is not None and x.kl is not None
    items = []
    for s in x.rows:
        ratio = _ratio_sum(x, s)
        if x.desirable[s]:
            items.append(desirable_weight * (1 - torch.sigmoid(beta * (ratio - x.kl))))
        else:
            items.append(undesirable_weight * (1 - torch.sigmoid(beta * (x.kl - ratio))))
    return x.mean(items, len(items))


def kto_kl(
    policy_logp: Tensor,  # [B, T] log-probs of mismatched completions
    ref_logp: Tensor,  # [B, T]
    target: Tensor,  # [B, T]
    humanline: tuple[float, float] | None = None,
) -> Tensor:  # []
    """z0 = max(0, mean over the non-empty sequences of L)."""
    x = Tokens(policy_logp, target != IGNORE, ref_logp=ref_logp, humanline=humanline)
    sums = [_ratio_sum(x, s) for s in x.rows if x.length(s) > 0]
    return x.mean(sums, len(sums)).clamp(min=0)


def grpo(
    x: Tokens,
    *,
    eps_low: float,
    eps_high: float,
    delta: float | None,
    beta: float,
    kl: str,
    kl_correction: bool,
    aggregation: str,
    max_length: int | None,
    entropy_coef: float = 0.0,
) -> Tensor:
    """-min(min(rho, delta) A, clip(rho, 1-eps_low, 1+eps_high) A) + beta k - coef H   (arXiv 2402.03300)."""
    assert x.advantage is not None
    items = []
    for s in x.rows:
        old = x.logp.detach() if x.old_logp is None else x.old_logp
        rho = torch.exp(x.log_ratio(old, s).clamp(max=60))
        adv = x.live(x.advantage, s) if x.advantage.dim() == 2 else x.advantage[s]
        capped = rho if delta is None else rho.clamp(max=delta)
        token = -torch.minimum(capped * adv, rho.clamp(1 - eps_low, 1 + eps_high) * adv)
        if beta != 0:
            token = token + beta * _kl(x, s, kl) * (rho if kl_correction else 1)
        if entropy_coef:
            assert x.logits is not None
            log_p = torch.log_softmax(x.live(x.logits, s), -1)
            token = token + entropy_coef * (log_p.exp() * log_p).sum(-1)
        total = (x.weight(s) * token).sum()
        if aggregation == "seq_mean_token_mean":
            total = total / max(x.length(s), 1)
        elif aggregation == "constant":
            assert max_length is not None
            total = total / max_length
        items.append(total)
    tokens = sum(x.length(s) for s in x.rows)
    return x.mean(items, tokens if aggregation == "token_mean" else len(x.rows))


def _kl(x: Tokens, s: int, kind: str) -> Tensor:
    """Schulman's estimators of KL(pi || ref) at the sampled tokens, of the unclipped log-probs, [n]."""
    assert x.ref_logp is not None
    d = x.live(x.ref_logp, s) - x.live(x.logp, s)
    return {"k1": -d, "k2": d**2 / 2, "k3": torch.exp(d) - d - 1}[kind]


LOSSES: dict[str, Callable[..., Tensor]] = {
    "sft": sft,
    "dpo": dpo,
    "ipo": ipo,
    "kto": kto,
    "grpo": grpo,
    "ppo": grpo,  # the same objective with aggregation = token_mean
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
