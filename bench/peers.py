"""Other libraries at the same work. Each is imported inside its provider, by name: none need be installed.

Where a peer drops ignored tokens itself, or leaves that to its caller as TRL's trainers do, they are dropped;
where it computes them and masks them, they are computed.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .cases import Case, Inputs
from .providers import Call, Provider, Result, from_logp, from_nll, gradients, leaves, too_large
from .reference import BETA, CLIP, IGNORE, SEQUENCE

NO_REFERENCE = "reference log-probs are 0: it cannot take them and would compute them again"


def missing(module: str, package: str) -> str | None:
    """None if the module can be imported, else a sentence. Looks it up without importing it."""
    if importlib.util.find_spec(module) is not None:
        return None
    return f"{package} is not installed"


def load(module: str) -> Any:
    return importlib.import_module(module)


def needs_cuda(what: str, device: str) -> str | None:
    return None if device == "cuda" else f"{what} needs a CUDA device"


@dataclass(frozen=True)
class LigerChunked(Provider):
    """Liger's chunked losses, in plain torch; a chunk is `chunk` pairs or sequences."""

    chunk: int = 1

    def why_not(self, device: str) -> str | None:
        return missing("liger_kernel", "liger-kernel")

    def supports(self, case: Case, device: str) -> str | None:
        if case.loss not in ("dpo", "kto", "grpo"):
            return f"it has no chunked loss for {case.mode}"
        return "it has no Humanline clip" if case.humanline else None

    def without_reference(self, case: Case) -> bool:
        return case.loss in ("dpo", "kto")

    def note_on(self, case: Case) -> str:
        return NO_REFERENCE if self.without_reference(case) else self.note

    def build(self, case: Case, inputs: Inputs) -> Call:
        hidden, weight = leaves(case, inputs)
        loss = {"dpo": self._dpo, "kto": self._kto, "grpo": self._grpo}[case.loss or ""](inputs)

        def run() -> Result:
            shaped = hidden.view(-1, SEQUENCE, case.hidden)
            return gradients(case, loss(shaped, weight), hidden, weight)

        return run

    def _options(self) -> dict:
        return {"compiled": self.compiled, "use_ref_model": False, "chunk_size": self.chunk}

    def _dpo(self, inputs: Inputs) -> Callable[[Tensor, Tensor], Tensor]:
        kind = load("liger_kernel.chunked_loss").LigerFusedLinearDPOLoss
        loss = kind(ignore_index=IGNORE, beta=BETA, **self._options())
        target = inputs.target.view(-1, SEQUENCE)
        return lambda hidden, weight: loss(weight, hidden, target)[0]

    def _kto(self, inputs: Inputs) -> Callable[[Tensor, Tensor], Tensor]:
        kind = load("liger_kernel.chunked_loss").LigerFusedLinearKTOLoss
        loss = kind(ignore_index=IGNORE, beta=BETA, **self._options())
        target = inputs.target.view(-1, SEQUENCE)
        labels, kl = inputs.desirable, inputs.kl
        return lambda hidden, weight: loss(hidden, weight, target, preference_labels=labels, kl=kl)[0]

    def _grpo(self, inputs: Inputs) -> Callable[[Tensor, Tensor], Tensor]:
        loss = load("liger_kernel.chunked_loss").LigerFusedLinearGRPOLoss(
            beta=0.0, epsilon_low=CLIP, epsilon_high=CLIP, loss_type="grpo", **self._options()
        )
        target, old = inputs.target.view(-1, SEQUENCE), inputs.old_logp.view(-1, SEQUENCE)
        ids, mask = target.clamp(min=0), (target != IGNORE).float()
        return lambda hidden, weight: loss(
            hidden, weight, ids, mask, inputs.advantage, old_per_token_logps=old
        )[0]


