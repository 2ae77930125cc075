"""The losses of pairs (sequence i chosen, i + S/2 rejected) and of judged single sequences; see oracles.py.

l_t = log pi(y_t) - log ref(y_t), clipped by Humanline;   L(y) = sum_t w_t l_t;   D = L(y_w) - L(y_l).
"""

from __future__ import annotations

import math

import torch
from oracles_base import Tokens
from torch import Tensor
from torch.nn.functional import logsigmoid

# --- pairs ---


def pairs(x: Tokens) -> list[tuple[int, int]]:
    half = len(x.rows) // 2
    return [(i, i + half) for i in range(half)]


def _ratios(x: Tokens, s: int) -> Tensor:
    """l_t against the reference, [n]."""
    assert x.ref_logp is not None
    return x.log_ratio(x.ref_logp, s)


def ratio_sum(x: Tokens, s: int) -> Tensor:
    """L(y) = sum_t w_t l_t."""
    return x.sum(_ratios(x, s), s)


def ratio_mean(x: Tokens, s: int) -> Tensor:
    """L(y) / n."""
    return x.token_mean(_ratios(x, s), s)


def ratio_sums(x: Tokens) -> list[tuple[Tensor, Tensor]]:
    """L_w, L_l of every pair."""
    return [(ratio_sum(x, chosen), ratio_sum(x, rejected)) for chosen, rejected in pairs(x)]


def margins(x: Tokens) -> list[Tensor]:
    """D of every pair."""
    return [win - lose for win, lose in ratio_sums(x)]


def _smooth(d: Tensor, e: float) -> Tensor:
    """-(1-e) log s(d) - e log s(-d)."""
    return -(1 - e) * logsigmoid(d) - e * logsigmoid(-d)


def _divergence(ratio: Tensor, kind: str, a: float) -> Tensor:
    """g(L), the transform of a log-ratio that an f-divergence asks for   (arXiv 2309.16240)."""
    if kind == "forward_kl":
        return 1 - torch.exp((-ratio).clamp(max=60))
    if kind == "js":
        return math.log(2) + logsigmoid(ratio)
    if kind == "alpha" and a != 1:
        return (torch.exp(((a - 1) * ratio).clamp(max=60)) - 1) / (a - 1)
    return ratio


def _wpo_weight(x: Tokens, s: int) -> Tensor:
    """w(y) = exp(mean_t [log pi(y_t) - log sum_v pi(v)^2]), no gradient   (arXiv 2406.11827)."""
    assert x.logits is not None
    log_p = torch.log_softmax(x.live(x.logits, s), -1)
    squares = torch.logsumexp(2 * log_p, -1)
    return torch.exp(x.token_mean(x.live(x.logp, s) - squares, s)).detach()


def dpo(
    x: Tokens,
    *,
    beta: float,
    label_smoothing: float,
    robust: bool,
    f_divergence: str,
    f_alpha: float,
    ld_alpha: float,
    wpo: bool,
) -> Tensor:
    """-(1-e) log s(beta D) - e log s(-beta D), D = g(L_w) - g(L_l)   (arXiv 2305.18290; cDPO).

    robust: [-(1-e) log s(beta D) + e log s(-beta D)] / (1-2e)   (arXiv 2403.00409)
    ld_alpha: L = sum over the first min(n_w, n_l) tokens + alpha * the rest   (arXiv 2409.06411)
    """
    items = []
    for chosen, rejected in pairs(x):
        shared = min(x.length(chosen), x.length(rejected))
        side = []
        for s in (chosen, rejected):
            ratio = x.weight(s) * _ratios(x, s)
            total = ratio[:shared].sum() + ld_alpha * ratio[shared:].sum()
            side.append(_divergence(total, f_divergence, f_alpha))
        d = side[0] - side[1]
        e = label_smoothing
        item = _smooth(beta * d, e)
        if robust:
            item = (-(1 - e) * logsigmoid(beta * d) + e * logsigmoid(-beta * d)) / (1 - 2 * e)
        if wpo:
            item = _wpo_weight(x, chosen) * _wpo_weight(x, rejected) * item
        items.append(item)
    return x.mean(items, "pairs", len(items))


