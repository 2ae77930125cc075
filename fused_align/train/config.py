"""Every setting of a training run: what is optimised (AlignConfig), which model, which data."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from dataclasses import dataclass, field
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from transformers import TrainingArguments

import fused_align as fa
from fused_align.backends import pick
from fused_align.linear.logp import check_precision
from fused_align.linear.plan import check_plan

_TERM = re.compile(
    r"\s*(?:(?P<weight>[0-9]*\.?[0-9]+(?:e-?[0-9]+)?)\s*\*\s*)?(?P<name>\w+)\s*"
)  # of a sum of losses
SWITCHES = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


@dataclass
class AlignConfig(TrainingArguments):
    """Hugging Face's TrainingArguments, and what the alignment needs.

    A row of the data set is one unit of per_device_train_batch_size: a pair, a judged completion, or a prompt
    with all its completions. The loss is normalised over the whole optimizer step, whatever the number of
    micro-batches and processes.
    """

    loss: str = field(
        default="dpo",
        metadata={
            "help": "A name of fa.Loss.registry (dpo, kto, grpo, ...), or a weighted sum: dpo + 0.5*sft "
            "(sft of the chosen answers, beside a loss on pairs)."
        },
    )
    loss_args: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Fields of the loss, e.g. {beta: 0.1}; of a sum by name, e.g. {dpo: {beta: 0.2}}. None "
            "takes its defaults."
        },
    )
    humanline: Any = field(
        default=None,
        metadata={
            "help": "Humanline clip of the token log-ratio: null (off), true (-1.5, 1.5), [low, high] in "
            "nats, or sampling (its stochastic original)."
        },
    )
    sync_every: int = field(
        default=1,
        metadata={
            "help": "With humanline: the reference takes the policy's weights every so many steps; 0 = never."
        },
    )
    max_length: int | None = field(
        default=1024,
        metadata={
            "help": "Tokens of prompt and completion; longer completions lose their end. null = no limit."
        },
    )
    scale_rewards: str = field(
        default="group",
        metadata={"help": "Policy losses: advantages are divided by the std of the group, or by none."},
    )
    reward_weights: list[float] | None = field(
        default=None,
        metadata={
            "help": "Policy losses: the weights of a completion's rewards, where it has several. null = 1."
        },
    )
    backend: str = field(default="auto", metadata={"help": "Of fa.align_loss."})
    plan: str = field(default="auto", metadata={"help": "Of fa.align_loss."})
    precision: str = field(default="high", metadata={"help": 'Of fa.align_loss: "high" or "bf16".'})
    workspace_mib: float | None = field(
        default=None, metadata={"help": "Memory that the loss may use, in MiB. null = the device's default."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay false: the collator reads them."}
    )

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "loss_args"]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.remove_unused_columns:
            raise ValueError(
                "AlignConfig: remove_unused_columns must be false: the collator reads columns of its own."
            )
        if self.bf16_full_eval or self.fp16_full_eval:
            raise ValueError(
                "AlignConfig: bf16_full_eval and fp16_full_eval would score the policy more coarsely than "
                "the reference it is compared with. Leave them off; bf16: true trains and scores under "
                "autocast."
            )
        if self.sync_every < 0:
            raise ValueError(f"AlignConfig: sync_every must be 0 (never) or more; got {self.sync_every}.")
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(
                "AlignConfig: max_length must leave room for a prompt and a completion; got "
                f"{self.max_length}."
            )
        if self.scale_rewards not in ("group", "none"):
            raise ValueError(
                f'AlignConfig: scale_rewards must be "group" or "none"; got {self.scale_rewards!r}.'
            )
        self._check_reward_weights()
        self._check_call_options()
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # there is nothing to pin for, and torch warns about it
        made = self.make_loss()
        if self.make_humanline() is not None and made.anchor is None:
            raise ValueError(
                f"AlignConfig: humanline clips a log-ratio against a reference, and {self.loss} has none. "
                "Drop humanline or choose another loss."
            )

    def _check_reward_weights(self) -> None:
        weights = self.reward_weights
        if weights is None:
            return
        if not isinstance(weights, (list, tuple)) or not weights:
            raise ValueError(
                "AlignConfig: reward_weights must be null or a list with a number for each reward, such as "
                f"[1.0, 0.5]; got {weights!r}."
            )
        self.reward_weights = [
            typed("AlignConfig: a weight of reward_weights", weight, float) for weight in weights
        ]
        if not all(math.isfinite(weight) for weight in self.reward_weights):
            raise ValueError(f"AlignConfig: reward_weights must be finite; got {self.reward_weights}.")

    def _check_call_options(self) -> None:
        """Before a model is loaded, and not in the first step."""
        try:
            check_plan(self.plan)
            pick(self.backend, self.device)
        except (ValueError, RuntimeError) as error:  # a RuntimeError where a backend cannot run here
            raise ValueError(f"AlignConfig: {error}") from error
        check_precision("AlignConfig", self.precision)
        workspace = typed("AlignConfig: workspace_mib", self.workspace_mib, float | None)
        if workspace is not None and not 0 < workspace < float("inf"):
            raise ValueError(
                "AlignConfig: workspace_mib must be above 0, or null for the device's default; got "
                f"{workspace}."
            )
        self.workspace_mib = workspace

    def make_loss(self) -> fa.Loss:
        """The loss that `loss` and `loss_args` describe.

        Raises:
            ValueError: an unknown name or field, or a value that is not of the field's type.
        """
        terms = [_TERM.fullmatch(term) for term in self.loss.split("+")]
        if len(terms) == 1 and terms[0] is not None and terms[0]["weight"] is None:
            return _make_loss(self.loss.strip(), self.loss_args or {})
        if not all(terms):
            raise ValueError(
                "AlignConfig: loss must be a name, or a sum of names with weights such as dpo + 0.5*sft; got "
                f"{self.loss!r}."
            )
        given: Any = self.loss_args or {}
        names = [term["name"] for term in terms if term is not None]
        if not isinstance(given, dict) or not set(given) <= {*names}:
            raise ValueError(
                f"AlignConfig: loss_args of the sum {self.loss!r} must map {names} to their fields; got "
                f"{given!r}."
            )
        if len(set(names)) < len(names):
            raise ValueError(f"AlignConfig: loss must name each of its parts once; got {self.loss!r}.")
        weights = [float(term["weight"] or 1) for term in terms if term is not None]
        losses = [_make_loss(name, given.get(name, {})) for name in names]
        if "sft" in names and any(loss.rows == "pair" for loss in losses):
            # beside losses on pairs it learns the chosen answers; the rejected ones only if asked to
            losses[names.index("sft")] = _make_loss("sft", {"chosen": True} | given.get("sft", {}))
        return fa.Sum(list(zip(weights, losses, strict=True)))

    def make_humanline(self) -> fa.Humanline | fa.HumanlineSampling | None:
        """None where the clip is off. Raises ValueError for anything but what `humanline` can be."""
        value = self.humanline
        if value is None or value is False:
            return None
        if value is True:
            return fa.Humanline()
        if value == "sampling":
            return fa.HumanlineSampling()  # draws from torch's own generator, which checkpoints hold
        if isinstance(value, (list, tuple)) and len(value) == 2:
            return fa.Humanline(
                *(typed("AlignConfig: a bound of humanline", bound, float) for bound in value)
            )
        raise ValueError(
            f"AlignConfig: humanline must be null, true, [low, high] in nats, or sampling; got {value!r}."
        )

    def make_schedule(self) -> fa.SyncSchedule | None:
        """When the reference takes the policy's weights; None: never."""
        if self.make_humanline() is None or self.sync_every == 0:
            return None
        return fa.SyncSchedule(self.sync_every)

    def call_options(self) -> dict[str, Any]:
        """How the loss is to be computed: keyword arguments of fa.align_loss and fa.linear_logp."""
        workspace = None if self.workspace_mib is None else int(self.workspace_mib * 2**20)
        chosen = {"backend": self.backend, "plan": self.plan, "precision": self.precision}
        return chosen | {"workspace_bytes": workspace}


