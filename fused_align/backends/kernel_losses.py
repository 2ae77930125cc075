"""The steps `policy_loss` and `preference_loss`: which losses a kernel computes, and how one is launched.

`cover` gives the kernel of a loss, or a sentence why the loss goes through autograd on [n]-sized vectors.
The formulas are the backends'. What is fixed before a launch is worked out here: codes for what a loss is
made of, and hyperparameters as one float64 tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..batch import Batch
from ..humanline import Humanline, RatioClip
from ..losses.base import Loss
from ..losses.clipped import GRPO, GSPO, LUSPO, PPO, RLOO
from ..losses.policy import MAX_ITEM, PolicyLoss
from ..losses.preference import (
    CPO,
    DPO,
    DPOP,
    EXO,
    IPO,
    MADPO,
    NCA,
    APODown,
    APOZero,
    BCOPair,
    DiscoPOP,
    Hinge,
    PairLoss,
    SigmoidNorm,
    SimPO,
    SPPOHard,
)
from ..losses.unpaired import KTO, APOZeroUnpaired, UnpairedLoss
from ..losses.weighted import CISPO, REINFORCE, SAPO
from .codes import Pair, Penalty, RatioOf, Sampler, Score, Surrogate


class Evaluated(NamedTuple):
    """What one launch gives."""

    loss: Tensor  # [] float64: the sum of the weighted items over the divisor
    c: Tensor | None  # logp's shape and dtype: dloss/dlogp, 0 where a position is ignored or padding
    sums: Tensor  # [K] float64: the loss, then what the metrics are made of
    dtype: torch.dtype  # of logp, and so of the metrics


class LossLaunch(NamedTuple):
    """What a backend launches: a kernel by name, a program for each item, and its arguments by name.

    Those in capitals are fixed for a loss and a batch's columns: codes, whether there are HUMANLINE's bounds,
    whether METRICS are wanted, and K, the number of sums.
    """

    kernel: str
    programs: int
    arguments: dict[str, Any]


#: how a backend launches, on which device
Run = Callable[[LossLaunch, torch.device], None]


@dataclass(frozen=True)
class LossKernel:
    """The kernel of one loss with one clip. Derived ones know their family's columns and metrics."""

    loss: Any
    humanline: Humanline | None
    codes: dict[str, int]
    params: tuple[float, ...]
    run: Run

    kernel: ClassVar[str]
    most: ClassVar[int] = 0  # K, with metrics

    def evaluate(
        self,
        logp: Tensor,  # target's shape, or flat; [n] of a live batch
        batch: Batch,  # as the user gave it, live, or whole items of a live one
        divisor: float | Tensor,  # []
        *,
        grad: bool = True,
        metrics: bool = True,
    ) -> Evaluated:
        """The loss, its gradient by logp, and sums for `metrics`, in one launch and without a host sync.

        A batch that is not live is read where it lies: ignored positions may hold anything.

        Raises:
            ValueError, TypeError: a column that the loss needs is missing, or logp does not fit the batch.
        """
        launch = self.launch(logp, batch, divisor, grad=grad, metrics=metrics)
        c, sums = launch.arguments["c"], launch.arguments["sums"]
        if launch.programs:
            self.run(launch, logp.device)
        return Evaluated(sums[0], None if c is None else c.view(logp.shape), sums, logp.dtype)

    def launch(
        self, logp: Tensor, batch: Batch, divisor: float | Tensor, *, grad: bool = True, metrics: bool = True
    ) -> LossLaunch:
        """What `evaluate` launches."""
        self._check(logp, batch)
        device, count = logp.device, self._programs(batch)
        flat = logp.detach().contiguous().view(-1)
        used = self.most if metrics else 1
        # in padding no program writes, nor where packed offsets leave tokens out
        new = torch.empty_like if batch.cu_seqlens is None and batch.valid is None else torch.zeros_like
        if isinstance(divisor, Tensor):
            divisor = divisor.detach().to(device, torch.float64, non_blocking=True)
        else:
            divisor = torch.full((), divisor, dtype=torch.float64, device=device)
        arguments = {
            "logp": flat,
            **self._columns(batch, metrics),
            **_layout(batch),
            "params": _params(self.params, device),
            "divisor": divisor,
            "c": new(flat) if grad else None,
            "partials": torch.empty(used, count, dtype=torch.float64, device=device),
            "counter": torch.zeros((), dtype=torch.int32, device=device),
            # without a program nothing is added
            "sums": (torch.empty if count else torch.zeros)(used, dtype=torch.float64, device=device),
            "programs": count,
            **self.codes,
            "HUMANLINE": self.humanline is not None,
            "METRICS": metrics,
            "K": used,
        }
        return LossLaunch(self.kernel, count, arguments)

    def metrics(self, found: Evaluated, batch: Batch) -> dict[str, Tensor]:
        """The metrics of `Objective.metrics`, from what `evaluate` found of a whole batch. No host sync.

        Raises:
            ValueError: it was called with metrics=False.
        """
        if found.sums.numel() != self.most:
            raise ValueError(
                f"{self.loss.name}'s kernel: metrics need {self.most} sums, of evaluate(metrics=True); got "
                f"{found.sums.numel()}."
            )
        return self._metrics(found, batch)

    def _metrics(self, found: Evaluated, batch: Batch) -> dict[str, Tensor]:
        raise NotImplementedError(f"{type(self).__name__} must define _metrics(found, batch).")

    def _columns(self, batch: Batch, metrics: bool) -> dict[str, Tensor | None]:
        """The family's columns, and codes that depend on which are there."""
        raise NotImplementedError(f"{type(self).__name__} must define _columns(batch, metrics).")

    def _programs(self, batch: Batch) -> int:
        return batch.sequences

    def _check(self, logp: Tensor, batch: Batch) -> None:
        name = self.loss.name
        if logp.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{name}'s kernel: logp must be float32 or float64; got {logp.dtype}.")
        if logp.numel() != batch.target.numel():
            raise ValueError(
                f"{name}'s kernel: logp must have a number for every target, {list(batch.target.shape)}; got "
                f"{list(logp.shape)}."
            )
        if batch.partial and self.loss.item != "token":
            raise ValueError(
                f"{name}'s kernel: these are parts of sequences, and {name} couples a {self.loss.item}; "
                "give it whole ones (Batch.take_sequences, Batch.take_pairs)."
            )

    def _common(self, found: Evaluated, tokens: Tensor, inside: Tensor) -> dict[str, Tensor]:
        """The metrics that do not depend on the loss; tokens and inside are numbers of tokens, []."""
        common = {"tokens/live": tokens.to(found.dtype)}
        if self.humanline is not None:
            common["humanline/unclipped"] = (inside / tokens).to(found.dtype)
        return common


