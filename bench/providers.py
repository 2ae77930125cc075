"""Who computes a case: this package, and torch's own means. Other libraries are in `peers`.

A provider turns a case into a call that returns (value, dhidden | None, dweight | None): the log-probs [N] of
a per-token mode or the scalar of a loss, and the gradients the mode asks for, in the operands' dtype.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

import fused_align as fa
from fused_align import backends
from fused_align.linear import plan

from .cases import Case, Inputs
from .reference import BETA, CLIP, HUMANLINE, IGNORE, TAU, loss_of

Result = tuple[Tensor, Tensor | None, Tensor | None]
Call = Callable[[], Result]
LogpOf = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden [N, H], weight [V, H], target [N] -> logp [N]
NllOf = Callable[[Tensor, Tensor, Tensor, str], Tensor]  # the same and a reduction -> -logp [N], or its mean


@dataclass(frozen=True)
class Provider:
    """One way to compute a case.

    package: the distribution whose version goes into the rows. ours: must pass the gate, or the run fails.
    compiled: compiles for the shapes it meets, so a tiny call does not warm it up. note: how its work differs
    from the others'. rounded: its logits are to have the operands' dtype, and are held against such logits.
    """

    name: str
    package: str = "torch"
    ours: bool = False
    compiled: bool = False
    note: str = ""

    @property
    def rounded(self) -> bool:
        return False

    def why_not(self, device: str) -> str | None:
        """None if it can be imported and run on "cpu" or "cuda", else a sentence."""
        return None

    def supports(self, case: Case, device: str) -> str | None:
        """None if it can compute the case, else the reason."""
        return None

    def passes(self, case: Case) -> int:
        """GEMM passes its time is compared with: those an exact method needs at least."""
        return case.passes

    def without_reference(self, case: Case) -> bool:
        """Whether it cannot take reference log-probs, and gets the case with those at 0."""
        return False

    def note_on(self, case: Case) -> str:
        """How its work on the case differs from the others'."""
        return self.note

    def build(self, case: Case, inputs: Inputs) -> Call:
        raise NotImplementedError(f"{self.name} must define build(case, inputs).")


