"""Policy-gradient losses: items per token, made of a surrogate of its own, masks, a KL penalty and a bonus.

Notation: l_t = log pi - log old, clipped by Humanline if that is on; rho = exp(l_t); A the advantage; sg[] no
gradient. n the live tokens of a sequence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..batch import Batch
from ..humanline import RatioClip
from .base import Loss, coarsest

MAX_LOG_RATIO = 60.0  # e^60 is finite in float32; above it there is no gradient
MAX_ITEM = 1e30  # of rho * KL, whose factors may reach e^60 each
SMALLEST = math.log(1e-8)  # of VESPO's log w

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
    correction and the off-policy mask, DeepSeek-V3.2 arXiv 2512.02556; top entropy arXiv 2506.01939;
    truncated importance sampling, F. Yao et al., "Your efficient RL framework secretly brings you off-policy
    RL training", 2025.
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
    coupled: ClassVar[str] = "token"  # by the surrogate

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
        """[n] bool each: tokens whose gradient is clipped away below, and above; None: there is no clip."""
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
            items = items * self.correction(logp, batch).exp()
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
        return torch.expm1(d) - d  # near the reference e^d - d - 1 would be all rounding

    folds_sampler: ClassVar[bool] = False  # whether the surrogate takes the sampler's correction in itself

    def correction(self, logp: Tensor, batch: Batch) -> Tensor:
        """[n] log of what corrects for the sampler; -inf where it is masked."""
        sampler = batch.need("sampler_logp", f"{self.name}(sampler_correction=...)").to(logp.dtype)
        old = logp.detach() if batch.old_logp is None else batch.old_logp.to(logp.dtype)
        level, how = str(self.sampler_correction).split("_")
        log = old - sampler
        if level == "sequence":
            log = batch.spread(batch.sum(log, weighted=False))
        low = math.log(self.sampler_min) if self.sampler_min else -math.inf
        high = MAX_LOG_RATIO if self.sampler_max is None else math.log(self.sampler_max)
        if how == "truncate":
            return log.clamp(low, high)
        return torch.where((log >= low) & (log <= high), log, -math.inf)

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


def clipped_surrogate(ratio: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    """-min(rho A, clip(rho, 1 - low, 1 + high) A)."""
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def either(condition: Tensor, this: float, other: float, like: Tensor) -> Tensor:
    """One number or the other, in the dtype of `like`: torch.where of two numbers would round to float32."""
    return torch.where(condition, like.new_tensor(this), like.new_tensor(other))


def gated(logp: Tensor, log_ratio: Tensor) -> Tensor:
    """logp, with a gradient only where the log-ratio has one: none for tokens that Humanline clips."""
    return logp.detach() + (log_ratio - log_ratio.detach())


@dataclass(frozen=True)
class _Clipped(PolicyLoss, base=True):
    """Base of the losses with PPO's clip: -min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A)."""

    eps_low: float = 0.2
    eps_high: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("eps_low", self.eps_low >= 0, "0 or more: the ratio is clipped below 1 - eps_low")
        self._check("eps_high", self.eps_high >= 0, "0 or more: the ratio is clipped above 1 + eps_high")

    def surrogate(self, logp: Tensor, log_ratio: Tensor, advantage: Tensor, batch: Batch) -> Tensor:
        return clipped_surrogate(self.ratio(log_ratio, batch), advantage, self.eps_low, self.eps_high)

    def clips(self, log_ratio: Tensor, advantage: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        ratio = self.ratio(log_ratio, batch)
        return (ratio < 1 - self.eps_low) & (advantage < 0), (ratio > 1 + self.eps_high) & (advantage > 0)


@dataclass(frozen=True)
class GRPO(_Clipped):
    """Group-relative policy optimisation, and DAPO, BNPO and Dr. GRPO as presets:

        -min( min(rho, delta) A, clip(rho, 1-eps_low, 1+eps_high) A )

    delta (above 1 + eps_high) bounds rho where A < 0 (two-sided clip). Fields of `PolicyLoss` besides.
    Sources: arXiv 2402.03300 equation 3; DAPO arXiv 2503.14476; Dr. GRPO arXiv 2503.20783; two-sided arXiv
    2505.07291.

    >>> import torch, fused_align as fa
    >>> batch = fa.Batch(torch.tensor([[1, 2]]), advantage=torch.tensor([2.0])).live()
    >>> fa.GRPO().items(torch.zeros(2), torch.tensor([0.0, 1.0]), batch)
    tensor([-2.0000, -2.4000])
    """

    delta: float | None = None

    paper = "2402.03300"

    def __post_init__(self) -> None:
        super().__post_init__()
        fits = self.delta is None or self.delta > 1 + self.eps_high
        self._check("delta", fits, f"above 1 + eps_high = {1 + self.eps_high}, or None")

    @classmethod
    def dapo(cls, eps_high: float = 0.28, **fields: Any) -> GRPO:
        """Decoupled clip and the mean over all tokens of the step (pass their number as normalizer)."""
        return cls(eps_high=eps_high, aggregation="token_mean", **fields)

    @classmethod
    def bnpo(cls, **fields: Any) -> GRPO:
        """The mean over the tokens of each batch (without a normalizer)."""
        return cls(aggregation="token_mean", **fields)

    @classmethod
    def dr_grpo(cls, max_length: int, **fields: Any) -> GRPO:
        """No length bias: every sequence's sum is divided by the same max_length."""
        return cls(aggregation="constant", max_length=max_length, **fields)

    def surrogate(self, logp: Tensor, log_ratio: Tensor, advantage: Tensor, batch: Batch) -> Tensor:
        if self.delta is None:
            return super().surrogate(logp, log_ratio, advantage, batch)
        ratio = self.ratio(log_ratio, batch)
        clipped = ratio.clamp(1 - self.eps_low, 1 + self.eps_high) * advantage
        return -torch.minimum(ratio.clamp(max=self.delta) * advantage, clipped)


@dataclass(frozen=True)
class PPO(GRPO):
    """PPO's clipped surrogate: `GRPO` with the mean over all tokens. Source: arXiv 1707.06347, equation 7.

    >>> import torch, fused_align as fa
    >>> batch = fa.Batch(torch.tensor([[1, 2]]), advantage=torch.tensor([-1.0])).live()
    >>> fa.PPO(eps_low=0.5).items(torch.zeros(2), torch.tensor([0.5, -1.0]).log1p(), batch)
    tensor([1.5000, 0.5000])
    """

    aggregation: str = field(default="token_mean", kw_only=True)

    paper = "1707.06347"


@dataclass(frozen=True)
class GSPO(_Clipped):
    """Group sequence policy optimisation: `GRPO` with a ratio per sequence, rho_s = exp(mean_t l_t).

    level="token" (GSPO-token) takes sg[rho_s] pi / sg[pi]: the same value, and gradients that per-token
    advantages can tell apart. Source: arXiv 2507.18071, equations 5 to 7 and 14.

    >>> import torch, fused_align as fa
    >>> batch = fa.Batch(torch.tensor([[1, 2]]), advantage=torch.tensor([-1.0])).live()
    >>> fa.GSPO().items(torch.zeros(2), torch.tensor([3.0, 1.0]).log() / 3, batch)
    tensor([1.2009, 1.2009])
    """

    eps_low: float = 3e-4
    eps_high: float = 4e-4
    level: str = "sequence"

    paper = "2507.18071"
    coupled = "sequence"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("level", self.level in ("sequence", "token"), '"sequence" or "token"')

    def ratio(self, log_ratio: Tensor, batch: Batch) -> Tensor:
        whole = batch.spread(finite_exp(batch.mean(log_ratio)))
        return whole if self.level == "sequence" else whole.detach() * (log_ratio - log_ratio.detach()).exp()


@dataclass(frozen=True)
class LUSPO(GSPO):
    """Length-unbiased sequence policy optimisation: `GSPO` times the sequence's length.

    Source: arXiv 2602.05261.

    >>> import torch, fused_align as fa
    >>> batch = fa.Batch(torch.tensor([[1, 2]]), advantage=torch.tensor([1.0])).live()
    >>> fa.LUSPO().weights(batch), fa.LUSPO().items(torch.zeros(2), torch.zeros(2), batch)
    (tensor([1., 1.], dtype=torch.float64), tensor([-1., -1.]))
    """

    eps_low: float = 2e-3
    eps_high: float = 2.5e-3
    aggregation: str = field(default="seq_mean_token_sum", kw_only=True)

    paper = "2602.05261"


@dataclass(frozen=True)
class RLOO(_Clipped):
    """REINFORCE leave-one-out as it is trained off-policy: PPO's clip on rho_s = exp(sum_t l_t), per
    sequence.

    The leave-one-out baseline is in the advantages (`group_advantages(baseline="leave_one_out")`). On-policy
    its gradient is that of -A log pi(y). Source: arXiv 2402.14740.

    >>> import torch, fused_align as fa
    >>> batch = fa.Batch(torch.tensor([[1, 2]]), advantage=torch.tensor([1.0])).live()
    >>> fa.RLOO().items(torch.zeros(2), torch.tensor([0.5, 1.6]).log(), batch)
    tensor([-0.8000, -0.8000])
    """

    paper = "2402.14740"
    coupled = "sequence"

    def ratio(self, log_ratio: Tensor, batch: Batch) -> Tensor:
        return batch.spread(finite_exp(batch.sum(log_ratio)))


@dataclass(frozen=True)
class GMPO(PolicyLoss):
    """Geometric-mean policy optimisation: -rho_s A, rho_s = exp(mean_t of the clipped l_t).

    The clip to [-eps, eps] is PPO's, one-sided by the sign of A, in log space. Source: arXiv 2507.20673.

    >>> import torch, fused_align as fa
    >>> batch = fa.Batch(torch.tensor([[1, 2]]), advantage=torch.tensor([1.0])).live()
    >>> fa.GMPO().items(torch.zeros(2), torch.tensor([1.0, -0.4]), batch)
    tensor([-1., -1.])
    """

    eps: float = 0.4

    paper = "2507.20673"
    coupled = "sequence"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("eps", self.eps > 0, "positive: log-ratios are clipped to [-eps, eps]")

    def surrogate(self, logp: Tensor, log_ratio: Tensor, advantage: Tensor, batch: Batch) -> Tensor:
        low = log_ratio.clamp(min=-self.eps)
        clipped = torch.where(advantage > 0, log_ratio.clamp(max=self.eps), low)
        return -batch.spread(finite_exp(batch.mean(clipped))) * advantage

    def ratio(self, log_ratio: Tensor, batch: Batch) -> Tensor:
        return batch.spread(finite_exp(batch.mean(log_ratio)))

    def clips(self, log_ratio: Tensor, advantage: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        return (log_ratio < -self.eps) & (advantage <= 0), (log_ratio > self.eps) & (advantage > 0)


@dataclass(frozen=True)
class CISPO(PolicyLoss):
    """Clipped importance-sampling weights: -sg[min(rho, eps_high)] A log pi. eps_high is the cap itself.

    The gradient flows through log pi, so Humanline's clip would not stop it by itself: a token outside its
    bounds gets none (docs/math.md). Source: MiniMax-M1, arXiv 2506.13585, equation 4.

    >>> import torch, fused_align as fa
    >>> batch = fa.Batch(torch.tensor([[1, 2]]), advantage=torch.tensor([1.0])).live()
    >>> fa.CISPO().items(torch.tensor([-2.0, -1.0]), torch.tensor([0.0, 3.0]), batch)
    tensor([2., 5.])
    """

    eps_high: float = 5.0
    aggregation: str = field(default="token_mean", kw_only=True)

    paper = "2506.13585"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("eps_high", self.eps_high > 0, "positive: the largest ratio")

    def surrogate(self, logp: Tensor, log_ratio: Tensor, advantage: Tensor, batch: Batch) -> Tensor:
        ratio = self.ratio(log_ratio, batch).clamp(max=self.eps_high).detach()
        return -ratio * advantage * gated(logp, log_ratio)

    def metrics(self, logp: Tensor, log_ratio: Tensor, batch: Batch) -> dict[str, Tensor]:
        capped = (log_ratio > math.log(self.eps_high)) & (batch.token_advantage(self.name) > 0)
        capped = batch.token_mean(capped.to(logp.dtype))
        return super().metrics(logp, log_ratio, batch) | {"cispo_clip_ratio": capped}


@dataclass(frozen=True)
class SAPO(PolicyLoss):
    """Soft adaptive policy optimisation: -(4/T) s(T (rho - 1)) A, T = t_pos where A > 0, else t_neg.

    A soft gate in place of the clip: the weight falls off on both sides of rho = 1. Source: arXiv 2511.20347.

    >>> import torch, fused_align as fa
    >>> batch = fa.Batch(torch.tensor([[1], [2]]), advantage=torch.tensor([1.0, -1.0])).live()
    >>> fa.SAPO(t_neg=2.0).items(torch.zeros(2), torch.zeros(2), batch)
    tensor([-2.,  1.])
    """

    t_pos: float = 1.0
    t_neg: float = 1.05

    paper = "2511.20347"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("t_pos", self.t_pos > 0, "positive")
        self._check("t_neg", self.t_neg > 0, "positive")

    def surrogate(self, logp: Tensor, log_ratio: Tensor, advantage: Tensor, batch: Batch) -> Tensor:
        temper = either(advantage > 0, self.t_pos, self.t_neg, logp)
        return -4 / temper * torch.sigmoid(temper * (self.ratio(log_ratio, batch) - 1)) * advantage


@dataclass(frozen=True)
class VESPO(PolicyLoss):
    """Variational sequence-level soft policy optimisation: -sg[phi(w)] A log pi, w the sequence's ratio,

        phi(w) = exp(lam + k log w - lam w),   log w = clamp(sum_t clamp(l_t, -20, 20), log 1e-8, 20)

    with (k_pos, lam_pos) where A >= 0, else (k_neg, lam_neg). A sampler correction goes into w. Humanline: as
    for `CISPO`. Source: arXiv 2602.10693.

    >>> import torch, fused_align as fa
    >>> batch = fa.Batch(torch.tensor([[1, 2]]), advantage=torch.tensor([1.0])).live()
    >>> fa.VESPO().items(torch.tensor([-2.0, -1.0]), torch.zeros(2), batch)
    tensor([2., 1.])
    """

    k_pos: float = 2.0
    lam_pos: float = 3.0
    k_neg: float = 3.0
    lam_neg: float = 2.0
    aggregation: str = field(default="token_mean", kw_only=True)

    paper = "2602.10693"
    coupled = "sequence"
    folds_sampler = True

    def surrogate(self, logp: Tensor, log_ratio: Tensor, advantage: Tensor, batch: Batch) -> Tensor:
        weight = self._phi(logp.detach(), log_ratio.detach(), advantage, batch)
        return -weight * advantage * gated(logp, log_ratio)

    def _phi(self, logp: Tensor, log_ratio: Tensor, advantage: Tensor, batch: Batch) -> Tensor:
        log_w = batch.spread(batch.sum(log_ratio.clamp(-20, 20)))
        if self.sampler_correction:
            correction = self.correction(logp, batch).clamp(SMALLEST, 20)
            if self.sampler_correction.startswith("token"):
                correction = batch.spread(batch.sum(correction))
            log_w = log_w + correction
        log_w = log_w.clamp(SMALLEST, 20)
        k = either(advantage >= 0, self.k_pos, self.k_neg, logp)
        lam = either(advantage >= 0, self.lam_pos, self.lam_neg, logp)
        return (lam + k * log_w - lam * log_w.exp()).exp()


@dataclass(frozen=True)
class REINFORCE(PolicyLoss):
    """-A log pi(y): the plain policy gradient, of samples of the policy itself. There is no ratio.

    Summed over a sequence, as log pi of the whole of it. Source: R. J. Williams, "Simple statistical
    gradient-following algorithms for connectionist reinforcement learning", 1992.

    >>> import torch, fused_align as fa
    >>> batch = fa.Batch(torch.tensor([[1, 2]]), advantage=torch.tensor([3.0])).live()
    >>> fa.REINFORCE().items(torch.tensor([-2.0, -1.0]), torch.tensor([-2.0, -1.0]), batch)
    tensor([6., 3.])
    """

    aggregation: str = field(default="seq_mean_token_sum", kw_only=True)

    paper = "Williams 1992"
    anchor = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("kl_correction", not self.kl_correction, "false: there is no ratio to correct with")

    def surrogate(self, logp: Tensor, log_ratio: Tensor, advantage: Tensor, batch: Batch) -> Tensor:
        return -advantage * logp


@dataclass(frozen=True)
class HybridPolicy(_Clipped):
    """Policy gradient on samples and on edits of them (critique-post-edit):

        samples    -min(rho A, clip(rho, 1-eps_low, 1+eps_high) A)
        edits      -clip(rho, 1-edit_low, 1+edit_high) A            rows with batch.off_policy; None: no bound

    old_logp of an edit is its log-prob under the prompt that it was edited with. Mean over the tokens of
    both. Source: arXiv 2510.18849; its released code has no bounds on edits.

    >>> import torch, fused_align as fa
    >>> batch = fa.Batch(torch.tensor([[1], [2]]), advantage=torch.ones(2),
    ...                  off_policy=torch.tensor([False, True])).live()
    >>> fa.HybridPolicy().items(torch.zeros(2), torch.tensor([2.0, 2.0]).log(), batch)
    tensor([-1.2000, -2.0000])
    """

    edit_low: float | None = None
    edit_high: float | None = None
    aggregation: str = field(default="token_mean", kw_only=True)

    paper = "2510.18849"

    def surrogate(self, logp: Tensor, log_ratio: Tensor, advantage: Tensor, batch: Batch) -> Tensor:
        low = -math.inf if self.edit_low is None else 1 - self.edit_low
        high = math.inf if self.edit_high is None else 1 + self.edit_high
        edits = -self.ratio(log_ratio, batch).clamp(low, high) * advantage
        return torch.where(self._edited(batch), edits, super().surrogate(logp, log_ratio, advantage, batch))

    def clips(self, log_ratio: Tensor, advantage: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        low, high = super().clips(log_ratio, advantage, batch)
        sampled = ~self._edited(batch)
        return low & sampled, high & sampled

    def _edited(self, batch: Batch) -> Tensor:  # -> [n] bool
        return batch.spread(batch.need("off_policy", self.name)).bool()


@dataclass(frozen=True)
class GRAO(Loss):
    """Group relative alignment optimisation: imitate, explore and transcend. Per prompt with samples o_i, a
    reference answer y and J = mean_t log pi, the negative of

        (1/G) sum_i (1 + lam) A_i J(o_i)  +  (beta A_y - lam mean_i A_i) J(y)

    batch.reference marks the y, batch.group the prompts, batch.advantage [S] the A. No ratio, no KL. The mean
    over prompts: normalizer counts "groups", and a group must not be split over batches. Where advantages are
    normalised over the samples alone mean_i A_i is 0; it lives when the group includes y (docs/math.md).
    Source: arXiv 2508.07750, equation 6.

    >>> import torch, fused_align as fa
    >>> batch = fa.Batch(torch.tensor([[1], [2], [3]]), group=torch.tensor([5, 5, 5]),
    ...                  advantage=torch.tensor([1.0, 0.0, 2.0]),
    ...                  reference=torch.tensor([False, False, True])).live()
    >>> fa.GRAO().weights(batch)  # (1 + .6) * 1 / 2, 0, .5 * 2 - .6 * .5
    tensor([0.8000, 0.0000, 0.7000], dtype=torch.float64)
    """

    beta: float = 0.5
    lam: float = 0.6

    paper = "2508.07750"

    @property
    def unit(self) -> str:
        return "groups"

    def sparse(self, humanline: RatioClip | None) -> bool:
        return True  # groups without spread

    def items(self, logp: Tensor, log_ratio: Tensor, batch: Batch) -> Tensor:
        return -logp

    def weights(self, batch: Batch) -> Tensor:
        advantage = batch.need("advantage", self.name).double()
        if batch.advantage_per_token:
            raise ValueError("GRAO: advantage must be [S], one per sequence; got one per token.")
        reference = batch.need("reference", self.name)
        samples = batch.group_sum((~reference).double())
        mean = batch.group_sum(torch.where(reference, 0.0, advantage)) / samples.clamp(min=1)
        of_sample = (1 + self.lam) * advantage / samples.clamp(min=1)
        weight = torch.where(reference, self.beta * advantage - self.lam * mean, of_sample)
        return super().weights(batch) * batch.spread(weight / batch.lengths.clamp(min=1))

    def metrics(self, logp: Tensor, log_ratio: Tensor, batch: Batch) -> dict[str, Tensor]:
        reference = batch.need("reference", self.name)
        summed = batch.sum(logp)
        return {
            "logps/reference": torch.where(reference, summed, 0.0).sum() / reference.sum(),
            "logps/samples": torch.where(reference, 0.0, summed).sum() / (~reference).sum(),
        }
