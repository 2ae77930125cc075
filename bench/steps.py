"""Whole training steps of random-weight models through the trainer, with the package and without it.

"fused_align" is AlignTrainer as it is, "eager" the same but for a loss through full logits, "trl" TRL's own
trainer; all with the same rows, first weights and optimizer, the reference's log-probs computed beforehand.
Timed are forward, backward, clipping and the optimizer, from on_step_begin to on_step_end; not fetching the
batch.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import math
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from . import report
from .cases import DTYPES
from .measure import MIN_ROUNDS, Row, about, sentence
from .peers import load, missing
from .providers import Provider
from .reference import IGNORE, loss_of

RESULTS = Path(__file__).parent / "results" / "steps.jsonl"
LIMITS = (24.0, 80.0, 141.0)  # GB, 1e9 bytes: of common cards
HEADROOM = 2**29  # bytes of the whole device that torch's allocator leaves to kernels and libraries
MOST_HELD = 2**29  # bytes that may stay allocated when a run is over: the workspaces of cuBLAS
SCORED = 2  # rows at a time under the reference, which must not take more memory than a step
WARM_UP = 2  # steps: the first of them compiles, and allocates the optimizer's state
SEED = 0
# what others than torch's allocator say: drivers, Triton, cuBLAS
NO_MEMORY = ("out of memory", "cublas_status_alloc_failed", "cublas_status_not_initialized")
WAYS = {
    "fused_align": Provider("fused_align", "fused-align", ours=True),
    "eager": Provider("eager", "torch"),
    "trl": Provider("trl", "trl"),
}
SEQUENCES = {"sft": 1, "dpo": 2, "grpo": 4}  # of one row of the data set
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
SIZES += ("num_key_value_heads", "tie_word_embeddings")
MODELS: dict[str, tuple[str, tuple[int, ...]]] = {  # the class of the config, and SIZES
    "Qwen2.5-0.5B": ("Qwen2Config", (151936, 896, 4864, 24, 14, 2, True)),
    "Qwen2.5-1.5B": ("Qwen2Config", (151936, 1536, 8960, 28, 12, 2, True)),
    "Qwen2.5-7B": ("Qwen2Config", (152064, 3584, 18944, 28, 28, 4, False)),
    "Llama-3-8B": ("LlamaConfig", (128256, 4096, 14336, 32, 32, 8, False)),
    "tiny": ("LlamaConfig", (512, 32, 48, 2, 2, 1, True)),  # for the tests
}


@dataclass(frozen=True)
class Task:
    """What is trained and how, but for the size of the batch. length: tokens of every sequence."""

    model: str
    loss: str
    way: str
    length: int
    dtype: str
    lora_r: int
    gradient_checkpointing: bool
    device: str

    @property
    def label(self) -> str:
        return f"{self.model}, {self.loss}, {self.way}"

    @property
    def prompt(self) -> int:
        """Tokens of the prompt, which are not learnt: the first quarter."""
        return self.length // 4

    @property
    def vocab(self) -> int:
        return MODELS[self.model][1][0]

    def tokens(self, rows: int) -> int:
        """Tokens that go through the model in a step; none is padding."""
        return rows * SEQUENCES[self.loss] * self.length


# ---- what is trained ------------------------------------------------------------------------------------


@lru_cache(maxsize=2)
def make_tokenizer(vocab: int) -> Any:
    """One token per word: <pad> is 0, <eos> is 1, and t17 is 17."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {"<pad>": 0, "<eos>": 1} | {f"t{i}": i for i in range(2, vocab)}
    words = Tokenizer(models.WordLevel(ids, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<pad>")


def make_rows(task: Task, count: int) -> Any:
    """A datasets.Dataset of so many rows of random words, in the format of the loss."""
    from datasets import Dataset

    generator = torch.Generator().manual_seed(SEED)

    def text(words: int) -> str:
        return " ".join(f"t{i}" for i in torch.randint(2, task.vocab, (words,), generator=generator).tolist())

    def row() -> dict[str, Any]:
        prompt = text(task.prompt) + " "
        answers = [text(task.length - task.prompt - 1) for _ in range(SEQUENCES[task.loss])]  # and <eos>
        if task.loss == "grpo":  # rewards all different, and none their mean: no advantage is 0
            return {"prompt": prompt, "completions": answers, "rewards": [0.0, 1.0, 2.0, 3.0]}
        names = ("chosen", "rejected") if task.loss == "dpo" else ("completion",)
        return {"prompt": prompt} | dict(zip(names, answers, strict=True))

    return Dataset.from_list([row() for _ in range(count)])


def make_model(task: Task) -> Any:
    """Random weights in the training dtype, made on the device: a host may have no room for 8B in float32."""
    import transformers

    kind, sizes = MODELS[task.model]
    config = getattr(transformers, kind)(
        **dict(zip(SIZES, sizes, strict=True)), pad_token_id=0, eos_token_id=1, bos_token_id=None
    )
    torch.manual_seed(SEED)
    with torch.device(task.device):
        return transformers.AutoModelForCausalLM.from_config(
            config, dtype=DTYPES[task.dtype], attn_implementation="sdpa"
        )


def full_logits_loss(name: str, logits: Tensor, labels: Tensor, fields: dict[str, Any]) -> Tensor:
    """The loss from logits [S, T, V] and labels [S, T], as `eager_logp` and `loss_of` have it.

    fields: advantage [S]; old_logp, ref_logp [S, T] of the token that a position predicts; None if not used.
    """
    target = labels[:, 1:]  # [S, T-1]
    logp = F.log_softmax(logits[:, :-1].float(), dim=-1)
    logp = logp.gather(-1, target.clamp(min=0)[..., None]).squeeze(-1).masked_fill(target == IGNORE, 0.0)
    shifted = {key: x[:, :-1] for key, x in fields.items() if key.endswith("_logp") and x is not None}
    inputs: Any = SimpleNamespace(target=target, **(fields | shifted))
    return loss_of(name, logp, inputs, False, length=target.shape[1])


def trainer_kind(task: Task) -> tuple[type, type, dict[str, Any]]:
    """The classes of the trainer and of its config, and the arguments that only this config has."""
    if task.way == "trl" and task.loss == "sft":
        return load("trl").SFTTrainer, load("trl").SFTConfig, {}
    if task.way == "trl":
        scored = {"precompute_ref_log_probs": True, "precompute_ref_batch_size": SCORED}
        return load("trl").DPOTrainer, load("trl").DPOConfig, scored
    from fused_align.train import AlignConfig, AlignTrainer

    class EagerTrainer(AlignTrainer):
        """Its loss is a mean over the micro-batch: for one micro-batch per step."""

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            arguments = {name: inputs[name] for name in ("input_ids", "attention_mask")}
            output = model(**arguments, use_cache=False)
            fields = self._anchors(inputs) | {"advantage": inputs.get("advantage")}
            loss = full_logits_loss(task.loss, output.logits, inputs["labels"], fields)
            return (loss, output) if return_outputs else loss

    return EagerTrainer if task.way == "eager" else AlignTrainer, AlignConfig, {"loss": task.loss}


def make_trainer(task: Task, rows: int, steps: int, folder: str, **settings: Any) -> Any:
    """The trainer of a way, with batches of so many rows; settings replace arguments of its config.

    The data set is one batch, which every step repeats: the reference scores all rows before the first step.
    RuntimeError: the batch has not the tokens that the results would say.
    """
    from transformers import PrinterCallback, TrainingArguments

    from fused_align.train import ModelConfig

    trainer_class, config, own = trainer_kind(task)
    # transformers renamed it in the course of release 5, and warns of the old name
    renamed = "activation_checkpointing" in TrainingArguments.__dataclass_fields__
    checkpointing = "activation_checkpointing" if renamed else "gradient_checkpointing"
    arguments = own | {
        "output_dir": folder, "seed": SEED, "max_steps": steps, "use_cpu": task.device == "cpu",
        "per_device_train_batch_size": rows, "gradient_accumulation_steps": 1, "max_length": None,
        "per_device_eval_batch_size": SCORED,
        "learning_rate": 1e-8,  # GRPO's ratios stay inside its clip, so that no token is left out
        "optim": "adamw_torch_fused" if task.device == "cuda" else "adamw_torch",
        "lr_scheduler_type": "constant", "bf16": False,  # the weights are in the training dtype: no autocast
        checkpointing: task.gradient_checkpointing, f"{checkpointing}_kwargs": {"use_reentrant": False},
        "dataloader_pin_memory": task.device == "cuda", "disable_tqdm": True,
        "report_to": "none", "logging_strategy": "no", "save_strategy": "no",
    }  # fmt: skip
    trainer = trainer_class(
        model=make_model(task), args=config(**(arguments | settings)), train_dataset=make_rows(task, rows),
        processing_class=make_tokenizer(task.vocab),
        peft_config=ModelConfig(lora_r=task.lora_r).peft_config(),
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(rows)])
    learnt = batch["completion_mask"] == 1 if "completion_mask" in batch else batch["labels"] != IGNORE
    found = (*batch["input_ids"].shape, int(batch["attention_mask"].sum()), int(learnt.sum()))
    sequences = rows * SEQUENCES[task.loss]
    whole = (sequences, task.length, task.tokens(rows), sequences * (task.length - task.prompt))
    if found != whole:
        raise RuntimeError(
            f"{task.label}: sequences, length, tokens and learnt tokens are {found}, and must be {whole}; do "
            "the trainers still end a completion with <eos>, and cut nothing?"
        )
    return trainer


# ---- one run of the trainer -----------------------------------------------------------------------------


def make_clock(device: str, enough: int, deadline: float) -> Any:
    """A TrainerCallback that adds (seconds, peak of allocated, of reserved bytes) to its `steps`; 0 on a CPU.

    After the deadline it ends the training once there are enough steps.
    """
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.steps: list[tuple[float, int, int]] = []

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            if device == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            self.begin = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if device == "cuda":
                torch.cuda.synchronize()
            peaks = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
            self.steps.append((time.perf_counter() - self.begin, *peaks))
            if len(self.steps) >= enough and time.monotonic() > deadline:
                control.should_training_stop = True

    return Clock()


def train(task: Task, rows: int, warm_up: int, rounds: int, deadline: float = math.inf) -> Row:
    """What a fresh model's steps of so many rows take, as fields of a row. Memory: None on a CPU."""
    clock = make_clock(task.device, warm_up + MIN_ROUNDS, deadline)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(task, rows, warm_up + rounds, folder)
        trainer.add_callback(clock)
        trainer.train()
    times, peaks, reserved = zip(*clock.steps[warm_up:], strict=True)
    seconds, cuts = (torch.tensor(x, dtype=torch.float64) for x in (times, (0.2, 0.5, 0.8)))
    low, middle, high = seconds.quantile(cuts).tolist()
    named = trainer.model.named_parameters()
    return {
        "rounds": len(times), "seconds": middle, "seconds_p20": low, "seconds_p80": high,
        "tokens_per_second": task.tokens(rows) / middle, "peak_bytes": max(peaks) or None,
        "reserved_bytes": max(reserved) or None,
        "parameters": sum(parameter.numel() for name, parameter in named if "lora_" not in name),
    }  # fmt: skip


def release(device: str) -> None:
    """Frees what a trainer held, which is full of cycles. RuntimeError: something holds it still."""
    gc.collect()
    if device == "cpu":
        return
    torch.cuda.empty_cache()
    held = torch.cuda.memory_allocated()
    if held > MOST_HELD:
        raise RuntimeError(
            f"{held >> 20} MiB are still allocated after a run, and {MOST_HELD >> 20} may be: they would "
            "count in what runs next. Measure each way in a process of its own (--ways)."
        )


def attempt(task: Task, rows: int, warm_up: int, rounds: int, deadline: float = math.inf) -> Row | None:
    """As `train`, which starts from released memory and leaves it so; None where memory does not suffice."""
    release(task.device)  # another way may have failed
    found = None
    try:
        found = train(task, rows, warm_up, rounds, deadline)
    except RuntimeError as error:
        said = str(error).lower()
        if not (isinstance(error, torch.OutOfMemoryError) or any(text in said for text in NO_MEMORY)):
            raise
    release(task.device)  # when the error is gone: its traceback holds tensors
    return found


# ---- the longest batch ----------------------------------------------------------------------------------


def longest(fits: Callable[[int], bool], in_time: Callable[[int], bool], low: int = 0) -> tuple[int, bool]:
    """The most rows that fit, to within 1/16 or a row, and whether the search came to its end.

    From low, which is known to fit, rows are doubled until they do not fit, then the interval is halved. It
    ends early where in_time says that there is no time to try so many rows.
    """
    high = None
    while high is None or high - low > max(1, low // 16):
        rows = max(1, 2 * low) if high is None else (low + high) // 2
        if not in_time(rows):
            return low, False
        if fits(rows):
            low = rows
        else:
            high = rows
    return low, True


def longest_batch(task: Task, allowed: int, known: dict[int, Row], deadline: float) -> Row:
    """The longest batch of which two steps fit into so many bytes; its time is that of the second.

    known: by rows, what has fitted under other limits; what fits under this one is added. The limit is that
    of torch's allocator: some hundred MB of CUDA's own come on top.
    """
    last = (1, 0.0)  # rows and seconds of the last try that fitted, all told

    def in_time(rows: int) -> bool:
        return time.monotonic() + last[1] * max(1.0, rows / last[0]) <= deadline

    def fits(rows: int) -> bool:
        nonlocal last
        begin = time.monotonic()
        found = attempt(task, rows, warm_up=1, rounds=1)
        if found is not None:
            known[rows], last = found, (rows, time.monotonic() - begin)
        return found is not None

    low = max((rows for rows, found in known.items() if found["reserved_bytes"] <= allowed), default=0)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, allowed / total))
    try:
        rows, finished = longest(fits, in_time, low)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    names = ("tokens_per_second", "peak_bytes", "reserved_bytes")
    found = {name: known[rows][name] if rows else None for name in names}
    found |= {"tokens": task.tokens(rows), "at_least": not finished, "limit_bytes": allowed}
    return {"rows": rows} | found


