"""Problems that several test files share: heads, batches with every column, settings of every loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

import fused_align as fa
import oracles

#: the losses of the package as it was imported; losses that tests define are not among them
REGISTRY: dict[str, type[fa.Loss]] = dict(fa.Loss.registry)

_SETTINGS: dict[str, list[fa.Loss]] = {
    "sft": [
        fa.SFT(),
        fa.SFT(label_smoothing=0.2),
        fa.SFT(label_smoothing=0.1, z_loss=0.05),
        fa.SFT(label_smoothing=0.1, chosen=True),
    ],
    "dpo": [
        fa.DPO(),
        fa.DPO(beta=0.5, label_smoothing=0.2),
        fa.DPO(beta=0.5, label_smoothing=0.2, robust=True),
        fa.DPO(f_divergence="forward_kl", ld_alpha=0.3),
        fa.DPO(beta=0.5, f_divergence="js", ld_alpha=0.0),
        fa.DPO(beta=0.5, f_divergence="alpha", f_alpha=0.3),
        fa.DPO(f_divergence="alpha", f_alpha=1.0, wpo=True, label_smoothing=0.1),
    ],
    "ipo": [fa.IPO(), fa.IPO(tau=0.4, normalize=False)],
    "hinge": [fa.Hinge(), fa.Hinge(beta=1.0)],  # beta D passes 1 in the second
    "sigmoidnorm": [fa.SigmoidNorm(), fa.SigmoidNorm(beta=2.0)],
    "exo": [fa.EXO(), fa.EXO(beta=0.5, eps=0.05)],
    "nca": [fa.NCA(), fa.NCA(beta=0.5)],
    "bcopair": [fa.BCOPair(), fa.BCOPair(beta=0.5)],
    "sppohard": [fa.SPPOHard(), fa.SPPOHard(beta=0.2)],
    "apozero": [fa.APOZero(), fa.APOZero(beta=0.5)],
    "apodown": [fa.APODown(), fa.APODown(beta=0.5)],
    "discopop": [fa.DiscoPOP(), fa.DiscoPOP(beta=0.5, tau=0.3)],
    "dpop": [fa.DPOP(), fa.DPOP(beta=0.3, lam=2.0)],
    "madpo": [fa.MADPO(), fa.MADPO(beta=0.5, c_max=3.0, lam=2.0, tau=0.5)],  # margins on both sides of -tau
    "aot": [fa.AOT(), fa.AOT(beta=0.5, label_smoothing=0.2), fa.AOT(beta=0.5, paired=False)],
    "betadpo": [fa.BetaDPO(), fa.BetaDPO(beta=0.3, a=1.5, keep=0.5, ema=0.8, seed=3)],
    "simpo": [fa.SimPO(), fa.SimPO(beta=1.5, gamma=0.5, alphapo=0.25)],
    "cpo": [fa.CPO(), fa.CPO(alpha=0.5, label_smoothing=0.1), fa.CPO(beta=0.5, alpha=0.0, alphapo=0.25)],
    "orpo": [fa.ORPO(), fa.ORPO(lam=0.7)],
    "kto": [fa.KTO(), fa.KTO(beta=0.5, desirable_weight=1.3, undesirable_weight=0.7)],
    "apozerounpaired": [fa.APOZeroUnpaired(), fa.APOZeroUnpaired(beta=0.5)],
    "bco": [fa.BCO(), fa.BCO(beta=0.5)],
    "grpo": [
        fa.GRPO(),
        fa.GRPO(eps_low=0.1, eps_high=0.28, delta=1.5, beta=0.3, aggregation="token_mean"),
        fa.GRPO(beta=0.2, kl="k1", kl_correction=True, aggregation="constant", max_length=50),
        fa.GRPO(eps_high=0.4, beta=0.2, kl="k2", aggregation="seq_mean_token_sum"),
        fa.GRPO(beta=0.2, kl="k2", kl_correction=True),
        fa.GRPO(beta=0.2, kl="k3", kl_correction=True),
        fa.GRPO(entropy_coef=0.1),
        fa.GRPO(sampler_correction="token_truncate", sampler_max=1.1),
        fa.GRPO(sampler_correction="token_mask", sampler_max=1.2, sampler_min=0.85),
        fa.GRPO(sampler_correction="sequence_truncate", sampler_max=1.2, sampler_min=0.9, beta=0.2),
        fa.GRPO(sampler_correction="sequence_mask", sampler_max=1.3, off_policy_threshold=0.05),
        fa.GRPO(off_policy_threshold=0.0, beta=0.2),
        fa.GRPO(top_entropy=0.5, beta=0.2),
        fa.GRPO(top_entropy=0.25, entropy_coef=0.1, aggregation="token_mean"),
    ],
    "ppo": [fa.PPO(), fa.PPO(eps_low=0.3, eps_high=0.1), fa.PPO(top_entropy=0.5, off_policy_threshold=0.05)],
    "gspo": [
        fa.GSPO(),
        fa.GSPO(eps_low=0.05, eps_high=0.03, beta=0.2, kl="k3", kl_correction=True, aggregation="token_mean"),
        fa.GSPO(level="token", eps_low=0.05, eps_high=0.03, entropy_coef=0.1),
        fa.GSPO(level="token", beta=0.2, kl="k1", kl_correction=True, off_policy_threshold=0.0),
    ],
    "cispo": [
        fa.CISPO(),
        fa.CISPO(eps_high=1.9, sampler_correction="token_truncate", sampler_max=1.1, sampler_min=0.9),
        fa.CISPO(eps_high=1.2, beta=0.2, kl="k2", kl_correction=True, top_entropy=0.5),
    ],
    "sapo": [fa.SAPO(), fa.SAPO(t_pos=3.0, t_neg=0.5, beta=0.2, kl="k1", aggregation="token_mean")],
    "gmpo": [
        fa.GMPO(),
        fa.GMPO(eps=0.1, beta=0.2, kl="k3", kl_correction=True, aggregation="constant", max_length=20),
    ],
    "luspo": [fa.LUSPO(), fa.LUSPO(eps_low=0.05, eps_high=0.03, aggregation="seq_mean_token_mean")],
    "vespo": [
        fa.VESPO(),
        fa.VESPO(k_pos=1.5, lam_pos=1.0, k_neg=2.0, lam_neg=0.5, beta=0.2, kl="k1", kl_correction=True),
        fa.VESPO(sampler_correction="token_truncate", sampler_max=1.1, sampler_min=0.9),
        fa.VESPO(sampler_correction="sequence_mask", sampler_max=1.3, sampler_min=0.8),
    ],
    "reinforce": [
        fa.REINFORCE(),
        fa.REINFORCE(sampler_correction="sequence_truncate", sampler_max=1.2, beta=0.2),
        fa.REINFORCE(aggregation="token_mean", off_policy_threshold=0.05, entropy_coef=0.1),
    ],
    "rloo": [
        fa.RLOO(),
        fa.RLOO(eps_low=0.5, eps_high=0.3, sampler_correction="token_mask", sampler_max=1.2, beta=0.1),
        fa.RLOO(beta=0.1, kl="k3", kl_correction=True, aggregation="seq_mean_token_sum"),
    ],
    "grao": [fa.GRAO(), fa.GRAO(beta=1.2, lam=0.3)],
    "hybridpolicy": [
        fa.HybridPolicy(),
        fa.HybridPolicy(eps_low=0.1, eps_high=0.3, edit_high=0.1),
        fa.HybridPolicy(edit_low=0.05, edit_high=0.1, beta=0.2, aggregation="seq_mean_token_mean"),
    ],
}

#: weighted sums; they are not in the registry
SUMS: list[fa.Loss] = [
    fa.Sum([(1.0, fa.DPO()), (0.3, fa.SFT(chosen=True))]),
    fa.Sum([(0.5, fa.GSPO()), (0.2, fa.SFT())]),
    fa.Sum([(1.0, fa.CPO()), (0.1, fa.KTO())]),
]

#: every loss of the registry; one that is not listed above is tested with its defaults
LOSSES: list[fa.Loss] = [
    *(loss for name, cls in REGISTRY.items() for loss in _SETTINGS.get(name, [cls()])),
    *SUMS,
]
#: one of each class, and one of each thing that changes how a loss is computed: for tests that take long
SELECTED: list[fa.Loss] = [
    *{type(loss): loss for loss in reversed(LOSSES) if not isinstance(loss, fa.Sum)}.values(),
    fa.SFT(label_smoothing=0.1, z_loss=0.05),
    fa.DPO(ld_alpha=0.3, wpo=True),
    fa.GRPO(beta=0.2, kl_correction=True),
    fa.GRPO(entropy_coef=0.1),
    fa.GRPO(top_entropy=0.5, beta=0.2),
    fa.GRPO(sampler_correction="sequence_mask", sampler_max=1.3, off_policy_threshold=0.05),
    fa.GSPO(level="token", eps_low=0.05, eps_high=0.03),
    *SUMS,
]
HUMANLINE = fa.Humanline(-0.8, 0.5)  # tight enough to bite on the columns below


def options_of(loss: fa.Loss) -> dict[str, Any]:
    """What the loss was made with; its state is not among them."""
    return {f.name: getattr(loss, f.name) for f in fields(loss) if f.init}


def loss_id(loss: fa.Loss) -> str:
    if isinstance(loss, fa.Sum):
        return "+".join(f"{weight}*{loss_id(part)}" for weight, part in loss.losses)
    defaults = {f.name: f.default for f in fields(loss)}
    given = [f"{name}={value}" for name, value in options_of(loss).items() if value != defaults[name]]
    return "-".join([type(loss).__name__, *given])


def fresh(loss: fa.Loss) -> fa.Loss:
    """The same loss before its first batch: those with state (BCO, BetaDPO) change with every call."""
    if isinstance(loss, fa.Sum):
        return fa.Sum([(weight, fresh(part)) for weight, part in loss.losses])
    return loss if all(f.init for f in fields(loss)) else replace(loss)


def generator(seed: int) -> torch.Generator:
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64).to(dtype)


@dataclass
class Case:
    """One padded problem: operands, head options, and the columns of its batch."""

    hidden: Tensor  # [S, T, H]
    weight: Tensor  # [V, H]
    target: Tensor  # [S, T]
    head: dict[str, Any] = field(default_factory=dict)  # bias, temperature, logit_scale, softcap
    columns: dict[str, Tensor] = field(default_factory=dict)

    @property
    def mask(self) -> Tensor:
        return self.target != oracles.IGNORE

    @property
    def bias(self) -> Tensor | None:
        return self.head.get("bias")

    def batch(self, **changes: Tensor | None) -> fa.Batch:
        return fa.Batch(self.target, **{**self.columns, **changes})

    def flat(self) -> Case:
        """Without sequences: hidden [N, H], target [N]."""
        head = {
            k: v.reshape(-1) if k == "temperature" and torch.is_tensor(v) else v for k, v in self.head.items()
        }
        return replace(self, hidden=self.hidden.flatten(0, 1), target=self.target.flatten(), head=head)

    def to(self, dtype: torch.dtype, weight_dtype: torch.dtype | None = None) -> Case:
        """Operands rounded to dtype; what is not an operand stays exact where float32 can hold it."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        head = {k: v.to(wide) if torch.is_tensor(v) else v for k, v in self.head.items()}
        if self.bias is not None:
            head["bias"] = self.bias.to(weight_dtype or dtype)
        columns = {k: v.to(wide) if v.is_floating_point() else v for k, v in self.columns.items()}
        return Case(self.hidden.to(dtype), self.weight.to(weight_dtype or dtype), self.target, head, columns)

    def operands(self) -> dict[str, Tensor]:
        """Leaves that can be differentiated."""
        leaves = {"hidden": self.hidden, "weight": self.weight}
        return leaves if self.bias is None else {**leaves, "bias": self.bias}

    def with_operands(self, leaves: dict[str, Tensor]) -> Case:
        head = {**self.head, "bias": leaves["bias"]} if "bias" in leaves else self.head
        return replace(self, hidden=leaves["hidden"], weight=leaves["weight"], head=head)


