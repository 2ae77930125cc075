"""What the tests of AlignTrainer share: a trainer on the tiny model, and how to compare two of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from fused_align.train import AlignConfig, AlignTrainer, ModelConfig

ROWS = {"sft": tiny.pairs, "dpo": tiny.pairs, "ipo": tiny.pairs, "kto": tiny.judged, "grpo": tiny.groups}
ROWS |= {"ppo": tiny.groups}


def config(folder: Path, **settings: Any) -> AlignConfig:
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "learning_rate": 0.05,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
    }
    return AlignConfig(**(defaults | settings))


def trainer(
    folder: Path, model: Any = None, rows: Any = None, held_out: Any = None, **settings: Any
) -> AlignTrainer:
    peft_config, callbacks = settings.pop("peft_config", None), settings.pop("callbacks", None)
    args = config(folder, **settings)
    if rows is None:
        rows = ROWS[args.loss]()
        if args.loss == "sft":
            rows = rows.rename_column("chosen", "completion").remove_columns("rejected")
    return AlignTrainer(
        tiny.model() if model is None else model,
        args,
        rows,
        held_out,
        tiny.tokenizer(),
        peft_config,
        callbacks,
    )


def lora(**settings: Any) -> Any:
    pytest.importorskip("peft")
    return ModelConfig(lora_r=4, lora_alpha=64, **settings).peft_config()


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], atol: float = 0.0) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            got[name], value, atol=atol, rtol=0.0, msg=lambda m, name=name: f"{name}: {m}"
        )


def logged(of: AlignTrainer, name: str = "loss") -> list[float]:
    return [log[name] for log in of.state.log_history if name in log]
