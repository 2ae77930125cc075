"""What AlignTrainer cannot train is refused before anything is touched, each with a sentence."""

from __future__ import annotations

from typing import Any

from accelerate.utils import DistributedType
from datasets import Dataset
from torch import nn

from ..integrations.transformers import head_of, is_plain, probe, same_logits, scoring
from .config import AlignConfig


def arguments(args: Any, tokenizer: Any) -> None:
    """Settings of TrainingArguments that mean something else here, or nothing."""
    if not isinstance(args, AlignConfig):
        raise TypeError(
            f"AlignTrainer: args must be an AlignConfig; got {_kind(args)}. It has all fields of "
            "TrainingArguments, and the loss: fused_align.train.AlignConfig(output_dir=..., loss=...)."
        )
    if tokenizer is None:
        raise ValueError("AlignTrainer: processing_class is None; give the model's tokenizer.")
    if args.n_gpu > 1:
        raise ValueError(
            f"AlignTrainer: {args.n_gpu} GPUs in one process would split pairs and groups. Launch one "
            "process per GPU with torchrun or accelerate launch, or show it a single GPU "
            "(CUDA_VISIBLE_DEVICES)."
        )
    for name in ("dispatch_batches", "split_batches"):
        if getattr(args.accelerator_config, name, None):
            raise ValueError(
                f"AlignTrainer: accelerator_config has {name}=True, by which accelerate cuts a batch into "
                "one part per process, chosen answers from rejected ones. Leave it off: every process makes "
                "batches of its own."
            )
    if args.label_smoothing_factor != 0:
        raise ValueError(
            f"AlignTrainer: label_smoothing_factor={args.label_smoothing_factor} is Trainer's, of a "
            "cross-entropy over logits that are not formed here. Use the loss's own where it has one: "
            "loss_args: {label_smoothing: ...}."
        )
    if args.use_liger_kernel and (args.liger_kernel_config or {}).get("fused_linear_cross_entropy", True):
        raise ValueError(
            "AlignTrainer: use_liger_kernel would replace the forward that computes the loss by its fused "
            "linear cross entropy. Set liger_kernel_config: {fused_linear_cross_entropy: false} to keep its "
            "other kernels, or drop use_liger_kernel."
        )
    sharded = (
        args.fsdp
        or args.distributed_state is not None
        and (args.distributed_state.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED))
    )
    if sharded and args.make_schedule() is not None:
        raise NotImplementedError(
            "AlignTrainer: Humanline syncing copies whole weights, which FSDP and DeepSpeed shard; that is "
            "not supported yet. Use DDP, or sync_every: 0."
        )


def model(given: Any) -> None:
    """A module, and without an adapter, be it peft's own model or one injected into its layers."""
    if not isinstance(given, nn.Module):
        raise TypeError(
            f"AlignTrainer: model must be a causal language model; got {_kind(given)}. Load one first: "
            "model, tokenizer = fused_align.train.load_model(name)."
        )
    injected = getattr(given, "_hf_peft_config_loaded", False) or any(
        hasattr(module, "base_layer") for module in given.modules()
    )
    if injected or hasattr(given, "disable_adapter"):
        raise ValueError(
            "AlignTrainer: the model already has an adapter, and the initial model would be the one below "
            "it. Merge it (model.merge_and_unload(), or fused_align.train.load_model(folder), which does), "
            "and pass peft_config to train a fresh one."
        )


def datasets(train_dataset: Any, eval_dataset: Any) -> None:
    held_out = eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]
    for dataset in (train_dataset, *held_out):
        if dataset is not None and not isinstance(dataset, Dataset):
            raise ValueError(
                f"AlignTrainer: got a {type(dataset).__name__}, expected a datasets.Dataset: rows are read "
                "more than once, by their number. Load a streamed set without streaming=True, or make one "
                "with Dataset.from_list."
            )


def adapter(peft_config: Any) -> None:
    if getattr(peft_config, "is_prompt_learning", False):
        raise ValueError(
            f"AlignTrainer: {type(peft_config).__name__} puts virtual tokens before the prompt, and the "
            "positions of the log-probs would no longer be those of the labels. Use LoRA, or another method "
            "that changes weights."
        )
    if getattr(peft_config, "peft_type", None) == "ADALORA":
        raise ValueError(
            "AlignTrainer: AdaLoRA adds a term to the loss inside the model's outputs, which are those of a "
            "cross-entropy then. Use LoRA or DoRA."
        )
    if getattr(peft_config, "bias", "none") not in ("none", False, None):
        raise ValueError(
            f"AlignTrainer: bias={peft_config.bias!r} of the adapter's config trains biases of the base "
            "itself, and the initial model, what margins are measured against, is the base with adapters "
            'off. Set bias to "none".'
        )


def adapted(model: Any) -> None:
    """A fresh adapter must change nothing: the initial model is the one with adapters off.

    Four tokens are run with and without it, except where parameters are sharded.
    """
    if not all(is_plain(parameter) for parameter in model.parameters()):
        return
    weight = head_of(model).weight
    arguments = probe(weight)
    with scoring(model):
        on = model(**arguments).logits
        with model.disable_adapter():
            off = model(**arguments).logits
    if not same_logits(off, on, weight.dtype):
        raise ValueError(
            "AlignTrainer: the fresh adapter changes the model before the first step: logits differ by "
            f"{(on - off).abs().max().item():.3g}. The initial model, what margins are measured against, is "
            "the one with adapters off, and that would not be the model you gave. Choose an initialisation "
            "that starts at the base, if the method has one (of LoRA: init_lora_weights=True, and not pissa, "
            "olora or False), and load the model again: some alter its weights."
        )


def trainable(model: nn.Module) -> None:
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "AlignTrainer: no parameter of the model requires a gradient, so nothing would be learnt. Set "
            "requires_grad_(True) on what is to be trained, or pass peft_config."
        )


def _kind(value: Any) -> str:
    return f"the text {value!r}" if isinstance(value, str) else f"a {type(value).__name__}"