# ---- policy --------------------------------------------------------------------------------------------


class PolicyKernel(LossKernel):
    kernel = "policy_loss"
    most = 6

    def _columns(self, batch: Batch, metrics: bool) -> dict[str, Any]:
        loss = self.loss
        batch.need("advantage", loss.name)
        if loss.beta != 0:
            batch.need("ref_logp", f"{loss.name}'s KL penalty")
        if loss.sampler_correction:
            batch.need("sampler_logp", f"{loss.name}(sampler_correction=...)")
        # a KL is needed by the penalty, and made a metric of wherever there is a reference
        kl = batch.ref_logp is not None and (loss.beta != 0 or metrics)
        old = loss.anchor is not None or loss.sampler_correction
        return {
            "old": _flat(batch.old_logp) if old else None,
            "ref": _flat(batch.ref_logp) if kl else None,
            "sampler": _flat(batch.sampler_logp) if loss.sampler_correction else None,
            "advantage": _flat(batch.advantage),
            "token_weight": _flat(batch.token_weight),
            # of whole sequences the kernel counts the live tokens itself
            "lengths": batch.lengths if batch.partial else None,
            "KL": Penalty[loss.kl.upper()] if kl else Penalty.NONE,
            "PER_TOKEN": batch.advantage_per_token,
        }

    def _metrics(self, found: Evaluated, batch: Batch) -> dict[str, Tensor]:
        _, tokens, low, high, kl, inside = found.sums
        means: dict[str, Tensor] = {}
        if self.codes["KIND"] == Surrogate.CLIPPED:
            # a token is clipped on one side: which one depends on the sign of its advantage
            means = {
                "clip_ratio/low_mean": low,
                "clip_ratio/high_mean": high,
                "clip_ratio/region_mean": low + high,
            }
        if batch.ref_logp is not None:
            means["kl"] = kl
        if self.codes["KIND"] == Surrogate.CISPO:
            means["cispo_clip_ratio"] = high
        means = {name: (total / tokens).to(found.dtype) for name, total in means.items()}
        return means | self._common(found, tokens, inside)


