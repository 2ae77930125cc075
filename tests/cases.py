"""Problems that several test files share: heads, batches with every column, settings of every loss."""

from __future__ import annotations

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
    "sft": [fa.SFT(), fa.SFT(label_smoothing=0.2), fa.SFT(label_smoothing=0.1, z_loss=0.05)],
    "dpo": [fa.DPO(), fa.DPO(beta=0.5, label_smoothing=0.2)],
    "ipo": [fa.IPO(), fa.IPO(tau=0.4, normalize=False)],
    "kto": [fa.KTO(), fa.KTO(beta=0.5, desirable_weight=1.3, undesirable_weight=0.7)],
    "grpo": [
        fa.GRPO(),
        fa.GRPO(eps_low=0.1, eps_high=0.28, delta=1.5, beta=0.3, aggregation="token_mean"),
        fa.GRPO(beta=0.2, kl="k1", kl_correction=True, aggregation="constant", max_length=50),
        fa.GRPO(eps_high=0.4, beta=0.2, kl="k2", aggregation="seq_mean_token_sum"),
        fa.GRPO(beta=0.2, kl="k3", kl_correction=True),
        fa.GRPO(entropy_coef=0.1),
    ],
    "ppo": [fa.PPO(), fa.PPO(eps_low=0.3, eps_high=0.1)],
}

#: every loss of the registry; one that is not listed above is tested with its defaults
LOSSES: list[fa.Loss] = [loss for name, cls in REGISTRY.items() for loss in _SETTINGS.get(name, [cls()])]
HUMANLINE = fa.Humanline(-0.8, 0.5)  # tight enough to bite on the columns below


def loss_id(loss: fa.Loss) -> str:
    given = [f"{f.name}={getattr(loss, f.name)}" for f in fields(loss) if getattr(loss, f.name) != f.default]
    return "-".join([type(loss).__name__, *given])


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


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
    case.columns = {
        "old_logp": logp + 0.3 * randn(S, width, seed=seed + 4),
        "ref_logp": logp + 0.7 * randn(S, width, seed=seed + 5),
        "advantage": randn(S, seed=seed + 6),
        "desirable": torch.rand(S, generator=generator(seed + 7)) > 0.5,
        "kl": torch.tensor(0.3, dtype=torch.float64),
    }
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
    """fa.align_loss and the gradients of the operands that are not frozen."""
    leaves = leaves_of(case, frozen)
    at = case.with_operands(leaves)
    out = fa.align_loss(at.hidden, at.weight, case.batch(**(changes or {})), loss, **at.head, **options)
    return out, gradients(out.loss * upstream, leaves)


def oracle_loss(
    case: Case,
    loss: fa.Loss,
    *,
    frozen: tuple[str, ...] = (),
    humanline: fa.Humanline | None = None,
    normalizer: float | None = None,
    changes: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The same through dense logits in `dtype`, from the operands exactly as they are given to fa."""
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
    columns.pop("margin", None)
    leaves = leaves_of(wide, frozen)
    at = wide.with_operands(leaves)
    options = {f.name: getattr(loss, f.name) for f in fields(loss) if f.init}
    name = type(loss).__name__.lower()
    value = oracles.align_loss(
        name, options, at.hidden, at.weight, case.target, columns=columns, head=at.head
    )
    return value, gradients(value, leaves)


def plans_for(
    loss: fa.Loss | None, frozen_head: bool = False, capped: bool = False, dtype: torch.dtype = torch.float64
) -> list[str]:
    """Every plan that can serve a gradient: of a loss, or of log-probs (None)."""
    plans = ["auto", "recompute"]
    reads = () if loss is None else loss.reads
    if capped and {"entropy", "average"} & {*reads} or dtype == torch.bfloat16 and "entropy" in reads:
        return plans
    if frozen_head and "entropy" not in reads:
        plans.append("jacobian")
    if loss is not None:
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
