"""Run by test_train.py under torchrun: trains on two CPU processes and writes what they end with."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import tiny
import torch
import training

from fused_align.train import AlignTrainer

LOSSES: dict[str, dict[str, Any]] = {
    "dpo": {"humanline": True},
    "kto": {"humanline": True},
    "grpo": {"humanline": True, "loss_args": {"beta": 0.1}},
    "sft": {},
}


def main(folder: Path) -> None:
    for loss, settings in LOSSES.items():
        trainer = made(folder / f"{loss}_two", loss=loss, max_steps=3, **settings)
        trainer.train()
        write(trainer, folder / f"{loss}.pt")
    resume(folder)


def resume(folder: Path) -> None:
    """Five steps, the reference synced in every second; and the last two once more, from a checkpoint."""
    settings: dict[str, Any] = {"loss": "dpo", "humanline": True, "sync_every": 2, "max_steps": 5}
    settings |= {"save_strategy": "steps", "save_steps": 3, "optim": "adamw_torch", "learning_rate": 1e-2}
    whole = made(folder / "resumed", **settings)
    whole.train()
    write(whole, folder / "whole.pt")
    resumed = made(folder / "resumed", tiny.model(5), **settings)
    resumed.train(resume_from_checkpoint=str(folder / "resumed" / "checkpoint-3"))
    write(resumed, folder / "resumed.pt")


def made(folder: Path, model: Any = None, **settings: Any) -> AlignTrainer:
    """Half of a step's rows on each process, in two micro-batches."""
    held_out = None if settings["loss"] == "sft" else training.ROWS[settings["loss"]](6)
    settings |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "ddp_backend": "gloo"}
    return training.trainer(folder, model, held_out=held_out, **settings)


def write(trainer: AlignTrainer, path: Path) -> None:
    metrics = trainer.evaluate() if trainer.held_out else {}
    kept = ("eval_loss", "eval_rewards", "eval_logps", "eval_kl")
    found = {
        "weights": training.weights(trainer.model),
        "loss": training.logged(trainer),
        "live": training.logged(trainer, "tokens/live"),
        "eval": {name: value for name, value in metrics.items() if name.startswith(kept)},
    }
    if trainer.is_world_process_zero():
        torch.save(found, path)


# transformers before 5.23 loads a rank's optimizer to "cpu:0", which torch.load does not know
torch.serialization.register_package(
    100, lambda storage: None, lambda storage, place: storage if place == "cpu:0" else None
)

if __name__ == "__main__":
    main(Path(sys.argv[1]))
    torch.distributed.destroy_process_group()