# ---- the command ----------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    cuda, add = torch.cuda.is_available(), parser.add_argument
    add("--models", nargs="+", default=["Qwen2.5-0.5B"], choices=MODELS)
    add("--losses", nargs="+", default=list(SEQUENCES), choices=SEQUENCES)
    add("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    add("--length", type=int, default=1024, help="tokens of every sequence, a quarter of them the prompt")
    add("--sequences", type=int, default=8, help="of the batch that is timed")
    add("--steps", type=int, default=10, help=f"how many to time, after {WARM_UP} others")
    limits = "memory that the longest batch is to fit into; without a number there is no search"
    add("--limits", type=float, nargs="*", default=list(LIMITS), metavar="GB", help=limits)
    add("--dtype", choices=sorted(DTYPES), default="bfloat16" if cuda else "float32")
    add("--lora-r", type=int, default=0, metavar="R", help="rank of a LoRA adapter; 0: all weights")
    add("--gradient-checkpointing", action=argparse.BooleanOptionalAction, default=True)
    add("--minutes", type=float, default=0.0, help="what it may take: searches end before; 0: any")
    add("--device", default="cuda" if cuda else "cpu", choices=("cpu", "cuda"))
    add("--out", help="file of rows; default: bench/results/steps.jsonl")


def tasks_of(args: argparse.Namespace) -> list[Task]:
    """Every model with every loss in every way. Raises ValueError for numbers that cannot be."""
    if any(args.sequences <= 0 or args.sequences % SEQUENCES[loss] for loss in args.losses):
        wanted = ", ".join(f"{SEQUENCES[loss]} for {loss}" for loss in args.losses)
        raise ValueError(f"--sequences must be a multiple of those of a row, {wanted}; got {args.sequences}.")
    for name, value, least in (("length", args.length, 8), ("steps", args.steps, 2)):
        if value < least:
            raise ValueError(f"--{name} must be at least {least}; got {value}.")
    plain = Task("", "", "", args.length, args.dtype, args.lora_r, args.gradient_checkpointing, args.device)
    names = [(model, loss, way) for model in args.models for loss in args.losses for way in args.ways]
    return [replace(plain, model=model, loss=loss, way=way) for model, loss, way in names]


def why_not(task: Task) -> str | None:
    """None if the way has a trainer for the loss here, else a sentence."""
    if task.way == "trl" and task.loss == "grpo":
        return "TRL's GRPOTrainer samples its completions within the step"
    return missing("trl", "trl") if task.way == "trl" else None


def fill(row: Row, task: Task, args: argparse.Namespace, deadline: float) -> None:
    """Adds to the row what the given batch takes and, on a GPU, the longest batch under each limit."""
    rows, known = args.sequences // SEQUENCES[task.loss], {}
    found = attempt(task, rows, WARM_UP, args.steps, deadline)
    if found is None:
        row["failed"] = f"out of memory: {task.tokens(rows)} tokens do not fit"
    else:
        known[rows] = found
        row |= found
    if task.device == "cpu":
        return
    whole = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - HEADROOM
    limits, by_bytes = sorted(set(args.limits)), {}
    for index, limit in enumerate(limits):
        allowed, now = min(int(limit * 1e9), whole), time.monotonic()
        if allowed not in by_bytes:  # limits above the device's memory are all the same
            share = now + (deadline - now) / (len(limits) - index)
            by_bytes[allowed] = longest_batch(task, allowed, known, share)
        row["fits"][f"{limit:g}"] = by_bytes[allowed] | {"whole_device": allowed == whole}
    shared = [f"{limit} GB" for limit, fit in row["fits"].items() if fit["whole_device"]]
    row["note"] = f"{', '.join(shared)}: the whole device" if shared else ""


def run(args: argparse.Namespace, console: Console, show: Callable[[str, list[Row]], None]) -> int:
    """Measures, appends a row for each way, shows them; 1 if one failed for more than want of memory."""
    # before these libraries are imported; TRL would call home
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    tasks, out = tasks_of(args), Path(args.out) if args.out else RESULTS
    begin = time.monotonic()
    end = begin + 60 * args.minutes if args.minutes else math.inf
    rows, said = [], []
    if args.device == "cpu":
        said.append("On a CPU the longest batch is not searched for: running out of memory is no exception.")
    failures = 0
    for index, task in enumerate(tasks):
        now = time.monotonic()
        reason = why_not(task) or ("the time was up" if now > end else None)
        if reason is not None:
            said.append(f"not run: {task.label}: {reason}")
            continue
        row = about_row(task, args.sequences)
        try:
            with console.status(f"{index + 1} of {len(tasks)}: {task.label}"):
                fill(row, task, args, now + (end - now) / (len(tasks) - index))
        except Exception as error:  # the next may do; the row, the exit status and the traceback tell of it
            row["failed"] = sentence(error)
            said.append(f"failed: {task.label}: {traceback.format_exc()}")
            failures += 1
        report.append(out, [row])
        rows.append(row)
    if rows:
        show(f"training steps on {args.device}", rows)
    for line in said:
        console.print(line, style="yellow", markup=False, highlight=False)
    console.print(f"{time.monotonic() - begin:.0f} s. Rows are in {out}.", markup=False)
    return 1 if failures else 0


# ---- rows -----------------------------------------------------------------------------------------------


def about_row(task: Task, sequences: int) -> Row:
    """A row before anything has run, with the fields that all rows of bench share."""
    return {
        "shape": task.model, "rows": sequences * task.length, "hidden": MODELS[task.model][1][1],
        "vocab": task.vocab, "dtype": task.dtype, "logits": "model", "mode": task.loss + report.STEP,
        "live": 1 - task.prompt / task.length, "dead": 0.0, "dead_by": "sequences", "provider": task.way,
        **about(WAYS[task.way], task.device), "transformers": importlib.metadata.version("transformers"),
        "sequences": sequences, "length": task.length, "lora_r": task.lora_r,
        "gradient_checkpointing": task.gradient_checkpointing, "fits": {}, "note": "",
    }  # fmt: skip