def ipo(x: Tokens, *, tau: float, normalize: bool) -> Tensor:
    """(L_w/n_w - L_l/n_l - 1/(2 tau))^2, or the same with plain sums   (arXiv 2310.12036)."""
    items = []
    for chosen, rejected in pairs(x):
        side = []
        for s in (chosen, rejected):
            side.append(ratio_mean(x, s) if normalize else ratio_sum(x, s))
        items.append((side[0] - side[1] - 1 / (2 * tau)) ** 2)
    return x.mean(items, "pairs", len(items))


def hinge(x: Tokens, *, beta: float) -> Tensor:
    """relu(1 - beta D)   (arXiv 2305.10425)."""
    items = [torch.relu(1 - beta * d) for d in margins(x)]
    return x.mean(items, "pairs", len(items))


def sigmoid_norm(x: Tokens, *, beta: float) -> Tensor:
    """-log s(beta (L_w/n_w - L_l/n_l))."""
    items = [-logsigmoid(beta * (ratio_mean(x, win) - ratio_mean(x, lose))) for win, lose in pairs(x)]
    return x.mean(items, "pairs", len(items))


def exo(x: Tokens, *, beta: float, eps: float) -> Tensor:
    """q = s(beta D):  q (log q - log(1-e)) + (1-q) (log(1-q) - log e)   (arXiv 2402.00856)."""
    items = []
    for d in margins(x):
        q, log_q, log_not_q = torch.sigmoid(beta * d), logsigmoid(beta * d), logsigmoid(-beta * d)
        items.append(q * (log_q - math.log(1 - eps)) + torch.sigmoid(-beta * d) * (log_not_q - math.log(eps)))
    return x.mean(items, "pairs", len(items))


def nca(x: Tokens, *, beta: float) -> Tensor:
    """-log s(beta L_w) - .5 log s(-beta L_w) - .5 log s(-beta L_l)   (arXiv 2402.05369)."""
    items = []
    for win, lose in ratio_sums(x):
        item = -logsigmoid(beta * win) - 0.5 * logsigmoid(-beta * win) - 0.5 * logsigmoid(-beta * lose)
        items.append(item)
    return x.mean(items, "pairs", len(items))


def bco_pair(x: Tokens, *, beta: float) -> Tensor:
    """-log s(beta L_w) - log s(-beta L_l)   (arXiv 2404.04656)."""
    items = [-logsigmoid(beta * win) - logsigmoid(-beta * lose) for win, lose in ratio_sums(x)]
    return x.mean(items, "pairs", len(items))


def sppo_hard(x: Tokens, *, beta: float) -> Tensor:
    """(L_w - 1/(2 beta))^2 + (L_l + 1/(2 beta))^2   (arXiv 2405.00675)."""
    target = 1 / (2 * beta)
    items = [(win - target) ** 2 + (lose + target) ** 2 for win, lose in ratio_sums(x)]
    return x.mean(items, "pairs", len(items))


def apo_zero(x: Tokens, *, beta: float) -> Tensor:
    """1 - s(beta L_w) + s(beta L_l)   (arXiv 2408.06266)."""
    items = [1 - torch.sigmoid(beta * win) + torch.sigmoid(beta * lose) for win, lose in ratio_sums(x)]
    return x.mean(items, "pairs", len(items))


def apo_down(x: Tokens, *, beta: float) -> Tensor:
    """s(beta L_w) + 1 - s(beta D)   (arXiv 2408.06266)."""
    items = []
    for win, lose in ratio_sums(x):
        items.append(torch.sigmoid(beta * win) + 1 - torch.sigmoid(beta * (win - lose)))
    return x.mean(items, "pairs", len(items))


def disco_pop(x: Tokens, *, beta: float, tau: float) -> Tensor:
    """u = beta D, m = s(u / tau):  (1-m) (-log s(u)) + m exp(-u)   (arXiv 2406.08414)."""
    items = []
    for d in margins(x):
        u = beta * d
        m = torch.sigmoid(u / tau)
        items.append((1 - m) * -logsigmoid(u) + torch.exp(logsigmoid(u / tau) - u))  # m exp(-u), as one power
    return x.mean(items, "pairs", len(items))