@dataclass
class ModelConfig:
    """The model, and the LoRA adapter if one is trained (lora_r > 0)."""

    model_name_or_path: str = field(
        default="",
        metadata={
            "help": "A hub name, a folder, a .gguf file, or package:NAME/FILE of an installed package."
        },
    )
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit on the hub."})
    dtype: str = field(
        default="float32", metadata={"help": "Of the weights: float32, bfloat16, float16 or auto."}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "As in transformers: sdpa, eager, ..."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run model code from the hub."})
    lora_r: int = field(default=0, metadata={"help": "Rank of a LoRA adapter; 0 trains the whole model."})
    lora_alpha: float = field(default=32, metadata={"help": "LoRA scale: alpha / r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before the adapter."})
    lora_target_modules: Any = field(
        default="all-linear",
        metadata={"help": "Module names, a pattern, or all-linear (every linear but the head)."},
    )

    def peft_config(self) -> Any:
        """A peft.LoraConfig, or None to train the whole model."""
        if self.lora_r == 0:
            return None
        from peft import LoraConfig

        return LoraConfig(
            task_type="CAUSAL_LM",
            r=self.lora_r,
            lora_alpha=self.lora_alpha,  # pyright: ignore[reportArgumentType]  (peft takes floats too)
            lora_dropout=self.lora_dropout,
            revision=self.model_revision,  # of the base, for those who load the adapter
            target_modules=self.lora_target_modules,
        )


@dataclass
class DataConfig:
    """The rows to train and to evaluate on."""

    dataset: str = field(
        default="", metadata={"help": "A .jsonl or .json file, a folder, or a name on the hub."}
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of the data set on the hub."}
    )
    dataset_split: str = field(
        default="train", metadata={"help": "Split to train on, e.g. train or train[:90%]."}
    )
    eval_dataset: str | None = field(
        default=None, metadata={"help": "As dataset; held out. null: eval_split, or none."}
    )
    eval_split: str | None = field(
        default=None, metadata={"help": "Split to evaluate on, of eval_dataset or dataset."}
    )
    chat: bool = field(
        default=False,
        metadata={"help": "Wrap plain prompts and completions as a user's and an assistant's message."},
    )


def _make_loss(name: str, given: Any) -> fa.Loss:
    """The loss of that name with these fields. Raises ValueError."""
    known = fa.Loss.registry
    if name not in known:
        raise ValueError(f"AlignConfig: loss must be one of {sorted(known)}; got {name!r}{near(name, known)}")
    cls = known[name]
    if not isinstance(given, dict):
        raise ValueError(
            f"AlignConfig: loss_args must map fields of {cls.__name__} to values; got {given!r}."
        )
    fields, hints = {f.name for f in dataclasses.fields(cls) if f.init}, get_type_hints(cls)
    for name in given:
        if name not in fields:
            raise ValueError(
                f"AlignConfig: {cls.__name__} has no field {name!r}; it has "
                f"{sorted(fields)}{near(name, fields)}"
            )
    return cls(**{name: typed(f"AlignConfig: loss_args.{name}", x, hints[name]) for name, x in given.items()})


EXPECTED = {
    bool: "true or false (or yes, no, on, off)",
    int: "a whole number, written without a point",
    float: "a number",
    str: "text; put what looks like a number into quotes",
}


def typed(name: str, value: Any, hint: Any) -> Any:
    """The value as a setting of that type: yes, no, on, off as booleans, text that is a number as a float.

    Only bool, int, float and str, each with or without None, are looked at. Raises ValueError.
    """
    kinds = set(get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,))
    kind: Any = next(iter(kinds - {NoneType})) if len(kinds - {NoneType}) == 1 else None
    if kind not in EXPECTED or value is None and NoneType in kinds:
        return value
    if kind is bool and isinstance(value, str) and value.lower() in SWITCHES:
        return SWITCHES[value.lower()]
    if kind is float and isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            pass  # said below
    fits = isinstance(value, (int, float) if kind is float else kind)
    if not fits or isinstance(value, bool) and kind is not bool:
        raise ValueError(f"{name} must be {EXPECTED[kind]}; got {value!r}.")
    return value


def near(name: Any, known: Any) -> str:
    """The end of a sentence that names the closest known name, if one is close."""
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f". Did you mean {close[0]!r}?" if close else "."
