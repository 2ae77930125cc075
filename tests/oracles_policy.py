"""The losses of policy gradients; see oracles.py.

l_t = log pi(y_t) - log old(y_t), clipped by Humanline;   rho_t = exp(l_t);   A the advantage of the sequence
or of each of its tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from oracles_base import Tokens
from torch import Tensor


def _advantage(x: Tokens, s: int) -> Tensor:
    """A of sequence s, [] or [n]."""
    assert x.advantage is not None
    return x.live(x.advantage, s) if x.advantage.dim() == 2 else x.advantage[s]


def _old(x: Tokens) -> Tensor:
    """log old; on-policy it is the policy's own, no gradient, [S, T]."""
    return x.logp.detach() if x.old_logp is None else x.old_logp


def _log_ratio(x: Tokens, s: int) -> Tensor:
    """l_t, [n]."""
    return x.log_ratio(_old(x), s)


def _ratio(log_ratio: Tensor) -> Tensor:
    """exp(min(l, 60)), no gradient above 60."""
    return torch.exp(log_ratio.clamp(max=60))


def _logp(x: Tokens, s: int) -> Tensor:
    """log pi(y_t); outside Humanline's bounds without gradient, its value kept, [n]."""
    logp = x.live(x.logp, s)
    if x.humanline is None:
        return logp
    clipped = _log_ratio(x, s)
    return logp.detach() + (clipped - clipped.detach())


# --- what all of them share ---


def _kl(x: Tokens, s: int, kind: str) -> Tensor:
    """Schulman's estimators of KL(pi || ref) at the sampled tokens, of the unclipped log-probs, [n]."""
    assert x.ref_logp is not None
    d = x.live(x.ref_logp, s) - x.live(x.logp, s)
    if kind == "k3":
        d = d.clamp(max=60)
        return torch.exp(d) - d - 1
    return {"k1": -d, "k2": d**2 / 2}[kind]


def _entropy(x: Tokens, s: int) -> Tensor:
    """H(pi) of the live tokens, [n]."""
    assert x.logits is not None
    log_p = torch.log_softmax(x.live(x.logits, s), -1)
    return -(log_p.exp() * log_p).sum(-1)


def _top_entropy(x: Tokens, share: float) -> Callable[[int], Tensor | int]:
    """m_t = 1 at the tokens whose entropy is at least the (1 - share) quantile of the batch, else 0."""
    if share == 1 or not x.mask.any():
        return lambda s: 1
    entropy = [_entropy(x, s).detach() for s in x.rows]
    bound = torch.quantile(torch.cat(entropy), 1 - share)
    return lambda s: (entropy[s] >= bound).to(bound)


def _sampler_weight(x: Tokens, s: int, kind: str | None, most: float, least: float | None) -> Tensor | int:
    """u_t = old / sampler, of tokens [n] or of the sequence [], truncated or masked; no gradient."""
    if kind is None:
        return 1
    assert x.sampler_logp is not None
    gap = x.live(_old(x), s) - x.live(x.sampler_logp, s)
    level, bound = kind.split("_")
    r = _ratio(gap if level == "token" else gap.sum())
    if bound == "truncate":
        return r.clamp(least, most)
    return torch.where((r > most) | (r < (-math.inf if least is None else least)), 0, r)


def _on_policy(x: Tokens, s: int, threshold: float | None) -> Tensor | int:
    """k_s = 1 iff A >= 0 or mean_t (log sampler - sg[log pi]) <= threshold, else 0; [] or [n]."""
    if threshold is None:
        return 1
    sampler = _old(x) if x.sampler_logp is None else x.sampler_logp
    drift = (x.live(sampler, s) - x.live(x.logp, s).detach()).mean()
    return ((_advantage(x, s) >= 0) | (drift <= threshold)).to(drift)