def dpop(x: Tokens, *, beta: float, lam: float) -> Tensor:
    """-log s(beta (D - lam max(0, log ref(y_w) - log pi(y_w))))   (arXiv 2402.13228)."""
    items = [-logsigmoid(beta * (win - lose - lam * torch.relu(-win))) for win, lose in ratio_sums(x)]
    return x.mean(items, "pairs", len(items))


def madpo(x: Tokens, *, beta: float, c_max: float, lam: float, tau: float) -> Tensor:
    """-w(h) log s(beta D);  w(h) = s(c(|h|) h) / s(h) for h > -tau, else 1;  h the reward model's margin.

    c(z) = c_min + (c_max - c_min) / (1 + (c_max - 1)/(1 - c_min) exp(lam (z - tau))),  c_min = 1 / c_max
    """
    assert x.margin is not None
    c_min = 1 / c_max
    items = []
    for d, h in zip(margins(x), x.margin, strict=True):
        c = c_min + (c_max - c_min) / (1 + (c_max - 1) / (1 - c_min) * torch.exp(lam * (h.abs() - tau)))
        w = torch.exp(logsigmoid(c * h) - logsigmoid(h)) if h > -tau else 1
        items.append(-w * logsigmoid(beta * d))
    return x.mean(items, "pairs", len(items))


def _sorted(x: list[Tensor]) -> list[Tensor]:
    return sorted(x, key=lambda value: float(value.detach()))


def aot(x: Tokens, *, beta: float, label_smoothing: float, paired: bool) -> Tensor:
    """-(1-e) log s(beta d) - e log s(-beta d), d the difference of sorted sides   (arXiv 2406.05882).

    paired:    sort(log pi_w - log pi_l) - sort(log ref_w - log ref_l), log pi being log ref + L
    unpaired:  sort(L_w) - sort(L_l)
    """
    assert x.ref_logp is not None
    first, second = [], []
    for chosen, rejected in pairs(x):
        ratio = [ratio_sum(x, s) for s in (chosen, rejected)]
        ref = [x.sum(x.live(x.ref_logp, s), s) for s in (chosen, rejected)]
        first.append((ref[0] + ratio[0]) - (ref[1] + ratio[1]) if paired else ratio[0])
        second.append(ref[0] - ref[1] if paired else ratio[1])
    sides = zip(_sorted(first), _sorted(second), strict=True)
    items = [_smooth(beta * (one - other), label_smoothing) for one, other in sides]
    return x.mean(items, "pairs", len(items))


def beta_dpo(x: Tokens, *, beta: float, a: float, keep: float, ema: float, seed: int) -> Tensor:
    """-log s(beta_b D) over the kept pairs;  beta_b = max(beta (1 + a (mean_kept(M) - M0)), 1e-3), M = sg[D].

    M0 is the state before this batch, in the first one the batch's own mean   (arXiv 2407.08639).
    """
    d = margins(x)
    m = [float(di.detach()) for di in d]
    kept = range(len(d)) if x.kept is None else x.kept
    m0 = sum(m) / max(len(m), 1) if x.state is None else x.state[0]
    mean_kept = sum(m[i] for i in kept) / max(len(kept), 1)
    beta_b = max(beta * (1 + a * (mean_kept - m0)), 1e-3)
    items = [-logsigmoid(beta_b * d[i]) / len(kept) * len(d) for i in kept]
    return x.mean(items, "pairs", len(d))


# --- pairs, without a reference ---


def _mean_logp(x: Tokens, s: int) -> Tensor:
    """m = mean_t log pi."""
    return x.token_mean(x.live(x.logp, s), s)


def _alpha_reward(x: Tokens, s: int, a: float) -> Tensor:
    """(1 - p^-a) / a, p = exp(m)   (AlphaPO, arXiv 2501.03884)."""
    return (1 - torch.exp((-a * _mean_logp(x, s)).clamp(max=60))) / a


