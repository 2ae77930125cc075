"""The benchmark of whole steps: its rows, its three ways against each other, its search, its command."""

from __future__ import annotations

import argparse
import gc
import importlib.util
import math
import os
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # as `run` has it; read when the library is imported
if not torch.cuda.is_available():  # as tests/conftest.py has it
    os.environ.setdefault("TRITON_INTERPRET", "1")

pytest.importorskip("transformers", reason="the trainer needs pip install '.[train]'")

from . import report, steps
from .cases import Case
from .steps import Task

# peft 0.21 asks transformers 5 for an attribute by its old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TINY = Task("tiny", "dpo", "fused_align", 24, "float32", 0, False, "cpu")
LOSSES = list(steps.SEQUENCES)


def trained(task: Task, folder: Path, **settings: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of three large steps, which move log-ratios into GRPO's clip, and the weights after them."""
    defaults: dict[str, Any] = {"logging_strategy": "steps", "logging_steps": 1, "optim": "sgd"}
    defaults |= {"learning_rate": 0.5, "max_grad_norm": 0.0}
    trainer = steps.make_trainer(task, 2, 3, str(folder), **(defaults | settings))
    trainer.train()
    weights = {name: x.detach() for name, x in trainer.model.named_parameters() if x.requires_grad}
    return [log["loss"] for log in trainer.state.log_history if "loss" in log], weights


# ---- what is trained ------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [8, 23])
@pytest.mark.parametrize("loss", LOSSES)
def test_rows_have_the_tokens_asked_for(loss: str, length: int, tmp_path: Path) -> None:
    task = replace(TINY, loss=loss, length=length)
    dataset = steps.make_trainer(task, 3, 1, str(tmp_path)).train_dataset
    per_row = steps.SEQUENCES[loss]
    assert [[len(tokens) for tokens in row] for row in dataset["input_ids"]] == [[length] * per_row] * 3
    assert set(sum(dataset["prompt_lengths"], [])) == {length // 4}
    assert all(tokens[-1] == 1 and 1 not in tokens[:-1] for row in dataset["input_ids"] for tokens in row)
    if loss == "grpo":
        assert all(0 not in advantages for advantages in dataset["advantages"])


def test_a_batch_of_other_tokens_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="sequences, length, tokens"):
        steps.make_trainer(TINY, 2, 1, str(tmp_path), max_length=TINY.length - 1)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_eager_is_the_same_training(loss: str, checkpointing: bool, tmp_path: Path) -> None:
    task = replace(TINY, loss=loss, gradient_checkpointing=checkpointing)
    ours, weights = trained(task, tmp_path)
    theirs, eager_weights = trained(replace(task, way="eager"), tmp_path)
    assert len(ours) == 3 and ours[0] != pytest.approx(ours[-1], abs=1e-3)  # it has learnt something
    assert theirs == pytest.approx(ours, rel=1e-5, abs=1e-5)
    for name, weight in weights.items():
        torch.testing.assert_close(eager_weights[name], weight, rtol=1e-4, atol=1e-5)


def test_eager_is_the_same_training_of_an_adapter(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    task = replace(TINY, lora_r=2, gradient_checkpointing=True)
    ours, weights = trained(task, tmp_path)
    theirs, eager_weights = trained(replace(task, way="eager"), tmp_path)
    assert theirs == pytest.approx(ours, rel=1e-5, abs=1e-5)
    assert weights and all("lora_" in name for name in weights)
    for name, weight in weights.items():
        torch.testing.assert_close(eager_weights[name], weight, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed")
@pytest.mark.parametrize("loss", ["sft", "dpo"])
def test_trl_is_the_same_training(loss: str, tmp_path: Path) -> None:
    ours, _ = trained(replace(TINY, loss=loss), tmp_path)
    theirs, _ = trained(replace(TINY, loss=loss, way="trl"), tmp_path)
    assert theirs == pytest.approx(ours, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("name", [name for name in steps.MODELS if name != "tiny"])
def test_models_have_the_sizes_of_their_names(name: str) -> None:
    model = steps.make_model(replace(TINY, model=name, dtype="bfloat16", device="meta"))
    billions = float(name.split("-")[-1 if "Llama" in name else 1].rstrip("B"))
    own = (
        sum(x.numel() for x in model.parameters() if x.dim() > 1)
        - model.get_input_embeddings().weight.numel()
    )
    assert 0.6 * billions < own / 1e9 < 1.1 * billions
    assert {x.dtype for x in model.parameters()} == {torch.bfloat16}
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == steps.MODELS[name][1][-1]


# ---- the search -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("low", [0, 1, 8])
@pytest.mark.parametrize("most", [0, 1, 2, 3, 15, 16, 17, 100, 1000, 4097])
def test_the_search_finds_the_longest(most: int, low: int) -> None:
    if low > most:
        return
    asked: list[int] = []

    def fits(rows: int) -> bool:
        fitting = max([low, *(x for x in asked if x <= most)])
        failing = min((x for x in asked if x > most), default=math.inf)
        assert fitting < rows < failing and rows <= max(
            1, 2 * fitting
        )  # never what is known, never far beyond
        asked.append(rows)
        return rows <= most

    found, finished = steps.longest(fits, lambda rows: True, low)
    assert finished and found <= most and most - found <= max(0, found // 16)
    assert len(asked) <= 2 + math.log2(max(most, 1)) + 5


def test_the_search_stops_when_there_is_no_time() -> None:
    asked: list[int] = []

    def fits(rows: int) -> bool:
        asked.append(rows)
        return rows <= 100

    assert steps.longest(fits, lambda rows: len(asked) < 5) == (16, False)
    assert asked == [1, 2, 4, 8, 16]
    assert steps.longest(fits, lambda rows: rows < 100) == (64, False)
    assert steps.longest(fits, lambda rows: False) == (0, False)


class Memory:
    """Stands in for a GPU of so many bytes and for `train` on it: a row takes 10 bytes and a second."""

    def __init__(self, total: int) -> None:
        self.total, self.allowed, self.now, self.asked = total, total, 0.0, []

    def train(self, task: Task, rows: int, warm_up: int, rounds: int, deadline: float = math.inf) -> dict:
        self.asked.append(rows)
        self.now += rows
        if 10 * rows > self.allowed:
            raise torch.OutOfMemoryError("no")
        return {"tokens_per_second": 1.0 * rows, "peak_bytes": 9 * rows, "reserved_bytes": 10 * rows}

    def limit(self, fraction: float) -> None:
        self.allowed = round(fraction * self.total)


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Memory:
    made = Memory(2000)
    monkeypatch.setattr(steps, "train", made.train)
    monkeypatch.setattr(steps, "release", lambda device: None)  # there is nothing, and it takes its time
    monkeypatch.setattr(steps.time, "monotonic", lambda: made.now)
    properties = argparse.Namespace(total_memory=made.total)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", made.limit)
    return made


def test_the_longest_batch_under_a_limit(memory: Memory) -> None:
    known: dict[int, dict] = {}
    found = steps.longest_batch(TINY, 1000, known, math.inf)
    assert 95 <= found["rows"] <= 100 and found["tokens"] == TINY.tokens(found["rows"])
    assert found["peak_bytes"] == 9 * found["rows"] and found["tokens_per_second"] == found["rows"]
    assert found["at_least"] is False and found["limit_bytes"] == 1000
    assert memory.allowed == memory.total  # the limit is taken back
    memory.asked.clear()
    more = steps.longest_batch(TINY, 2000, known, math.inf)
    assert memory.asked[0] == 2 * found["rows"] and more["rows"] > found["rows"]  # goes on from what is known


def test_the_longest_batch_by_a_deadline(memory: Memory) -> None:
    found = steps.longest_batch(TINY, 1000, {}, deadline=20.0)
    assert found["at_least"] and found["rows"] == 8 and memory.now <= 20  # 16 rows would take until 31


def test_nothing_fits(memory: Memory) -> None:
    found = steps.longest_batch(TINY, 9, {}, math.inf)
    assert (found["rows"], found["tokens"], found["tokens_per_second"], found["at_least"]) == (
        0,
        0,
        None,
        False,
    )


def test_the_row_of_a_gpu(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1900, 2000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 50)
    monkeypatch.setattr(steps, "HEADROOM", 150)  # which leaves 1800 bytes: 180 rows
    row = steps.about_row(TINY, 20)
    limits = [x / 1e9 for x in (5000.0, 500.0, 1800.0)]
    args = argparse.Namespace(sequences=20, steps=5, limits=limits)
    steps.fill(row, replace(TINY, device="cuda"), args, math.inf)
    assert row["tokens_per_second"] == 10 and row["reserved_bytes"] == 100
    small, whole, beyond = (row["fits"][f"{x / 1e9:g}"] for x in (500, 1800, 5000))
    assert memory.asked[:3] == [10, 20, 40]  # the batch itself, then on from it
    assert 47 <= small["rows"] <= 50 and not small["whole_device"]
    assert 170 <= whole["rows"] <= 180 and whole["whole_device"] and whole == beyond
    assert row["note"] == "1.8e-06 GB, 5e-06 GB: the whole device"


def test_the_clock_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda name=name: called.append(name))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 4)
    clock, control = steps.make_clock("cuda", 2, deadline=-math.inf), argparse.Namespace()
    clock.on_step_begin(None, None, control, model=None)
    clock.on_step_end(None, None, control, model=None)
    assert called == ["synchronize", "reset_peak_memory_stats", "synchronize"]
    assert clock.steps[0][0] > 0 and clock.steps[0][1:] == (3, 4) and not vars(control)
    clock.on_step_end(None, None, control)
    assert control.should_training_stop  # two are enough, and it is late


def test_what_is_still_held_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 2**30)
    with pytest.raises(RuntimeError, match="1024 MiB are still allocated after a run, and 512 may be"):
        steps.release("cuda")


# ---- running out of memory ------------------------------------------------------------------------------


def watched(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception] | None, said: str = "made up"
) -> list[weakref.ref]:
    """References to the model, one per step of the package's trainer, whose second raises the error."""
    from fused_align.train import AlignTrainer

    inner: Callable[..., Any] = AlignTrainer.compute_loss
    models: list[weakref.ref] = []

    def compute_loss(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        models.append(weakref.ref(model))
        held = inner(self, model, *args, **kwargs)
        if len(models) == 2 and error is not None:
            raise error(said)  # a new one: its traceback holds the model
        return held

    monkeypatch.setattr(AlignTrainer, "compute_loss", compute_loss)
    return models


@pytest.mark.parametrize("error", [None, torch.OutOfMemoryError])
def test_a_run_is_released(error: type[Exception] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    models = watched(monkeypatch, error)
    gc.disable()  # it is for `attempt` to collect
    try:
        found = steps.attempt(TINY, 1, warm_up=1, rounds=2)
    finally:
        gc.enable()
    assert all(model() is None for model in models)
    if error is not None:
        assert found is None and len(models) == 2
    else:
        assert found is not None and found["rounds"] == 2 and len(models) == 3


def test_another_error_surfaces(monkeypatch: pytest.MonkeyPatch) -> None:
    watched(monkeypatch, RuntimeError)
    with pytest.raises(RuntimeError, match="made up"):
        steps.attempt(TINY, 1, warm_up=1, rounds=1)


@pytest.mark.parametrize(
    "said",
    ["CUDA error: out of memory", "Triton Error [CUDA]: out of memory", "CUBLAS_STATUS_ALLOC_FAILED when"],
)
def test_others_say_it_otherwise(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    watched(monkeypatch, RuntimeError, said)
    assert steps.attempt(TINY, 1, warm_up=1, rounds=1) is None


# ---- the command ----------------------------------------------------------------------------------------


def command(folder: Path, *arguments: str) -> tuple[int, list[report.Row]]:
    """The exit status and the rows."""
    from .__main__ import main

    out = folder / "rows.jsonl"
    given = ["--models", "tiny", "--length", "16", "--sequences", "4", "--steps", "2", "--device", "cpu"]
    status = main(["step", *given, "--out", str(out), *arguments])
    return status, report.read(out) if out.exists() else []


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `run` sets is taken back."""
    for name in ("HF_HUB_OFFLINE", "TQDM_DISABLE", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, "1")


@pytest.mark.usefixtures("environment")
def test_the_command_writes_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, rows = command(tmp_path)
    text = capsys.readouterr().out
    trl = importlib.util.find_spec("trl") is not None
    assert status == 0, text
    expected = [(f"{loss}-step", way) for loss in LOSSES for way in steps.WAYS if way != "trl"]
    expected += [("sft-step", "trl"), ("dpo-step", "trl")] * trl
    assert sorted((row["mode"], row["provider"]) for row in rows) == sorted(expected)
    shared = {*(field for field in Case.__dataclass_fields__), "device", "torch", "commit", "date", "package"}
    for row in rows:
        assert shared <= row.keys() and "failed" not in row
        sizes = tuple(row[name] for name in ("shape", "rows", "sequences", "length", "live"))
        assert sizes == ("tiny", 64, 4, 16, 0.75)
        assert row["rounds"] == 2 and row["seconds_p20"] <= row["seconds"] <= row["seconds_p80"]
        assert row["tokens_per_second"] == pytest.approx(64 / row["seconds"])
        assert row["peak_bytes"] is None and row["fits"] == {} and row["gradient_checkpointing"] is True
        assert row["parameters"] == 512 * 32 + 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48 + 2 * 32) + 32
    assert "longest batch is not searched for" in text and "tiny: 4 sequences of 16 tokens" in text
    assert len(report.latest([*rows, *rows, {**rows[0], "lora_r": 4}])) == len(rows) + 1


@pytest.mark.usefixtures("environment")
def test_the_command_tells_want_of_memory_from_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(task: Task, *args: Any) -> None:
        raise torch.OutOfMemoryError("no") if task.way == "eager" else KeyError("a bug")

    monkeypatch.setattr(steps, "train", train)
    given = ("--losses", "sft", "--ways", "eager", "fused_align")
    (status, (eager, ours)), text = command(tmp_path, *given), capsys.readouterr().out
    assert status == 1 and "Traceback" in text and "a bug" in text
    assert eager["failed"] == "out of memory: 64 tokens do not fit" and "a bug" in ours["failed"]
    assert report.cells(ours, report.columns([ours]))[-1] == "failed: KeyError: 'a bug'"
    assert command(tmp_path, *given[:-1])[0] == 0  # that a way needs more memory is a result


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--sequences", "6"), "--sequences must be a multiple of those of a row"),
        (("--length", "4"), "--length must be at least 8; got 4"),
        (("--steps", "1"), "--steps must be at least 2; got 1"),
    ],
)
@pytest.mark.usefixtures("environment")
def test_numbers_that_cannot_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    assert command(tmp_path, *arguments) == (1, []) and message in capsys.readouterr().err


def test_the_table_of_steps() -> None:
    row = steps.about_row(TINY, 8) | {"seconds": 0.5, "seconds_p20": 0.4, "seconds_p80": 0.6}
    row |= {"tokens_per_second": 384.0, "peak_bytes": 3 * 2**30, "note": "a note"}
    row["fits"] = {
        "24": {"tokens": 4096, "tokens_per_second": 1234.5, "at_least": True},
        "80": {"tokens": 0, "tokens_per_second": None, "at_least": False},
    }
    eager = {**row, "provider": "eager", "fits": {}, "failed": "out of memory"}
    for name in ("seconds", "tokens_per_second", "peak_bytes"):
        del eager[name]
    lines = report.markdown([row, eager]).splitlines()
    assert lines[0] == "**tiny: 8 sequences of 24 tokens, float32**"
    assert lines[2] == "| mode | provider | s/step | p20-p80 | tokens/s | peak GiB | 24 GB | 80 GB | note |"
    assert lines[4:6] == [
        "| dpo | fused_align | 0.5 | 0.4-0.6 | 384 | 3.0 | >= 4096 (1234/s) | 0 | a note |",
        "| dpo | eager |  |  |  |  |  |  | a note; failed: out of memory |",
    ]
    assert report.compare([row], [row]) == []