def _policy(
    x: Tokens,
    surrogate: Callable[[int], tuple[Tensor, Tensor]],  # of sequence s: what to minimise, and rho; [] or [n]
    *,
    beta: float,
    kl: str,
    kl_correction: bool,
    aggregation: str,
    max_length: int | None,
    sampler_correction: str | None,
    sampler_max: float,
    sampler_min: float | None,
    off_policy_threshold: float | None,
    top_entropy: float,
    entropy_coef: float,
) -> Tensor:
    """m u k surrogate + beta KL [rho] - coef m H, and how tokens become one number."""
    mask = _top_entropy(x, top_entropy)
    items = []
    for s in x.rows:
        value, rho = surrogate(s)
        m = mask(s)
        u = _sampler_weight(x, s, sampler_correction, sampler_max, sampler_min)
        token = m * u * _on_policy(x, s, off_policy_threshold) * value
        if beta:
            k = _kl(x, s, kl)
            token = token + beta * ((rho * k).clamp(max=1e30) if kl_correction else k)
        if entropy_coef:
            token = token - entropy_coef * m * _entropy(x, s)
        if aggregation == "seq_mean_token_mean":
            items.append(x.token_mean(token, s))
        elif aggregation == "constant":
            assert max_length is not None
            items.append(x.sum(token, s) / max_length)
        else:
            items.append(x.sum(token, s))
    if aggregation == "token_mean":
        return x.mean(items, "tokens", sum(x.length(s) for s in x.rows))
    return x.mean(items, "sequences", len(x.rows))


def _clipped(rho: Tensor, adv: Tensor, eps_low: float, eps_high: float, delta: float | None = None) -> Tensor:
    """-min(min(rho, delta) A, clip(rho, 1-eps_low, 1+eps_high) A)."""
    capped = rho if delta is None else rho.clamp(max=delta)
    return -torch.minimum(capped * adv, rho.clamp(1 - eps_low, 1 + eps_high) * adv)


# --- ratios of tokens ---


def grpo(x: Tokens, *, eps_low: float, eps_high: float, delta: float | None, **shared) -> Tensor:
    """-min(min(rho, delta) A, clip(rho, 1-eps_low, 1+eps_high) A)   (arXiv 2402.03300)."""

    def surrogate(s: int) -> tuple[Tensor, Tensor]:
        rho = _ratio(_log_ratio(x, s))
        return _clipped(rho, _advantage(x, s), eps_low, eps_high, delta), rho

    return _policy(x, surrogate, **shared)


def cispo(x: Tokens, *, eps_high: float, **shared) -> Tensor:
    """-sg[min(rho, eps_high)] A log pi   (arXiv 2506.13585)."""

    def surrogate(s: int) -> tuple[Tensor, Tensor]:
        rho = _ratio(_log_ratio(x, s))
        return -rho.detach().clamp(max=eps_high) * _advantage(x, s) * _logp(x, s), rho

    return _policy(x, surrogate, **shared)


def sapo(x: Tokens, *, t_pos: float, t_neg: float, **shared) -> Tensor:
    """-(4/T) s(T (rho-1)) A, T = t_pos if A > 0 else t_neg   (arXiv 2511.20347)."""

    def surrogate(s: int) -> tuple[Tensor, Tensor]:
        rho, adv = _ratio(_log_ratio(x, s)), _advantage(x, s)
        t = torch.where(adv > 0, rho.new_tensor(t_pos), t_neg)
        return -(4 / t) * torch.sigmoid(t * (rho - 1)) * adv, rho

    return _policy(x, surrogate, **shared)


def vespo(
    x: Tokens,
    *,
    k_pos: float,
    lam_pos: float,
    k_neg: float,
    lam_neg: float,
    sampler_correction: str | None,
    sampler_max: float,
    sampler_min: float | None,
    **shared,
) -> Tensor:
    """-phi A log pi;  phi = sg[exp(lam + k log w - lam w)];  k, lam by the sign of A.

    log w = clamp(sum_t clamp(l_t, -20, 20) + log u, log 1e-8, 20), log u the sampler's correction, once for
    every token or once for the sequence, itself clamped to these bounds.
    """

    def surrogate(s: int) -> tuple[Tensor, Tensor]:
        log_ratio, adv = _log_ratio(x, s), _advantage(x, s)
        log_w = x.sum(log_ratio.clamp(-20, 20), s)
        if sampler_correction is not None:
            u = _sampler_weight(x, s, sampler_correction, sampler_max, sampler_min)
            log_u = torch.as_tensor(u).log().clamp(math.log(1e-8), 20)
            log_w = log_w + (log_u if log_u.dim() == 0 else x.sum(log_u, s))
        log_w = log_w.clamp(math.log(1e-8), 20)
        k = torch.where(adv >= 0, log_w.new_tensor(k_pos), k_neg)
        lam = torch.where(adv >= 0, log_w.new_tensor(lam_pos), lam_neg)
        phi = torch.exp(lam + k * log_w - lam * torch.exp(log_w)).detach()
        return -phi * adv * _logp(x, s), _ratio(log_ratio)

    plain = {"sampler_correction": None, "sampler_max": sampler_max, "sampler_min": sampler_min}
    return _policy(x, surrogate, **plain, **shared)