_SURROGATES: dict[type[Loss], Callable[[Any], tuple[Surrogate, RatioOf, tuple[float, ...]]]] = {
    # -> the surrogate, what its ratio is of, and its own parameters
    GRPO: lambda x: (Surrogate.CLIPPED, RatioOf.TOKEN, _bounds(x)),
    PPO: lambda x: (Surrogate.CLIPPED, RatioOf.TOKEN, _bounds(x)),
    GSPO: lambda x: (Surrogate.CLIPPED, _level(x), _bounds(x)),
    LUSPO: lambda x: (Surrogate.CLIPPED, _level(x), _bounds(x)),
    RLOO: lambda x: (Surrogate.CLIPPED, RatioOf.SUM, _bounds(x)),
    CISPO: lambda x: (Surrogate.CISPO, RatioOf.TOKEN, (x.eps_high, math.log(x.eps_high), 0.0)),
    SAPO: lambda x: (Surrogate.SAPO, RatioOf.TOKEN, (x.t_pos, x.t_neg, 0.0)),
    REINFORCE: lambda x: (Surrogate.REINFORCE, RatioOf.TOKEN, (0.0, 0.0, 0.0)),
}


def _level(loss: GSPO) -> RatioOf:
    return RatioOf.MEAN if loss.level == "sequence" else RatioOf.MEAN_STOPPED


def _bounds(loss: Any) -> tuple[float, ...]:
    delta = getattr(loss, "delta", None)
    return 1 - loss.eps_low, 1 + loss.eps_high, math.inf if delta is None else delta


def _policy(loss: PolicyLoss, humanline: Humanline | None, run: Run) -> LossKernel | str:
    if loss.reads:
        return f"{loss.name} reads the entropy (entropy_coef, top_entropy), and its kernel only log-probs"
    if loss.off_policy_threshold is not None:
        return f"{loss.name}(off_policy_threshold=...) masks whole sequences, which its kernel does not"
    kind, ratio, own = _SURROGATES[type(loss)](loss)
    level, _, how = (loss.sampler_correction or "").partition("_")
    codes = {
        "KIND": kind,
        "RATIO": ratio,
        "PENALISED": loss.beta != 0,
        "CORRECTED": loss.beta != 0 and loss.kl_correction,
        "SAMPLER": {"": Sampler.NONE, "truncate": Sampler.TRUNCATE, "mask": Sampler.MASK}[how],
        "WHOLE": level == "sequence",
        "COUPLED": ratio in (RatioOf.MEAN, RatioOf.SUM),
        "PER_LENGTH": loss.aggregation == "seq_mean_token_mean",
    }
    low = math.log(loss.sampler_min) if loss.sampler_min else -math.inf
    high = math.inf if loss.sampler_max is None else math.log(loss.sampler_max)
    per = float(loss.max_length or 1) if loss.aggregation == "constant" else 1.0
    params = (loss.beta, per, *_clip(humanline), low, high, MAX_ITEM, *own)
    return PolicyKernel(loss, humanline, codes, params, run)


# ---- pairs ---------------------------------------------------------------------------------------------


class PairKernel(LossKernel):
    kernel = "preference_loss"
    most = 9

    def _programs(self, batch: Batch) -> int:
        return batch.pairs

    def _columns(self, batch: Batch, metrics: bool) -> dict[str, Any]:
        loss = self.loss
        return {
            "ref": _reference(loss, batch),
            "token_weight": _flat(batch.token_weight),
            "margin": _flat(batch.need("margin", loss.name)) if isinstance(loss, MADPO) else None,
        }

    def _metrics(self, found: Evaluated, batch: Batch) -> dict[str, Tensor]:
        means = (found.sums[3:] / batch.pairs).to(found.dtype)
        names = (
            "logps/chosen", "logps/rejected", "rewards/chosen", "rewards/rejected", "rewards/accuracies",
            "rewards/margins",
        )  # fmt: skip
        named = dict(zip(names, means, strict=True))
        named["rewards/accuracies"] = named["rewards/accuracies"].float()
        return named | self._common(found, found.sums[1], found.sums[2])