def _chosen_nll(x: Tokens) -> Tensor:
    """-log pi(y_t), the mean over the tokens of the chosen sequences."""
    chosen = [w for w, _ in pairs(x)]
    items = [-x.sum(x.live(x.logp, s), s) for s in chosen]
    return x.mean(items, "tokens", sum(x.length(s) for s in chosen))


def simpo(x: Tokens, *, beta: float, gamma: float, alphapo: float) -> Tensor:
    """-log s(beta (m_w - m_l) - gamma)   (arXiv 2405.14734)."""
    items = []
    for pair in pairs(x):
        win, lose = (_alpha_reward(x, s, alphapo) if alphapo else _mean_logp(x, s) for s in pair)
        items.append(-logsigmoid(beta * (win - lose) - gamma))
    return x.mean(items, "pairs", len(items))


def cpo(x: Tokens, *, beta: float, alpha: float, label_smoothing: float, alphapo: float) -> Tensor:
    """-log s(beta (sum log pi_w - sum log pi_l)), smoothed, + alpha NLL(y_w)   (arXiv 2401.08417)."""
    items = []
    for pair in pairs(x):
        win, lose = (_alpha_reward(x, s, alphapo) if alphapo else x.sum(x.live(x.logp, s), s) for s in pair)
        items.append(_smooth(beta * (win - lose), label_smoothing))
    return x.mean(items, "pairs", len(items)) + (alpha * _chosen_nll(x) if alpha else 0)


def orpo(x: Tokens, *, lam: float) -> Tensor:
    """NLL(y_w) - lam log s(log odds_w - log odds_l),  log odds = m - log(1 - e^m)   (arXiv 2403.07691)."""
    items = []
    for pair in pairs(x):
        side = []
        for s in pair:
            m = _mean_logp(x, s).clamp(max=-1e-7)
            side.append(m - torch.log(-torch.expm1(m)))
        items.append(-logsigmoid(side[0] - side[1]))
    return _chosen_nll(x) + lam * x.mean(items, "pairs", len(items))


# --- single sequences ---


def kto(x: Tokens, *, beta: float, desirable_weight: float, undesirable_weight: float) -> Tensor:
    """w_D (1 - s(beta (L - z0))) desirable, w_U (1 - s(beta (z0 - L))) undesirable   (arXiv 2402.01306)."""
    assert x.desirable is not None and x.kl is not None
    items = []
    for s in x.rows:
        ratio = ratio_sum(x, s)
        if x.desirable[s]:
            items.append(desirable_weight * (1 - torch.sigmoid(beta * (ratio - x.kl))))
        else:
            items.append(undesirable_weight * (1 - torch.sigmoid(beta * (x.kl - ratio))))
    return x.mean(items, "sequences", len(items))


def kto_kl(x: Tokens) -> Tensor:
    """z0 = max(0, mean over the non-empty sequences of L)."""
    sums = [ratio_sum(x, s) for s in x.rows if x.length(s) > 0]
    return x.mean(sums, "sequences", len(sums)).clamp(min=0)


def apo_zero_unpaired(x: Tokens, *, beta: float) -> Tensor:
    """1 - s(beta L) desirable, s(beta L) undesirable   (arXiv 2408.06266)."""
    assert x.desirable is not None
    items = []
    for s in x.rows:
        good = torch.sigmoid(beta * ratio_sum(x, s))
        items.append(1 - good if x.desirable[s] else good)
    return x.mean(items, "sequences", len(items))


def bco(x: Tokens, *, beta: float) -> Tensor:
    """-log s(beta L - delta) desirable, -log s(-(beta L - delta)) undesirable   (arXiv 2404.04656).

    delta: the mean of sg[beta L] over all sequences seen so far, these included.
    """
    assert x.desirable is not None
    total, count = x.state or (0.0, 0.0)
    rewards = [beta * ratio_sum(x, s) for s in x.rows]
    delta = (total + sum(float(r.detach()) for r in rewards)) / max(count + len(rewards), 1)
    items = []
    for s in x.rows:
        items.append(-logsigmoid(rewards[s] - delta if x.desirable[s] else delta - rewards[s]))
    return x.mean(items, "sequences", len(items))