def reinforce(x: Tokens, **shared) -> Tensor:
    """-A log pi   (Williams, 1992)."""

    def surrogate(s: int) -> tuple[Tensor, Tensor]:
        return -_advantage(x, s) * x.live(x.logp, s), _ratio(_log_ratio(x, s))

    return _policy(x, surrogate, **shared)


def hybrid_policy(
    x: Tokens,
    *,
    eps_low: float,
    eps_high: float,
    edit_low: float | None,
    edit_high: float | None,
    **shared,
) -> Tensor:
    """PPO's; edited rows: -clip(rho, 1-edit_low, 1+edit_high) A, no min   (arXiv 2510.18849)."""
    low = -math.inf if edit_low is None else 1 - edit_low
    high = math.inf if edit_high is None else 1 + edit_high

    def surrogate(s: int) -> tuple[Tensor, Tensor]:
        assert x.off_policy is not None
        rho, adv = _ratio(_log_ratio(x, s)), _advantage(x, s)
        if x.off_policy[s]:
            return -rho.clamp(low, high) * adv, rho
        return _clipped(rho, adv, eps_low, eps_high), rho

    return _policy(x, surrogate, **shared)


# --- ratios of sequences ---


def gspo(x: Tokens, *, eps_low: float, eps_high: float, level: str = "sequence", **shared) -> Tensor:
    """PPO's with rho_s = exp(mean_t l_t); level token: sg[rho_s] pi / sg[pi]   (arXiv 2507.18071)."""

    def surrogate(s: int) -> tuple[Tensor, Tensor]:
        log_ratio = _log_ratio(x, s)
        rho = _ratio(x.token_mean(log_ratio, s))
        if level == "token":
            rho = rho.detach() * torch.exp(log_ratio - log_ratio.detach())
        return _clipped(rho, _advantage(x, s), eps_low, eps_high), rho

    return _policy(x, surrogate, **shared)


def gmpo(x: Tokens, *, eps: float, **shared) -> Tensor:
    """-rho_s A, rho_s = exp(mean of min(l, clamp(l, -eps, eps)), max where A <= 0)   (arXiv 2507.20673)."""

    def surrogate(s: int) -> tuple[Tensor, Tensor]:
        log_ratio, adv = _log_ratio(x, s), _advantage(x, s)
        clipped = log_ratio.clamp(-eps, eps)
        least, most = torch.minimum(log_ratio, clipped), torch.maximum(log_ratio, clipped)
        rho = _ratio(x.token_mean(torch.where(adv > 0, least, most), s))
        return -rho * adv, _ratio(x.token_mean(log_ratio, s))  # the KL is corrected by the unclipped ratio

    return _policy(x, surrogate, **shared)


def rloo(x: Tokens, *, eps_low: float, eps_high: float, **shared) -> Tensor:
    """PPO's with rho_s = exp(sum_t l_t)   (arXiv 2402.14740)."""

    def surrogate(s: int) -> tuple[Tensor, Tensor]:
        rho = _ratio(x.sum(_log_ratio(x, s), s))
        return _clipped(rho, _advantage(x, s), eps_low, eps_high), rho

    return _policy(x, surrogate, **shared)


# --- groups ---


def grao(x: Tokens, *, beta: float, lam: float) -> Tensor:
    """-(1/G) sum_i (1+lam) A_i J(o_i) - sum_y [beta A_y - lam mean_i A_i] J(y), J = mean_t log pi.

    Over the G samples o_i and the reference answers y of a group; the mean over groups   (arXiv 2508.07750).
    """
    assert x.advantage is not None and x.group is not None and x.reference is not None
    a, j = x.advantage, [x.token_mean(x.live(x.logp, s), s) for s in x.rows]
    groups = sorted(set(x.group.tolist()))
    items = []
    for g in groups:
        samples = [s for s in x.rows if x.group[s] == g and not x.reference[s]]
        answers = [s for s in x.rows if x.group[s] == g and x.reference[s]]
        mean = sum(float(a[i]) for i in samples) / max(len(samples), 1)
        for i in samples:
            items.append(-(1 + lam) * a[i] * j[i] / len(samples))
        for y in answers:
            items.append(-(beta * a[y] - lam * mean) * j[y])
    return x.mean(items, "groups", len(groups))