def lengths_to_target(lengths: list[int], width: int, vocab: int, seed: int) -> Tensor:
    """[S, T] targets: prompts of different lengths, completions of the given ones, padding."""
    gen = generator(seed)
    target = torch.full((len(lengths), width), oracles.IGNORE)
    for row, length in enumerate(lengths):
        start = int(torch.randint(0, width - length + 1, (), generator=gen))
        target[row, start : start + length] = torch.randint(0, vocab, (length,), generator=gen)
    return target


def make_case(
    lengths: list[int],
    *,
    width: int,
    H: int,
    V: int,
    seed: int = 0,
    scale: float = 1.5,
    head: dict[str, Any] | None = None,
) -> Case:
    """Logits with a standard deviation of `scale`; anchors so near that clips bite on some tokens only."""
    target = lengths_to_target(lengths, width, V, seed + 1)
    S = len(lengths)
    hidden = randn(S, width, H, seed=seed + 2)
    weight = randn(V, H, seed=seed + 3) * scale / H**0.5
    case = Case(hidden, weight, target, dict(head or {}))
    logp, _, _ = oracles.token_stats(hidden, weight, target, **case.head)
    old = logp + 0.3 * randn(S, width, seed=seed + 4)
    reference, group = groups_of(S, seed + 10)
    case.columns = {
        "old_logp": old,
        "ref_logp": logp + 0.7 * randn(S, width, seed=seed + 5),
        "sampler_logp": old + 0.2 * randn(S, width, seed=seed + 9),
        "advantage": randn(S, seed=seed + 6),
        "desirable": torch.rand(S, generator=generator(seed + 7)) > 0.5,
        "kl": torch.tensor(0.3, dtype=torch.float64),
        "margin": 2 * randn(S // 2, seed=seed + 8),
        "off_policy": torch.rand(S, generator=generator(seed + 11)) > 0.5,
        "reference": reference,
        "group": group,
    }
    return case


def groups_of(S: int, seed: int) -> tuple[Tensor, Tensor]:  # [S] bool, [S] int64
    """Reference answers and prompts of sequences in no order: groups of 3, 2, 3 and 1, then the same again.

    The first and the last two of these have a reference answer, the last nothing else.
    """
    group = torch.tensor([7, 7, 7, 3, 3, 12, 12, 12, 5]).repeat(S // 9 + 1)[:S]
    reference = torch.tensor([1, 0, 0, 0, 0, 1, 0, 0, 1]).bool().repeat(S // 9 + 1)[:S]
    order = torch.randperm(S, generator=generator(seed))
    return reference[order], (group + torch.arange(S) // 9 * 20)[order]


# --- small enough to work out by hand ---


def uniform_case(ref: list[list[float]], target: list[list[int]], **columns: Tensor) -> Case:
    """hidden = 0 and four words: every token has logp = -log 4; ref: the log-ratios to the reference."""
    y = torch.tensor(target)
    return Case(
        torch.zeros(*y.shape, 3, dtype=torch.float64),
        randn(4, 3, seed=1),
        y,
        columns={"ref_logp": -math.log(4) - torch.tensor(ref, dtype=torch.float64), **columns},
    )


def grpo_case() -> Case:
    """Ratios 1.5, 0.5 | 1.1, and advantages 2, -1."""
    case = uniform_case([[0.0, 0.3], [-0.2, 0.0]], [[1, 2], [3, oracles.IGNORE]])
    ratio = torch.tensor([[1.5, 0.5], [1.1, 1.0]], dtype=torch.float64)
    case.columns["old_logp"] = -math.log(4) - ratio.log()
    case.columns["advantage"] = torch.tensor([2.0, -1.0], dtype=torch.float64)
    return case


#: the options of a head, each and together; per_token stands for a tensor of temperatures
HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 2.5},
    "logit_scale": {"logit_scale": 0.4},
    "temperature": {"temperature": 0.7},
    "per_token": {"temperature": "per_token"},
    "all": {"bias": True, "softcap": 2.5, "logit_scale": 1.4, "temperature": "per_token"},
}


def make_head(name: str, V: int, shape: tuple[int, ...], seed: int = 11) -> dict[str, Any]:
    head = dict(HEADS[name])
    if "bias" in head:
        head["bias"] = randn(V, seed=seed)
    if head.get("temperature") == "per_token":
        head["temperature"] = 0.5 + torch.rand(*shape, generator=generator(seed + 1), dtype=torch.float64)
    return head


# --- running one ---


def gradients(value: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    value.backward()
    return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def leaves_of(case: Case, frozen: tuple[str, ...] = ()) -> dict[str, Tensor]:
    return {
        name: t.detach().clone().requires_grad_(name not in frozen) for name, t in case.operands().items()
    }


def run_loss(
    case: Case,
    loss: fa.Loss,
    *,
    frozen: tuple[str, ...] = (),
    upstream: float = 1.0,
    changes: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[fa.AlignOutput, dict[str, Tensor]]:
    """fa.align_loss and the gradients of the operands that are not frozen; state starts anew."""
    leaves = leaves_of(case, frozen)
    at = case.with_operands(leaves)
    batch = case.batch(**(changes or {}))
    out = fa.align_loss(at.hidden, at.weight, batch, fresh(loss), **at.head, **options)
    return out, gradients(out.loss * upstream, leaves)


def oracle_loss(
    case: Case,
    loss: fa.Loss,
    *,
    frozen: tuple[str, ...] = (),
    humanline: fa.Humanline | None = None,
    normalizer: float | dict[str, float] | None = None,
    changes: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The same through dense logits in `dtype`, from the operands exactly as they are given to fa.

    Of a loss with state it is what the first batch gives, unless `changes` says otherwise: `state`, and the
    pairs `kept`.
    """
    wide = Case(
        case.hidden.to(dtype),
        case.weight.to(dtype),
        case.target,
        {k: v.to(dtype) if torch.is_tensor(v) else v for k, v in case.head.items()},
    )
    columns = {k: v for k, v in {**case.columns, **(changes or {})}.items() if v is not None}
    columns = {
        k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in columns.items()
    }
    if humanline is not None:
        columns["humanline"] = (humanline.log_eps_p, humanline.log_eps_r)
    columns["normalizer"] = normalizer
    leaves = leaves_of(wide, frozen)
    value = _oracle_value(wide.with_operands(leaves), loss, columns)
    return value, gradients(value, leaves)


def _oracle_value(at: Case, loss: fa.Loss, columns: dict[str, Any]) -> Tensor:
    if isinstance(loss, fa.Sum):
        parts = [weight * _oracle_value(at, part, _clipped(part, columns)) for weight, part in loss.losses]
        return torch.stack(parts).sum()
    if isinstance(loss, fa.BetaDPO) and "kept" not in columns:
        columns = {**columns, "kept": _kept(at, loss, columns)}
    name = type(loss).__name__.lower()
    return oracles.align_loss(
        name, options_of(loss), at.hidden, at.weight, at.target, columns=columns, head=at.head
    )


def _clipped(part: fa.Loss, columns: dict[str, Any]) -> dict[str, Any]:
    """Humanline is for the parts of a sum that have an anchor."""
    return columns if part.anchor is not None else {**columns, "humanline": None}


def _kept(at: Case, loss: fa.BetaDPO, columns: dict[str, Any]) -> list[int]:
    """The pairs that BetaDPO draws in its first batch, given the margins as the oracle has them."""
    logp, _, _ = oracles.token_stats(at.hidden, at.weight, at.target, **at.head)
    margins = oracles.margins(oracles.Tokens(logp.detach(), at.mask, **columns))
    return replace(loss).kept(torch.stack(margins).double()).tolist() if margins else []


def plans_for(
    loss: fa.Loss | None, frozen_head: bool = False, capped: bool = False, dtype: torch.dtype = torch.float64
) -> list[str]:
    """Every plan that can serve a gradient: of a loss, or of log-probs (None)."""
    plans = ["auto", "recompute"]
    reads = () if loss is None else loss.learnt
    if capped and {"entropy", "average"} & {*reads} or dtype == torch.bfloat16 and "entropy" in reads:
        return plans
    if frozen_head and "entropy" not in reads:
        plans.append("jacobian")
    if loss is not None and loss.item != "batch":
        plans.append("single" if loss.item == "token" else "window")
    return plans


def gradcheck(
    function: Callable[[dict[str, Tensor]], Tensor], leaves: dict[str, Tensor], step: float, bound: float
) -> None:
    """Every partial derivative of a scalar function against central differences, with a single backward.

    torch.autograd.gradcheck runs backward several times, which plans that form gradients in the forward
    refuse. `bound` is for a value of about 1: the rounding of the difference grows with the value.
    """
    live = {name: leaf.detach().clone().requires_grad_() for name, leaf in leaves.items()}
    at = function(live)
    bound *= max(1.0, float(at.detach().abs()))
    got = gradients(at, live)
    for name, leaf in leaves.items():
        want = torch.zeros_like(leaf)
        moved = {other: t.detach().clone() for other, t in leaves.items()}
        flat = moved[name].view(-1)
        for i in range(flat.numel()):
            centre = float(flat[i])
            sides = []
            for sign in (1, -1):
                flat[i] = centre + sign * step
                with torch.no_grad():
                    sides.append(float(function(moved)))
            flat[i] = centre
            want.view(-1)[i] = (sides[0] - sides[1]) / (2 * step)
        error = (got[name] - want).abs().max() if want.numel() else 0
        assert error <= bound, f"{name}: off by {error:.2e} from central differences, bound {bound}"
