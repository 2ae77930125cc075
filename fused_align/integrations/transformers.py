"""Hugging Face transformers: a causal LM whose own forward computes the alignment loss, without logits.

    attach(model)
    out = model(input_ids=..., attention_mask=..., align=AlignRequest(batch, fa.DPO()))      # AlignOutput
    logp = model(input_ids=..., attention_mask=..., align=AlignRequest(target=target))       # [B, T], scoring

The loss is computed inside `forward`, so the hooks of DDP, FSDP and ZeRO fire as for any other loss. Called
without `align` the model behaves as before.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from .. import Batch, Loss, align_loss, linear_logp
from ..humanline import RatioClip
from ..losses.base import Normalizer

# What the configs of transformers 5 call the scale and the cap that turn lm_head's output into logits.
MULTIPLIERS = ("logit_scale", "output_multiplier", "lm_head_multiplier")  # Cohere, Muse, Falcon-H1
DIVISOR = "logits_scaling"  # Granite, MiniCPM3; HyperCLOVA X multiplies by it
SOFTCAPS = (
    "final_logit_softcapping",
    "logits_soft_cap",
    "output_logit_soft_cap",
)  # Gemma, RecurrentGemma, xLSTM
MULTIPLIES_BY_DIVISOR = ("hyperclovax", "hyperclovax_vision_v2")
IGNORES_ITS_SCALE = ("mpt",)  # has logit_scale in its config, and a forward that never reads it


@dataclass(frozen=True)
class Head:
    """The language-model head: logits = softcap(logit_scale * (hidden @ weight.T + bias)).

    weight [V, H]; bias [V] or None; softcap None or the cap c of c * tanh(x / c).
    """

    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    logit_scale: float
    softcap: float | None

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of linear_logp and align_loss, weight apart."""
        return {"bias": self.bias, "logit_scale": self.logit_scale, "softcap": self.softcap}

    def logits(self, hidden: Tensor) -> Tensor:  # [..., H] -> [..., V]
        """Full logits in float32, for checks on a handful of positions."""
        bias = None if self.bias is None else self.bias.float()
        logits = self.logit_scale * nn.functional.linear(hidden.float(), self.weight.float(), bias)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


class AlignRequest:
    """What `forward(..., align=...)` is to compute: a loss (batch and loss), or log-probs only (target).

    Args:
        batch, loss, humanline, normalizer: as for `align_loss`; the forward returns its AlignOutput.
        target: [B, T] int64, already shifted, -100 ignored; the forward returns log-probs [B, T] in nats.
        kwargs: backend, plan, precision, workspace_bytes, temperature of the call.

    Raises:
        ValueError: neither or both of (batch, loss) and target are given.
    """

    # Not a dataclass: FSDP would go into one and round its float tensors to the compute dtype.
    def __init__(
        self,
        batch: Batch | None = None,
        loss: Loss | None = None,
        *,
        humanline: RatioClip | None = None,
        normalizer: Normalizer = None,
        target: Tensor | None = None,  # [B, T]
        kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        if (batch is None) != (loss is None) or (batch is None) == (target is None):
            given = [
                name for name, x in (("batch", batch), ("loss", loss), ("target", target)) if x is not None
            ]
            raise ValueError(
                "AlignRequest: give batch and loss to train, or target alone to score; got "
                f"{given or 'nothing'}."
            )
        self.batch, self.loss, self.humanline = batch, loss, humanline
        self.normalizer, self.target, self.kwargs = normalizer, target, dict(kwargs or {})

    def compute(self, hidden: Tensor, head: Head) -> Any:  # hidden [B, T, H]
        options = head.arguments() | self.kwargs
        if self.target is not None:
            return linear_logp(hidden, head.weight, self.target, **options)
        assert self.batch is not None and self.loss is not None
        return align_loss(
            hidden,
            head.weight,
            self.batch,
            self.loss,
            humanline=self.humanline,
            normalizer=self.normalizer,
            **options,
        )


def innermost(model: Any) -> Any:
    """The transformers model below DDP, FSDP1, torch.compile and peft wrappers."""
    while True:
        if hasattr(model, "get_base_model"):  # peft
            model = model.get_base_model()
        elif hasattr(model, "_orig_mod"):  # torch.compile
            model = model._orig_mod
        elif hasattr(model, "module") and isinstance(model.module, nn.Module):  # DDP, FSDP1, DeepSpeed
            model = model.module
        else:
            return model


def head_of(model: nn.Module) -> Head:
    """The head of a causal LM: output embeddings, and the scale and cap that its config names.

    Raises:
        ValueError: the model has no output embeddings, or is an encoder-decoder.
        NotImplementedError: the head is wrapped by peft, or its weight is sharded (DTensor, ZeRO-3).
    """
    inner = innermost(model)
    name = type(inner).__name__
    head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    if head is None or not isinstance(getattr(head, "weight", None), Tensor):
        raise ValueError(
            f"head_of: {name} has no output embeddings with a weight [V, H]. Load a causal language model "
            "(AutoModelForCausalLM)."
        )
    if hasattr(head, "base_layer") or hasattr(head, "modules_to_save"):
        raise NotImplementedError(
            f"head_of: peft wraps the language-model head of {name} (an adapter on lm_head, or "
            "modules_to_save). Its product is not computed here yet. Take lm_head out of target_modules "
            "and modules_to_save."
        )
    if not is_plain(head.weight):
        raise NotImplementedError(
            f"head_of: the head's weight is sharded ({type(head.weight).__name__} "
            f"{list(head.weight.shape)}). Sharded heads are not supported yet: keep lm_head in the root "
            "FSDP unit, and use ZeRO-1 or 2."
        )
    config = inner.config
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"head_of: {name} is an encoder-decoder; a decoder-only causal language model is needed."
        )
    text = config.get_text_config()
    softcap = next((cap for cap in (getattr(text, key, None) for key in SOFTCAPS) if cap), None)
    return Head(head.weight, getattr(head, "bias", None), _logit_scale(text), softcap)