def leaves(case: Case, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """hidden and weight as leaves that require the gradients the mode asks for."""
    hidden, weight = inputs.hidden.detach(), inputs.weight.detach()
    return hidden.requires_grad_(case.grad_hidden), weight.requires_grad_(case.grad_weight)


def gradients(case: Case, value: Tensor, hidden: Tensor, weight: Tensor, c: Tensor | None = None) -> Result:
    """The result from a differentiable value, and for log-probs the coefficients of the backward."""
    if not case.grad_hidden:
        return value.detach(), None, None
    wanted = (hidden, weight) if case.grad_weight else (hidden,)
    found = torch.autograd.grad(value, wanted, c)
    return value.detach(), found[0], found[1] if case.grad_weight else None


def from_logp(case: Case, inputs: Inputs, logp_of: LogpOf) -> Call:
    """The call of a provider that computes log-probs: the loss is a formula on top of them."""
    hidden, weight = leaves(case, inputs)

    def run() -> Result:
        with torch.set_grad_enabled(case.grad_hidden):
            logp = logp_of(hidden, weight, inputs.target)
            if case.loss is None:
                return gradients(case, logp, hidden, weight, inputs.coefficients.to(logp.dtype))
            return gradients(case, loss_of(case.loss, logp, inputs, case.humanline), hidden, weight)

    return run


def from_nll(case: Case, inputs: Inputs, nll_of: NllOf) -> Call:
    """The call of a provider of cross-entropies: the mean for sft, else a formula on those of the tokens."""
    if case.loss != "sft":
        return from_logp(case, inputs, lambda x, w, y: -nll_of(x, w, y, "none").float())
    hidden, weight = leaves(case, inputs)
    return lambda: gradients(case, nll_of(hidden, weight, inputs.target, "mean"), hidden, weight)


# ---- this package ---------------------------------------------------------------------------------------

LOSSES = {
    "sft": fa.SFT(),
    "dpo": fa.DPO(beta=BETA),
    "ipo": fa.IPO(tau=TAU),
    "kto": fa.KTO(beta=BETA),
    "grpo": fa.GRPO(eps_low=CLIP, eps_high=CLIP),
    "gspo": fa.GSPO(eps_low=CLIP, eps_high=CLIP),
}
PLANS = ("auto", "score", "fused", "jacobian", "single", "window", "recompute")
Tile = tuple[int, int]  # the most rows of a tile of logits, and its MiB


@dataclass(frozen=True)
class Ours(Provider):
    backend: str = "auto"
    plan: str = "auto"
    precision: str = "high"
    workspace_mib: int | None = None
    tile: Tile | None = None

    @property
    def rounded(self) -> bool:
        return self.precision == "bf16"

    def with_workspace(self, mib: int) -> Ours:
        return replace(self, workspace_mib=mib, name=f"{self.name[:-1]},{mib}MiB]")

    def with_tile(self, tile: Tile) -> Ours:
        """The same where the planner's tiles have other sizes than it takes by itself."""
        return replace(self, tile=tile, name=f"{self.name[:-1]},{tile[0]}rows x {tile[1]}MiB]")

    def why_not(self, device: str) -> str | None:
        if self.backend == "auto":
            return None
        return dict(backends.table(device)).get(self.backend, f"there is no backend {self.backend!r}")

    def supports(self, case: Case, device: str) -> str | None:
        if self.precision == "bf16" and case.dtype == "float32":
            return "precision='bf16' is for 16-bit operands"
        if self.plan == "auto":
            return None
        chunked = {"sft": "single", "grpo": "single"}.get(case.loss or "", "window")
        serving = ["score"] if not case.grad_hidden else ["recompute"]
        serving += ["fused"] if not case.grad_hidden and self.backend == "triton" else []
        serving += ["jacobian"] if case.grad_hidden and not case.grad_weight else []
        serving += [chunked] if case.loss else []
        return None if self.plan in serving else f"plan {self.plan!r} does not serve {case.mode}"

    def passes(self, case: Case) -> int:
        # recompute forms the logits twice; with a frozen head that makes three passes in all
        return case.passes + (self.plan == "recompute")

    def build(self, case: Case, inputs: Inputs) -> Call:
        options = {
            "backend": self.backend, "plan": self.plan, "precision": self.precision,
            "workspace_bytes": None if self.workspace_mib is None else self.workspace_mib << 20,
        }  # fmt: skip
        hidden, weight = leaves(case, inputs)
        if case.loss is None:
            return self._tiled(
                from_logp(case, inputs, lambda x, w, y: fa.linear_logp(x, w, y, **options)), inputs
            )
        loss, clip = LOSSES[case.loss], fa.Humanline(*HUMANLINE) if case.humanline else None

        def run() -> Result:
            # made in the call: a training step has a new batch each time
            batch = fa.Batch(
                inputs.target, cu_seqlens=inputs.cu_seqlens, ref_logp=inputs.ref_logp, kl=inputs.kl,
                old_logp=inputs.old_logp, advantage=inputs.advantage, desirable=inputs.desirable,
            )  # fmt: skip
            out = fa.align_loss(hidden, weight, batch, loss, humanline=clip, **options)
            return gradients(case, out.loss, hidden, weight)

        return self._tiled(run, inputs)

    def _tiled(self, call: Call, inputs: Inputs) -> Call:
        """The call, planned with tiles of the size asked for."""
        if self.tile is None:
            return call
        (rows, mib), kind = self.tile, inputs.hidden.device.type

        def run() -> Result:
            sizes = patch.dict(plan.TILE_BYTES, {kind: mib * plan.MIB})
            with patch.dict(plan.MAX_ROWS, {kind: rows}), sizes:
                return call()

        return run


def ours(device: str) -> list[Provider]:
    """`auto`, every plan on every backend usable here, and 16-bit logits for 16-bit operands."""
    found: list[Provider] = [_ours("auto", "auto"), _ours("auto", "auto", "bf16")]
    for backend, reason in backends.table(device):
        if reason is None and backend != "eager":  # the package's dense oracle
            found += [_ours(backend, plan) for plan in PLANS[1:]]
    return found


def _ours(backend: str, plan: str, precision: str = "high") -> Ours:
    suffix = "" if precision == "high" else f",{precision}"
    return Ours(
        f"fused_align[{backend},{plan}{suffix}]", "fused-align", ours=True, backend=backend, plan=plan,
        precision=precision,
    )  # fmt: skip


# ---- torch ----------------------------------------------------------------------------------------------


def eager_logp(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """As trainers write it: logits in the operands' dtype, log-softmax in float32, masked at the end."""
    logp = F.log_softmax((hidden @ weight.t()).float(), dim=-1)
    logp = logp.gather(-1, target.clamp(min=0)[:, None]).squeeze(1)
    return logp.masked_fill(target == IGNORE, 0.0)


def too_large(case: Case, device: str) -> str | None:
    """Why full logits of a case would not fit: a CPU would be out of memory without an exception."""
    needed = (
        case.rows * case.vocab * (case.torch_dtype.itemsize * 2 + 8)
    )  # logits, log-probs, their gradients
    if device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
    else:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed <= 0.7 * total:
        return None
    return f"full logits and their gradients need {needed >> 30} GiB of {total >> 30}"


@dataclass(frozen=True)
class Eager(Provider):
    """wide: the operands are cast to float32 first, so that the logits are in float32 too."""

    wide: bool = False

    def supports(self, case: Case, device: str) -> str | None:
        return too_large(case, device)

    def build(self, case: Case, inputs: Inputs) -> Call:
        if self.wide:
            return from_logp(case, inputs, lambda x, w, y: eager_logp(x.float(), w.float(), y))
        return from_logp(case, inputs, torch.compile(eager_logp) if self.compiled else eager_logp)


@dataclass(frozen=True)
class TorchLinearCrossEntropy(Provider):
    chunked: bool = True

    def why_not(self, device: str) -> str | None:
        if hasattr(F, "linear_cross_entropy"):
            return None
        return f"torch {torch.__version__} has no linear_cross_entropy; 2.13 has"

    def supports(self, case: Case, device: str) -> str | None:
        return None if self.chunked else too_large(case, device)

    def build(self, case: Case, inputs: Inputs) -> Call:
        options = torch.nn.LinearCrossEntropyOptions() if self.chunked else None

        def nll(hidden: Tensor, weight: Tensor, target: Tensor, reduction: str) -> Tensor:
            return F.linear_cross_entropy(
                hidden, weight, target, reduction=reduction, ignore_index=IGNORE, options=options
            )

        return from_nll(case, inputs, nll)


EAGER, WIDE_EAGER = Eager("eager"), Eager("eager[float32]", wide=True)


def torch_providers() -> list[Provider]:
    return [
        EAGER,
        Eager("torch.compile", compiled=True),
        TorchLinearCrossEntropy("torch.linear_cross_entropy", chunked=False),
        TorchLinearCrossEntropy("torch.linear_cross_entropy[chunked]"),
    ]
