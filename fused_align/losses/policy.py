"""Policy-gradient losses: items per token, made of a surrogate of its own, masks, a KL penalty and a bonus.

Notation: l_t = log pi - log old, clipped by Humanline if that is on; rho = exp(l_t); A the advantage; sg[] no
gradient. n the live tokens of a sequence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..batch import Batch
from ..humanline import RatioClip
from .base import Loss, coarsest

MAX_LOG_RATIO = 60.0  # e^60 is finite in float32; above it there is no gradient
MAX_ITEM = 1e30  # of rho * KL and of u * surrogate, whose factors may reach e^60 each

AGGREGATIONS = ("seq_mean_token_mean", "token_mean", "constant", "seq_mean_token_sum")
CORRECTIONS = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


@dataclass(frozen=True, kw_only=True)
class PolicyLoss(Loss, base=True):
    """Base of the policy-gradient losses, and what all of them can do (keyword-only fields):

        item_t = m_t u_t k_s surrogate_t + beta KL_t - entropy_coef m_t entropy_t

    beta, kl, kl_correction: penalty KL(pi || ref) of the unclipped log-probs, d = log ref - log pi: "k3"
        exp(d) - d - 1, "k1" -d, "k2" d^2/2; times rho with `kl_correction`.
    aggregation: "seq_mean_token_mean" (normalizer counts sequences) | "token_mean" (tokens) | "constant" (sum
        / max_length; sequences) | "seq_mean_token_sum" (sequences).
    sampler_correction: u = exp(log old - log sampler), the trainer's arithmetic over the sampler's, per token
        or of a sequence's sum; "..._truncate" clamps it to [sampler_min, sampler_max], "..._mask" makes it 0
        outside. Needs batch.sampler_logp.
    off_policy_threshold: k = 1 iff A >= 0 or mean_t(log sampler - log pi) is at most this (nats), else 0;
        without batch.sampler_logp, old_logp.
    top_entropy: m = 1 for this share of the batch's tokens, those of highest entropy, else 0. Counts stay.
    entropy_coef: bonus.

    Sources: PPO arXiv 1707.06347; KL estimators, J. Schulman, "Approximating KL divergence", 2020; its
    correction and the off-policy mask, DeepSeek-V3.2 arXiv 2512.02556, equations 7 and 9; top entropy arXiv
    2506.01939; truncated importance sampling, F. Yao et al., "Your efficient RL framework secretly brings you
    off-policy RL training", 2025.
    """

    beta: float = 0.0
    kl: str = "k3"
    kl_correction: bool = False
    aggregation: str = "seq_mean_token_mean"
    max_length: int | None = None
    sampler_correction: str | None = None
    sampler_max: float | None = 3.0
    sampler_min: float | None = None
    off_policy_threshold: float | None = None
    top_entropy: float = 1.0
    entropy_coef: float = 0.0

    per = "token"
    anchor = "old"
    rows = "group"  # type: ignore[assignment]
    coupled: ClassVar[str] = "token"  # by the surrogate
    folds_sampler: ClassVar[bool] = False  # whether the surrogate takes the sampler's correction in itself

    def __post_init__(self) -> None:
        self._check("kl", self.kl in ("k1", "k2", "k3"), '"k1", "k2" or "k3"')
        self._check("aggregation", self.aggregation in AGGREGATIONS, f"one of {list(AGGREGATIONS)}")
        if self.aggregation == "constant" and not self.max_length:
            raise ValueError(
                f'{self.name}: aggregation="constant" divides by max_length, the longest completion allowed; '
                f"got {self.max_length}."
            )
        known = self.sampler_correction is None or self.sampler_correction in CORRECTIONS
        self._check("sampler_correction", known, f"None or one of {list(CORRECTIONS)}")
        self._check("top_entropy", 0 < self.top_entropy <= 1, "a share of the tokens, in (0, 1]")
        low, high = self.sampler_min, self.sampler_max
        fits = (low is None or low >= 0) and (high is None or high > (low or 0))
        self._check("sampler_max", fits, "above sampler_min, and both at least 0 (or None: no bound)")

    def _check(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ValueError(f"{self.name}: {name} must be {expected}; got {getattr(self, name)!r}.")

    # ---- what a loss of this family defines ----

    def surrogate(self, logp: Tensor, log_ratio: Tensor, advantage: Tensor, batch: Batch) -> Tensor:  # [n]
        raise NotImplementedError(f"{self.name} must define surrogate(logp, log_ratio, advantage, batch).")

    def ratio(self, log_ratio: Tensor, batch: Batch) -> Tensor:  # [n] -> [n]
        """The importance ratio of each token, finite for any input."""
        return finite_exp(log_ratio)

    def clips(self, log_ratio: Tensor, advantage: Tensor, batch: Batch) -> tuple[Tensor, Tensor] | None:
        """[n] bool each: tokens beyond the clip's lower and upper bound; None: there is no clip."""
        return None

    # ---- what the planner and the trainer ask ----

    @property
    def item(self) -> str:  # type: ignore[override]
        whole = "sequence" in (self.sampler_correction or "") or self.off_policy_threshold is not None
        return coarsest(
            [self.coupled, "sequence" if whole else "token", "batch" if self.top_entropy < 1 else "token"]
        )

    @property
    def unit(self) -> str:
        return "tokens" if self.aggregation == "token_mean" else "sequences"

    @property
    def needs_ref(self) -> bool:
        return self.beta != 0

    @property
    def reads(self) -> tuple[str, ...]:
        return ("entropy",) if self.entropy_coef or self.top_entropy < 1 else ()

    @property
    def learnt(self) -> tuple[str, ...]:
        return ("entropy",) if self.entropy_coef else ()

    def sparse(self, humanline: RatioClip | None) -> bool:
        return self.beta == 0 and not self.entropy_coef

    def plain(self) -> PolicyLoss:
        return replace(self, entropy_coef=0.0, top_entropy=1.0)

    # ---- the loss ----

    def weights(self, batch: Batch) -> Tensor:
        weights = super().weights(batch)
        if self.aggregation == "seq_mean_token_mean":
            return weights / batch.spread(batch.lengths)
        return weights / self.max_length if self.aggregation == "constant" and self.max_length else weights

    def items(self, logp: Tensor, log_ratio: Tensor, batch: Batch) -> Tensor:
        advantage = batch.token_advantage(self.name).to(logp.dtype)
        items = self.surrogate(logp, log_ratio, advantage, batch)
        if self.sampler_correction and not self.folds_sampler:
            items = (items * self.correction(logp, batch).exp()).clamp(-MAX_ITEM, MAX_ITEM)
        if self.off_policy_threshold is not None:
            near = self._on_policy(self.off_policy_threshold, logp, advantage, batch)
            items = torch.where(near, items, 0.0)
        if self.entropy_coef:
            items = items - self.entropy_coef * batch.stat("entropy", self.name)
        if self.top_entropy < 1:
            items = torch.where(self._uncertain(batch), items, 0.0)
        if self.beta != 0:
            kl = self.penalty(logp, batch)
            if self.kl_correction:
                kl = (self.ratio(log_ratio, batch) * kl).clamp(max=MAX_ITEM)
            items = items + self.beta * kl
        return items

    def penalty(self, logp: Tensor, batch: Batch) -> Tensor:
        """[n] estimates of KL(pi || ref), nats."""
        d = batch.need("ref_logp", f"{self.name}'s KL penalty").to(logp.dtype) - logp
        if self.kl == "k1":
            return -d
        if self.kl == "k2":
            return d.square() / 2
        d = d.clamp(max=MAX_LOG_RATIO)
        return finite_expm1(d) - d  # near the reference e^d - d - 1 would be all rounding

    def correction(self, logp: Tensor, batch: Batch) -> Tensor:
        """[n] log of what corrects for the sampler; -inf where it is masked."""
        sampler = batch.need("sampler_logp", f"{self.name}(sampler_correction=...)").to(logp.dtype)
        old = logp.detach() if batch.old_logp is None else batch.old_logp.to(logp.dtype)
        level, how = str(self.sampler_correction).split("_")
        log = old - sampler
        if level == "sequence":
            log = batch.spread(batch.sum(log, weighted=False))
        low = math.log(self.sampler_min) if self.sampler_min else -math.inf
        high = math.inf if self.sampler_max is None else math.log(self.sampler_max)
        if how == "truncate":
            log = log.clamp(low, high)
        else:
            log = torch.where((log >= low) & (log <= high), log, -math.inf)
        return log.clamp(max=MAX_LOG_RATIO)

    def _on_policy(self, most: float, logp: Tensor, advantage: Tensor, batch: Batch) -> Tensor:  # [n] bool
        sampler = batch.old_logp if batch.sampler_logp is None else batch.sampler_logp
        away = torch.zeros_like(logp) if sampler is None else sampler.to(logp.dtype) - logp.detach()
        near = batch.mean(away, weighted=False) <= most
        return (advantage >= 0) | batch.spread(near).bool()

    def _uncertain(self, batch: Batch) -> Tensor:  # -> [n] bool
        entropy = batch.stat("entropy", self.name).detach()
        if not entropy.numel():
            return entropy.bool()
        among = entropy if batch.valid is None else torch.where(batch.valid, entropy, math.nan)
        return entropy >= torch.nanquantile(among, 1 - self.top_entropy)

    def metrics(self, logp: Tensor, log_ratio: Tensor, batch: Batch) -> dict[str, Tensor]:
        found = {}
        clips = self.clips(log_ratio, batch.token_advantage(self.name), batch)
        if clips is not None:
            for name, clipped in zip(("low", "high", "region"), (*clips, clips[0] | clips[1]), strict=True):
                found[f"clip_ratio/{name}_mean"] = batch.token_mean(clipped.to(logp.dtype))
        if batch.ref_logp is not None:
            found["kl"] = batch.token_mean(self.penalty(logp, batch))
        return found


def finite_exp(x: Tensor) -> Tensor:
    """exp(min(x, 60)): finite in float32, without gradient above."""
    return x.clamp(max=MAX_LOG_RATIO).exp()


def finite_expm1(x: Tensor) -> Tensor:
    """`finite_exp` less 1, with its digits where x is near 0."""
    return x.clamp(max=MAX_LOG_RATIO).expm1()
