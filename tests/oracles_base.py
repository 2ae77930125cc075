"""What the oracles share: the language-model head through dense logits, and a padded batch of tokens.

Nothing of fused_align is imported here; see oracles.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot

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


# --- a batch ---


@dataclass
class Tokens:
    """A padded batch of log-probabilities and what the losses read besides them."""

    logp: Tensor  # [S, T]
    mask: Tensor  # [S, T] bool, True at live tokens
    old_logp: Tensor | None = None  # [S, T]
    ref_logp: Tensor | None = None  # [S, T]
    sampler_logp: Tensor | None = None  # [S, T]
    advantage: Tensor | None = None  # [S] or [S, T]
    token_weight: Tensor | None = None  # [S, T]
    margin: Tensor | None = None  # [P]
    desirable: Tensor | None = None  # [S] bool
    kl: Tensor | float | None = None  # []
    off_policy: Tensor | None = None  # [S] bool
    reference: Tensor | None = None  # [S] bool
    group: Tensor | None = None  # [S] int64
    humanline: tuple[float, float] | None = None  # log eps_P, log eps_R
    normalizer: float | dict[str, float] | None = None  # of every unit, or one for each
    logits: Tensor | None = None  # [S, T, V]
    kept: list[int] | None = None  # BetaDPO: the pairs that were drawn, all of them if None
    state: tuple[float, float] | None = None  # BetaDPO: M0 and sigma; BCO: sum of beta L, and their number

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

    def sum(self, x: Tensor, s: int) -> Tensor:
        """sum_t w_t x_t over the live tokens of sequence s, x [n], []."""
        return (self.weight(s) * x).sum()

    def token_mean(self, x: Tensor, s: int) -> Tensor:
        """The same divided by their number; 0 for a sequence without any."""
        return self.sum(x, s) / max(self.length(s), 1)

    def mean(self, items: list[Tensor], unit: str, count: int) -> Tensor:
        """The sum of the items over the normalizer or their own count; a batch of nothing costs nothing."""
        total = torch.stack(items).sum() if items else self.logp.sum() * 0
        if self.normalizer is None:
            return total / max(count, 1)
        return total / (self.normalizer[unit] if isinstance(self.normalizer, dict) else self.normalizer)