def _logistic(
    flipped: float = 0.0,
    robust: bool = False,
    gamma: float = 0.0,
    lam: float = 0.0,
    more: tuple[float, ...] = (),
) -> tuple[Pair, tuple[float, ...]]:
    right, wrong = 1 - flipped, flipped
    if robust:
        right, wrong = right / (1 - 2 * flipped), -wrong / (1 - 2 * flipped)
    return Pair.LOGISTIC, (right, wrong, gamma, lam, *more)


def _adaptive(loss: MADPO) -> tuple[float, ...]:
    c_min = 1 / loss.c_max
    return c_min, loss.c_max - c_min, loss.lam, loss.tau, math.log((loss.c_max - 1) / (1 - c_min))


_PAIRS: dict[type[Loss], Callable[[Any], tuple[Pair, tuple[float, ...]]]] = {
    # -> the formula, and its own parameters
    DPO: lambda x: _logistic(x.label_smoothing, x.robust),
    IPO: lambda x: (Pair.SQUARE, (1 / (2 * x.tau),)),
    Hinge: lambda x: (Pair.HINGE, ()),
    SigmoidNorm: lambda x: _logistic(),
    EXO: lambda x: (Pair.EXO, (math.log1p(-x.eps), math.log(x.eps))),
    NCA: lambda x: (Pair.NCA, ()),
    BCOPair: lambda x: (Pair.BCO, ()),
    SPPOHard: lambda x: (Pair.SPPO, (1 / (2 * x.beta),)),
    APOZero: lambda x: (Pair.APO_ZERO, ()),
    APODown: lambda x: (Pair.APO_DOWN, ()),
    DiscoPOP: lambda x: (Pair.DISCO, (x.tau,)),
    DPOP: lambda x: _logistic(lam=x.lam),
    MADPO: lambda x: _logistic(more=_adaptive(x)),
    SimPO: lambda x: _logistic(gamma=x.gamma),
    CPO: lambda x: _logistic(x.label_smoothing),
}


def _scored(loss: PairLoss) -> tuple[Score, bool, float]:
    """-> what is made of a sequence's log-ratios; whether of their mean; its power."""
    alpha = getattr(loss, "alphapo", 0.0)
    if alpha:  # (1 - e^(-a m)) / a, the same with power -a
        return Score.POWER, True, -alpha
    if isinstance(loss, DPO) and loss.f_divergence == "forward_kl":  # 1 - e^-L
        return Score.POWER, False, -1.0
    if isinstance(loss, DPO) and loss.f_divergence == "alpha" and loss.f_alpha != 1:
        return Score.POWER, False, loss.f_alpha - 1
    if isinstance(loss, DPO) and loss.f_divergence == "js":
        return Score.JS, False, 1.0
    mean = isinstance(loss, (SigmoidNorm, SimPO)) or isinstance(loss, IPO) and loss.normalize
    return Score.PLAIN, mean, 1.0


def _pair(loss: PairLoss, humanline: Humanline | None, run: Run) -> LossKernel | str:
    if len(loss.parts) > 1:
        return f"{loss.name} is a sum of {len(loss.parts)} losses with a divisor each, and a kernel has one"
    if isinstance(loss, DPO) and loss.wpo:
        return "DPO(wpo=True) reads more than log-probs"
    if isinstance(loss, DPO) and loss.ld_alpha != 1:
        return "DPO(ld_alpha=...) weighs tokens by their place in the pair, and its kernel does not"
    kind, own = _PAIRS[type(loss)](loss)
    how, mean, power = _scored(loss)
    codes = {"KIND": kind, "SCORE": how, "MEAN": mean}
    params = (getattr(loss, loss.scale), power, *_clip(humanline), math.log(2), *own)
    return PairKernel(loss, humanline, codes, params, run)


# ---- judged sequences ----------------------------------------------------------------------------------