def _logit_scale(config: Any) -> float:
    if config.model_type in IGNORES_ITS_SCALE:
        return 1.0
    for key in MULTIPLIERS:
        scale = getattr(config, key, None)
        if scale is not None:
            return float(scale)
    scale = getattr(config, DIVISOR, None)
    if scale is None:
        return 1.0
    return float(scale) if config.model_type in MULTIPLIES_BY_DIVISOR else 1.0 / float(scale)


def is_plain(weight: Tensor) -> bool:
    """False for a DTensor, for a ZeRO-3 parameter that is not gathered, and on the meta device."""
    return not (
        hasattr(weight, "placements") or hasattr(weight, "ds_id") and weight.numel() == 0 or weight.is_meta
    )


def attach(model: nn.Module) -> nn.Module:
    """Teaches the causal LM in `model` the keyword argument `align` (an AlignRequest). Returns `model`.

    The forward of the innermost model is replaced on the instance; wrap it in peft, DDP or FSDP before or
    after. Four tokens are run through the model's own forward, to check that its logits are those of
    `head_of(model)`: a model that does something else between its decoder and its logits is refused here
    instead of being trained on wrong log-probs. (The check is left out where parameters are sharded.)

    Raises:
        ValueError: the model's logits are not its head's, or it adds a router loss of its own.
        as `head_of`.
    """
    inner = innermost(model)
    if _is_attached(inner):
        return model
    if getattr(inner.config.get_text_config(), "output_router_logits", False):
        raise ValueError(
            f"attach: {type(inner).__name__} has output_router_logits=True, a load-balancing loss that "
            "would be lost here. Set model.config.output_router_logits = False."
        )
    if all(is_plain(parameter) for parameter in inner.parameters()):
        _check_head(inner)
    # kept on the instance, not in a closure, so that copy.deepcopy(model) rebinds it to the copy
    vars(inner)["_forward_without_align"] = inner.forward
    vars(inner)["forward"] = MethodType(_forward_like(type(inner).forward), inner)
    return model


def _forward_like(own: Callable[..., Any]) -> Callable[..., Any]:
    """A forward that takes `align`, under the name and signature of the model's own."""

    def forward(self: Any, *args: Any, align: AlignRequest | None = None, **kwargs: Any) -> Any:
        if align is None:
            return self._forward_without_align(*args, **kwargs)
        kwargs = {"use_cache": False} | {key: value for key, value in kwargs.items() if value is not None}
        kwargs["return_dict"] = True
        return align.compute(decoder_of(self)(*args, **kwargs).last_hidden_state, head_of(self))

    # Not functools.wraps: accelerate.unwrap_model follows __wrapped__ and would take the attachment off.
    forward.__name__, forward.__doc__ = own.__name__, own.__doc__
    vars(forward)["__signature__"] = inspect.signature(own)  # generate() and Trainer read it
    vars(forward)["takes_align"] = True
    return forward


def _is_attached(inner: nn.Module) -> bool:
    """Whether forward is still ours, be it under accelerate's autocast: others may have replaced it since."""
    forward = vars(inner).get("forward")
    return forward is not None and hasattr(inspect.unwrap(forward), "takes_align")


def decoder_of(model: Any) -> nn.Module:
    """The part of a causal LM below its head: what yields the last hidden states."""
    return model.base_model if model.base_model is not model else model.get_decoder()


@contextmanager
def scoring(model: nn.Module) -> Iterator[None]:
    """No gradients and no dropout: nothing is drawn from the random number generators."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def probe(weight: Tensor) -> dict[str, Any]:  # [V, H], the head's
    """Arguments of a forward over four tokens, to see what a model computes."""
    tokens = torch.arange(4, device=weight.device).remainder(weight.shape[0])[None]  # [1, 4]
    return {"input_ids": tokens, "use_cache": False}


def same_logits(own: Tensor, other: Tensor, dtype: torch.dtype) -> bool:  # [1, 4, V] each
    """Whether both are one model's. 16-bit weights (dtype) round; an omitted scale is off by far more."""
    own, other = own.float(), other.float()
    limit = 1e-3 if dtype in (torch.float32, torch.float64) else 4e-2
    return own.shape == other.shape and bool((own - other).abs().max() <= limit * own.abs().max())


def _check_head(model: Any) -> None:
    head = head_of(model)
    arguments = probe(head.weight)
    with scoring(model):
        own = model(**arguments).logits
        ours = head.logits(decoder_of(model)(**arguments).last_hidden_state)
    if not same_logits(own, ours, head.weight.dtype):
        raise ValueError(
            f"attach: the logits of {type(model).__name__} are not scale * cap(hidden @ weight.T + bias) "
            f"with logit_scale={head.logit_scale} and softcap={head.softcap}, read from its config. Its "
            "forward does something else after the decoder; training on it would use wrong log-probs. "
            "Please report the model."
        )