@dataclass(frozen=True)
class LigerCrossEntropy(Provider):
    """Liger's fused linear cross-entropy, in Triton."""

    def why_not(self, device: str) -> str | None:
        return missing("liger_kernel", "liger-kernel") or needs_cuda("its Triton kernel", device)

    def build(self, case: Case, inputs: Inputs) -> Call:
        kind = load("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss
        losses = {reduction: kind(ignore_index=IGNORE, reduction=reduction) for reduction in ("mean", "none")}
        return from_nll(case, inputs, lambda x, w, y, reduction: losses[reduction](w, x, y))


@dataclass(frozen=True)
class CutCrossEntropy(Provider):
    """Apple's CCE. cce filters small gradients, so it is approximate; exact switches the filter off."""

    impl: str = "cce"
    exact: bool = False

    def why_not(self, device: str) -> str | None:
        reason = missing("cut_cross_entropy", "cut-cross-entropy")
        return reason or (None if self.impl == "torch_compile" else needs_cuda("its Triton kernel", device))

    def supports(self, case: Case, device: str) -> str | None:
        if self.impl == "torch_compile":
            return too_large(case, device)
        return "its backward takes 16-bit operands only" if case.dtype == "float32" else None

    def build(self, case: Case, inputs: Inputs) -> Call:
        library = load("cut_cross_entropy")
        options: dict = {"impl": self.impl}
        if self.exact and hasattr(library.LinearCrossEntropyImpl, "CCE_EXACT"):
            options["impl"] = "cce_exact"
        elif self.exact:  # releases on PyPI up to 25.1 have no such preset
            options["filter_eps"] = None

        def nll(hidden: Tensor, weight: Tensor, target: Tensor, reduction: str) -> Tensor:
            return library.linear_cross_entropy(hidden, weight, target, reduction=reduction, **options)

        return from_nll(case, inputs, nll)


@dataclass(frozen=True)
class Trl(Provider):
    """The function through which TRL's trainers compute log-probs; of live tokens only, as on a GPU."""

    def why_not(self, device: str) -> str | None:
        return missing("trl", "trl")

    def build(self, case: Case, inputs: Inputs) -> Call:
        utils = load("trl.trainer.utils")
        function, chunk = utils._ChunkedLogProbFunction, utils._CHUNKED_LOGPROB_CHUNK_SIZE
        if len(inspect.signature(function.forward).parameters) != 10:  # ctx and what is passed below
            raise RuntimeError(
                f"trl {importlib.metadata.version('trl')} calls its kernel with other arguments than 1.16"
            )

        def logp_of(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
            live = target != IGNORE
            everything = bool(live.all())  # indexing would copy hidden for nothing
            x, y = (hidden, target) if everything else (hidden[live], target[live])
            logp = function.apply(x, weight, None, y, 1.0, chunk, None, 1.0, ("log_probs",))[0]
            return logp if everything else logp.new_zeros(target.shape).masked_scatter(live, logp)

        return from_logp(case, inputs, logp_of)


@dataclass(frozen=True)
class Quack(Provider):
    """Mean cross-entropy only; its scaled-exp path where the sizes and the GPU allow it."""

    def why_not(self, device: str) -> str | None:
        return missing("quack", "quack-kernels") or needs_cuda("it", device)

    def supports(self, case: Case, device: str) -> str | None:
        if case.loss != "sft":
            return "it has the mean cross-entropy only"
        return None if case.vocab % 8 == 0 and case.hidden % 8 == 0 else "it needs H and V that 8 divides"

    def build(self, case: Case, inputs: Inputs) -> Call:
        cross_entropy = load("quack.linear_cross_entropy").chunked_linear_cross_entropy
        hidden, weight = leaves(case, inputs)

        def run() -> Result:
            value = cross_entropy(hidden, weight, inputs.target, ignore_index=IGNORE)
            return gradients(case, value, hidden, weight)

        return run


def peers() -> list[Provider]:
    return [
        LigerChunked("liger", "liger-kernel", compiled=True),
        LigerChunked("liger[compiled=False]", "liger-kernel"),
        LigerCrossEntropy("liger[cross_entropy]", "liger-kernel"),
        CutCrossEntropy("cce[torch_compile]", "cut-cross-entropy", compiled=True, impl="torch_compile"),
        CutCrossEntropy("cce", "cut-cross-entropy", note="filters gradients below 2^-12"),
        CutCrossEntropy("cce[exact]", "cut-cross-entropy", exact=True),
        Trl("trl", "trl"),
        Quack("quack", "quack-kernels"),
    ]