class JudgedKernel(LossKernel):
    kernel = "judged_loss"
    most = 8

    def _columns(self, batch: Batch, metrics: bool) -> dict[str, Any]:
        loss = self.loss
        kl = None
        if isinstance(loss, KTO):
            kl = batch.need("kl", "KTO (its reference point z0, see fused_align.kto_kl)").contiguous()
        return {
            "ref": _reference(loss, batch),
            "token_weight": _flat(batch.token_weight),
            "desirable": batch.need("desirable", loss.name).contiguous().view(torch.uint8),
            "kl": kl,
        }

    def _metrics(self, found: Evaluated, batch: Batch) -> dict[str, Tensor]:
        sums = found.sums
        both = torch.stack([sums[3], batch.sequences - sums[3]])  # how many there are of each kind
        means = (sums[4:].view(2, 2) / both).to(found.dtype)
        named = {
            "logps/chosen": means[0, 0],
            "logps/rejected": means[0, 1],
            "rewards/chosen": means[1, 0],
            "rewards/rejected": means[1, 1],
        }
        if isinstance(self.loss, KTO):
            named["kl"] = batch.need("kl", "KTO").to(found.dtype)
        return named | self._common(found, sums[1], sums[2])


def _judged(loss: UnpairedLoss, humanline: Humanline | None, run: Run) -> LossKernel | str:
    weights = (loss.desirable_weight, loss.undesirable_weight) if isinstance(loss, KTO) else (1.0, 1.0)
    params = (loss.beta, weights[0], *_clip(humanline), weights[1])
    return JudgedKernel(loss, humanline, {}, params, run)


# ---- which, and their arguments ------------------------------------------------------------------------


def cover(loss: Loss, humanline: RatioClip | None, run: Run) -> LossKernel | str:
    """The kernel that computes a loss, or a sentence why it goes through autograd on [n]-sized vectors.

    By exact class: a subclass may change any formula, and is not looked into.
    """
    if humanline is not None and type(humanline) is not Humanline:
        return f"{type(humanline).__name__} draws numbers for the whole batch, and no kernel does"
    if humanline is not None and not loss.anchors:
        return f"{loss.name} has no log-ratio that Humanline could clip"
    kind = type(loss)
    if kind in _SURROGATES:
        return _policy(loss, humanline, run)  # type: ignore[arg-type]
    if kind in _PAIRS:
        return _pair(loss, humanline, run)  # type: ignore[arg-type]
    if kind in (KTO, APOZeroUnpaired):
        return _judged(loss, humanline, run)  # type: ignore[arg-type]
    return (
        f"{loss.name} has no kernel: {kind.__module__}.{kind.__qualname__} is none of the classes that have"
    )


def _clip(humanline: Humanline | None) -> tuple[float, float]:
    return (-math.inf, math.inf) if humanline is None else (humanline.log_eps_p, humanline.log_eps_r)


def _params(values: tuple[float, ...], device: torch.device) -> Tensor:  # -> float64
    """Kept for later calls on the same stream; not what a graph's capture only records."""
    if device.type != "cuda":
        return _kept_params(values, device, 0)
    if torch.cuda.is_current_stream_capturing():
        return _kept_params.__wrapped__(values, device, 0)
    return _kept_params(values, device, torch.cuda.current_stream(device).stream_id)


@lru_cache(maxsize=128)
def _kept_params(values: tuple[float, ...], device: torch.device, stream: int) -> Tensor:
    """Built on the device: a copy from the host would wait for it."""
    return torch.stack([torch.full((), x, dtype=torch.float64, device=device) for x in values])


def _reference(loss: Loss, batch: Batch) -> Tensor | None:  # -> [N]
    if loss.anchor is None:
        return None
    return _flat(batch.need("ref_logp", f"{loss.name} is measured against a reference model, so it"))


def _layout(batch: Batch) -> dict[str, Any]:
    """Which positions belong to which sequence: a row of `width` each, or by offsets."""
    if batch.is_live:
        every = torch.arange(batch.sequences + 1, device=batch.target.device)
        return {"target": None, "offsets": torch.searchsorted(batch.sequence, every), "width": 0}
    target, packed = batch.target, batch.cu_seqlens is not None
    return {
        "target": _flat(target),
        "offsets": _flat(batch.cu_seqlens),
        "width": 0 if packed else target.shape[1],
    }


def _flat(x: Tensor | None) -> Tensor | None:  # [...] -> [N]
    return None if x is None else x.contiguous().view(-1)
