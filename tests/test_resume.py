"""Resuming: an interrupted run ends with the numbers of an uninterrupted one, or says why it cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
from safetensors import safe_open
from training import ROWS, assert_same, logged, lora, trainer, weights
from transformers import TrainerCallback

from fused_align.train import AlignTrainer

pytestmark = [
    # peft 0.21 asks transformers 5 for an attribute by its old name
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


RESUMED = {
    "full, synced": {"humanline": True, "sync_every": 2},
    "full, cached": {},
    "full, gathered later": {"humanline": True, "sync_every": 3, "loss": "grpo", "loss_args": {"beta": 0.1}},
    "kto, cached": {"loss": "kto", "gradient_accumulation_steps": 2},
    "lora, synced": {"humanline": True, "sync_every": 2, "lora": True},
    "lora, cached": {"lora": True},
}


@pytest.mark.parametrize("case", RESUMED)
def test_a_resumed_run_ends_like_an_uninterrupted_one(tmp_path, case):
    settings: dict[str, Any] = dict(RESUMED[case])
    adapter = settings.pop("lora", False)
    rows = ROWS[settings.get("loss", "dpo")]
    settings |= {
        "max_steps": 7,
        "save_strategy": "steps",
        "save_steps": 3,
        "optim": "adamw_torch",
        "learning_rate": 1e-2,
        "lr_scheduler_type": "linear",
        "max_grad_norm": 1.0,
        "eval_strategy": "steps",
        "eval_steps": 2,
    }

    def make(folder: Path, seed: int, callbacks: list[Any] | None = None) -> AlignTrainer:
        peft_config = lora(lora_dropout=0.1) if adapter else None
        # on resuming the model comes with other weights: whatever counts must come from the files
        model = tiny.model(seed if not adapter else 0, attention_dropout=0.1)
        return trainer(
            folder, model, rows(10), rows(4), peft_config=peft_config, callbacks=callbacks, **settings
        )

    whole = make(tmp_path / "whole", 0)
    whole.train()
    broken = make(tmp_path / "broken", 0, [StopAt(4)])
    broken.train()
    assert broken.state.global_step == 4
    resumed = make(tmp_path / "broken", 5)
    resumed.train(resume_from_checkpoint=str(tmp_path / "broken" / "checkpoint-3"))
    assert resumed.state.global_step == 7
    assert_same(weights(resumed.model), weights(whole.model))
    if whole.reference is not None and resumed.reference is not None:
        assert_same(resumed.reference.weights, whole.reference.weights)
    assert logged(resumed) == logged(whole)
    one, other = whole.evaluate(), resumed.evaluate()
    for name in ("eval_loss", *(k for k in one if k.startswith(("eval_rewards", "eval_logps", "eval_kl")))):
        assert one[name] == other[name], name


def test_resuming_without_its_files_or_with_other_data_is_refused(tmp_path):
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 3}
    trainer(tmp_path, **settings).train()
    checkpoint = str(tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match="log-probs of other tokens"):
        trainer(tmp_path, rows=tiny.pairs(9), **settings).train(resume_from_checkpoint=checkpoint)
    (tmp_path / "initial_logp" / "train.safetensors").unlink()
    with pytest.raises(ValueError, match=r"its weights are gone.*train\.safetensors is missing"):
        trainer(tmp_path, **settings).train(resume_from_checkpoint=checkpoint)
    with pytest.raises(ValueError, match="the synced reference is lost"):
        trainer(tmp_path, humanline=True, **settings).train(resume_from_checkpoint=checkpoint)


def test_a_run_in_another_folder_takes_the_tables_along(tmp_path):
    """Those beside the checkpoint count, not those that some other run left in the new folder."""
    settings: dict[str, Any] = {"held_out": tiny.pairs(4), "save_strategy": "steps", "save_steps": 2}
    whole = trainer(tmp_path / "one", **settings)
    whole.train()
    trainer(tmp_path / "two", tiny.model(7), **settings).train()
    for folder in ("two", "three"):  # with another run's tables, and empty
        moved = trainer(tmp_path / folder, tiny.model(5), **settings)
        moved.train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-2"))
        assert logged(moved) == logged(whole)
        assert moved.evaluate()["eval_rewards/margins"] == whole.evaluate()["eval_rewards/margins"] != 0.0
        stored = {run: tables(tmp_path / run) for run in ("one", folder)}
        assert stored["one"] == stored[folder] and len(stored["one"]) == 2
    again = trainer(tmp_path / "three", tiny.model(5), max_steps=6, **settings)
    again.train(resume_from_checkpoint=True)
    assert logged(again)[:4] == logged(whole) and tables(tmp_path / "three") == tables(tmp_path / "one")


def test_tables_of_another_runs_initial_model_are_refused(tmp_path):
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
    trainer(tmp_path, held_out=tiny.pairs(4), **settings).train()
    trainer(tmp_path, loss="sft", **settings).train()  # writes none
    assert tables(tmp_path).keys() == {"train", "eval"}
    trainer(tmp_path, tiny.model(7), **settings).train()  # writes over one of them, and its checkpoints
    again = trainer(tmp_path, tiny.model(7), held_out=tiny.pairs(4), **settings)
    with pytest.raises(ValueError, match=r"eval\.safetensors holds the log-probs of another run's initial"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    trainer(tmp_path, tiny.model(7), **settings).train(resume_from_checkpoint=True)


def test_a_resumed_run_keeps_the_tables_that_it_does_not_read(tmp_path):
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
    trainer(tmp_path, held_out=tiny.pairs(4), **settings).train()
    stored = tables(tmp_path)
    trainer(tmp_path, **settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert tables(tmp_path) == stored


def tables(folder: Path) -> dict[str, tuple[Any, Any]]:
    """What the stored tables hold: their metadata, in no order, and the log-probs."""
    found = {}
    for path in (folder / "initial_logp").glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            names = ("logp", "lengths", "sizes")
            found[path.stem] = file.metadata(), [file.get_tensor(name).tolist() for name in names]
    return found


def test_evaluating_later_does_not_overwrite_what_a_resumed_run_reads(tmp_path):
    settings: dict[str, Any] = {"held_out": tiny.pairs(4), "save_strategy": "steps", "save_steps": 2}
    first = trainer(tmp_path, **settings)
    first.evaluate()  # before training: kept, and written when training begins
    assert not (tmp_path / "initial_logp").exists()
    first.train()
    stored = {path.name: path.read_bytes() for path in (tmp_path / "initial_logp").iterdir()}
    assert stored.keys() == {"train.safetensors", "eval.safetensors"}
    assert trainer(tmp_path, first.model, **settings).evaluate()["eval_rewards/margins"] == 0.0
    assert stored == {path.name: path.read_bytes() for path in (tmp_path / "initial_logp").iterdir()}


def test_evaluating_before_resuming_does_not_move_the_initial_model(tmp_path):
    settings: dict[str, Any] = {"held_out": tiny.pairs(4), "save_strategy": "steps", "save_steps": 2}
    whole = trainer(tmp_path, **settings)
    whole.train()
    resumed = trainer(tmp_path, tiny.model(5), **settings)
    resumed.evaluate()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert logged(resumed) == logged(whole)
    margins = "eval_rewards/margins"
    assert resumed.evaluate()[margins] == whole.evaluate()[margins] != 0.0
