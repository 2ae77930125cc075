"""Run by test_train.py under torchrun: trains on two CPU processes and writes what they end with."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import training


def main(folder: Path) -> None:
    for loss in ("dpo", "kto", "sft"):
        clipped = loss != "sft"
        trainer = training.trainer(
            folder / f"{loss}_two",
            loss=loss,
            humanline=True if clipped else None,
            max_steps=3,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=2,
            held_out=training.ROWS[loss](6) if clipped else None,
            ddp_backend="gloo",
        )
        trainer.train()
        metrics = trainer.evaluate() if clipped else {}
        kept = {
            k: v
            for k, v in metrics.items()
            if k.startswith(("eval_loss", "eval_rewards", "eval_logps", "eval_kl"))
        }
        if trainer.is_world_process_zero():
            found = {
                "weights": training.weights(trainer.model),
                "loss": training.logged(trainer),
                "eval": kept,
            }
            torch.save(found, folder / f"{loss}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    torch.distributed.destroy_process_group()
